"""Seconds of one iteration of the miniature on this device, and how its scores differ from another device's.

    python experiments/benchmarks/iteration_mini.py --device cpu --out cpu.json
    python experiments/benchmarks/iteration_mini.py --device cuda --compare cpu.json

Random submissions of the task's size go through training and evaluation with a warm worker and no cache. `--compare`
takes the records of another device: equal submissions and seeds, so that what differs is the arithmetic.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from curation_env.assets import data_root, prepared
from curation_env.calibrate import random_submission
from curation_env.executor import LocalExecutor
from curation_env.judge import Judge
from curation_env.pipeline import Pipeline
from curation_env.task import Task


def measure(task: Task, device: str, submissions: int) -> list[dict[str, Any]]:
    """One record a submission: seconds by stage, scores of all items by benchmark."""
    root = data_root()
    executor, judge = LocalExecutor(), Judge()
    records = []
    try:
        pipeline = Pipeline(task, prepared(task, root), executor, judge, data_root=root, device=device, cache=False)
        started = time.perf_counter()
        base = pipeline.base().scores
        records.append(
            {"name": "base, workers cold", "wall": time.perf_counter() - started, "scores": dict(base.parts["all"])}
        )
        for k in range(submissions):
            submission = random_submission(pipeline, k)
            started = time.perf_counter()
            outcome = pipeline.score(submission)
            wall = time.perf_counter() - started
            scores = dict(outcome.scores.parts["all"])
            records.append({"name": f"random {k}", "wall": wall, "seconds": outcome.seconds, "scores": scores})
    finally:
        executor.close()
        judge.close()
    return records


def print_seconds(records: list[dict[str, Any]], device: str) -> None:
    """Median, least and most of every stage over the submissions after the first, which warms caches."""
    warm = [record for record in records if "seconds" in record][1:]
    table = Table("seconds", "median", "min", "max", title=f"one iteration on {device}, n={len(warm)}")
    for name in (*warm[0]["seconds"], "wall"):
        values = [record["wall"] if name == "wall" else record["seconds"][name] for record in warm]
        table.add_row(name, *(f"{f(values):.3f}" for f in (statistics.median, min, max)))
    Console(width=100).print(table)


def print_difference(here: list[dict[str, Any]], there: list[dict[str, Any]]) -> None:
    """Score differences on equal submissions, by benchmark and in the mean."""
    other = {record["name"]: record["scores"] for record in there}
    pairs = [(record["scores"], other[record["name"]]) for record in here if record["name"] in other]
    table = Table("difference in points", "mean", "largest", title=f"this device minus the other, n={len(pairs)}")
    for name in pairs[0][0]:
        gaps = np.array([a[name] - b[name] for a, b in pairs])
        table.add_row(name, f"{gaps.mean():+.2f}", f"{np.abs(gaps).max():.2f}")
    means = np.array([np.mean(list(a.values())) - np.mean(list(b.values())) for a, b in pairs])
    table.add_row("mean of benchmarks", f"{means.mean():+.2f}", f"{np.abs(means).max():.2f}")
    Console(width=100).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="mini")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--submissions", type=int, default=6)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--compare", type=Path, help="records of another device, written with --out")
    arguments = parser.parse_args()
    records = measure(Task.load(arguments.task), arguments.device, arguments.submissions)
    if arguments.out:
        arguments.out.write_text(json.dumps(records, indent=1) + "\n")
    print_seconds(records, arguments.device)
    if arguments.compare:
        print_difference(records, json.loads(arguments.compare.read_text()))


if __name__ == "__main__":
    main()
