"""A whole episode of LLaVA-1.5-7B's task on a GPU, at reduced counts, and what an iteration of full size would take.

    python experiments/benchmarks/iteration_gpu.py --dir /scratch/random-llava

The task has real shapes and random contents (random_task.py). It is prepared by `curation-env prepare`, made by the
environment that `gym.make` makes, and played: base model, a random submission, the end. Seconds are those that the
journal has. What grows is carried on to 10,000 rows and to the suite's 9,958 questions: training and answering at their
pace after the first step and the first batch, during which layers are compiled, other parts in proportion. The rest
counts as it is. `--out` keeps journal and figures.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
from random_task import LONG, LONG_SETS, SHORT, make_task

from curation_env import envs
from curation_env.actions import policy
from curation_env.sandbox import available

POLICY = """
import curation, random
random.seed(curation.seed())
curation.select(random.sample(list(curation.column("id")), curation.task()["rows"]))
"""
ROWS = 10_000
#: What grows with the rows of a submission, what with the questions; the rest does neither.
BY_ROWS = ("validate", "audit", "train: data", "train: features")
BY_QUESTIONS = ("evaluate: judge", "evaluate: score")
#: The stages that report their progress, and the part of each that they report of.
PACED = {"train": "train: steps", "evaluate": "evaluate: generate"}
Told = list[tuple[float, dict[str, Any]]]


def play(task: Path, folder: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Prepare the task and play an episode of one iteration.

    Returns:
        Seconds of its parts; seconds a row of training and a question, by the part's name.
    """
    root = folder / "data"
    subprocess.run(
        ["curation-env", "prepare", str(task), "--suite", str(folder / "sets"), "--source", str(folder / "source")],
        check=True,
        env={**os.environ, "CURATION_ENV_DATA": str(root)},
    )
    engine = "bubblewrap" if available()["bubblewrap"] == "" else "none"
    env = envs.make(
        str(task), iterations=1, cache=False, data_root=str(root), sandbox=engine, run_dir=str(folder / "run")
    )
    core = env.unwrapped
    told: Told = []
    core.on_progress = lambda event: told.append((time.monotonic(), event))
    started = time.monotonic()
    obs, _ = env.reset(seed=0)
    seconds = {"reset": time.monotonic() - started}
    print(obs["message"], flush=True)
    told.clear()
    started = time.monotonic()
    obs, _, terminated, _, info = env.step(policy(POLICY))
    seconds["wall clock"] = time.monotonic() - started
    print(obs["message"], flush=True)
    if info["status"] not in ("scored", "finished") or not terminated:
        raise SystemExit(f"the iteration was not scored: {info['status']} {info['error']}")
    seconds["policy"] = core.ledger.events("policy_run")[-1]["seconds"]
    seconds |= core.ledger.events("iteration")[-1]["seconds"]
    env.close()
    return seconds, {part: pace(told, stage) for stage, part in PACED.items()}


def pace(told: Told, stage: str) -> float:
    """Seconds a row (or question) of a stage, from its first report to its last."""
    at, reports = zip(*((moment, event) for moment, event in told if event["stage"] == stage), strict=True)
    done = [event.get("rows", event["done"]) for event in reports]
    if done[-1] == done[0]:
        raise SystemExit(f"{stage} was over with its first report, so it has no pace: take more rows and questions")
    return (at[-1] - at[0]) / (done[-1] - done[0])


def full_size(
    seconds: dict[str, float], paces: dict[str, float], rows: int, questions: int, all_questions: int
) -> dict[str, float]:
    """Seconds by part at the task's full counts."""
    more = {part: value * (ROWS / rows - 1) for part, value in seconds.items() if part in BY_ROWS}
    more |= {part: value * (all_questions / questions - 1) for part, value in seconds.items() if part in BY_QUESTIONS}
    more["train: steps"] = paces["train: steps"] * (ROWS - rows)
    more["evaluate: generate"] = paces["evaluate: generate"] * (all_questions - questions)
    for stage in PACED:
        more[stage] = sum(value for part, value in more.items() if part.startswith(f"{stage}: "))
    more["wall clock"] = sum(value for part, value in more.items() if ": " not in part)
    return {part: value + more.get(part, 0.0) for part, value in seconds.items()}


def print_table(seconds: dict[str, float], scaled: dict[str, float], title: str) -> None:
    table = Table("seconds", "measured", "at full size", title=title)
    for part in seconds:
        if part != "reset":
            table.add_row(part, f"{seconds[part]:.2f}", f"{scaled[part]:.1f}")
    console = Console(width=100)
    console.print(table)
    console.print(
        f"an iteration of full size: {scaled['wall clock'] / 60:.1f} minutes (target 18), the time of a real judge"
        f" apart; reset with the base model's evaluation: {seconds['reset']:.0f} s measured"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True, help="some 50 GB of room; made, and removed at the end")
    parser.add_argument(
        "--rows",
        type=int,
        default=928,
        help="of the submission; from 911 on images are seen step by step, as at full size",
    )
    parser.add_argument("--questions", type=int, default=1000, help="of the eight sets together")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--out", type=Path, help="folder that keeps journal and figures")
    arguments = parser.parse_args()
    folder = arguments.dir.absolute()
    folder.mkdir(parents=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    started = time.monotonic()
    task = make_task(folder, arguments.rows, 2 * arguments.rows, arguments.questions, device, arguments.layers)
    torch.cuda.empty_cache()
    print(f"random task made in {time.monotonic() - started:.0f} s", flush=True)
    try:
        seconds, paces = play(task, folder)
        costs = {
            name: sum(one["cost"] for one in yaml.safe_load(path.read_text())["benchmarks"].values())
            for name, path in {
                "here": folder / "vlm8-random.yaml",
                "all": Path(str(resources.files("curation_env.conf"))) / "suite" / "vlm8-v1.yaml",
            }.items()
        }
        scaled = full_size(seconds, paces, arguments.rows, costs["here"], costs["all"])
        card = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
        answers = f"answers of {LONG} tokens in {', '.join(LONG_SETS)}, of {SHORT} in the others"
        print_table(seconds, scaled, f"{card}: {arguments.rows} rows, {costs['here']} questions; {answers}")
        if arguments.out:
            arguments.out.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / "run" / "episode-0000" / "journal.jsonl", arguments.out)
            figures = {
                "card": card,
                "rows": arguments.rows,
                "questions": costs["here"],
                "seconds": seconds,
                "pace": paces,
            }
            (arguments.out / "iteration.json").write_text(json.dumps(figures | {"full_size": scaled}, indent=1) + "\n")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
