"""A task's reference: what the base model, random submissions and the full pool score on each part of the items."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from curation_env.assets import data_root, prepared
from curation_env.feedback import judge_free_mean
from curation_env.pipeline import PARTS, Pipeline, Progress, Scores
from curation_env.submission import Submission
from curation_env.task import Task


@contextlib.contextmanager
def open_pipeline(
    task: Task, root: Path | None = None, *, device: str = "auto", on_progress: Progress | None = None
) -> Iterator[Pipeline]:
    """A task's path to scores with a worker and a judge of its own, stopped at the end.

    Raises:
        MissingAssets: Something is not prepared.
    """
    from curation_env.executor import LocalExecutor
    from curation_env.judge import Judge

    folder = data_root(root)
    assets = prepared(task, folder, on_progress)
    with contextlib.ExitStack() as stack:
        executor = LocalExecutor()
        stack.callback(executor.close)
        judge = Judge()
        stack.callback(judge.close)
        yield Pipeline(task, assets, executor, judge, data_root=folder, device=device)


def random_submission(pipeline: Pipeline, seed: int) -> Submission:
    """A random submission of the task's size."""
    ids = pipeline.view.ids
    chosen = np.random.default_rng(seed).choice(len(ids), min(pipeline.task.rows, len(ids)), replace=False)
    return Submission.of(ids[int(k)] for k in chosen)


def calibrate(
    pipeline: Pipeline, *, subsets: int = 12, seeds: int = 5, on_progress: Progress | None = None
) -> dict[str, Any]:
    """Measure the reference; every run is cached, so an interrupted calibration goes on where it was.

    Args:
        pipeline: Of the task as its file has it.
        subsets: Random submissions, each trained with the first training seed.
        seeds: Training seeds, for the first random submission and for the full pool.

    Returns:
        For each part: base, random and full ({mean, sd, n, source, judge_free: {mean, sd}}, of the runs' means over all
        benchmarks and over those that no judge grades), and `seed_sd` and `judge_free_seed_sd`, the spread that
        training seeds alone make.
    """
    task = pipeline.task
    listed = task.recipe_config["seeds"][:seeds]
    base = pipeline.base(on_progress).scores
    one = task.training_seeds[:1]
    random = [pipeline.train_scores(random_submission(pipeline, k), one, on_progress)[one[0]] for k in range(subsets)]
    repeated = list(pipeline.train_scores(random_submission(pipeline, 0), listed, on_progress).values())
    full = list(pipeline.train_scores(Submission.of(pipeline.view.ids), listed[:3], on_progress).values())
    source = f"curation-env calibrate {task.name}"
    return {
        part: {
            "base": _summary(task, [base], part, source),
            "random": _summary(task, random, part, source),
            "full": _summary(task, full, part, source),
            "seed_sd": spread([scores.mean(part) for scores in repeated])["sd"],
            "judge_free_seed_sd": spread([judge_free_mean(task, scores.parts[part]) for scores in repeated])["sd"],
        }
        for part in PARTS
    }


def _summary(task: Task, runs: list[Scores], part: str, source: str) -> dict[str, Any]:
    free = [judge_free_mean(task, scores.parts[part]) for scores in runs]
    values = [scores.mean(part) for scores in runs]
    return {**spread(values), "n": len(values), "source": source, "judge_free": spread(free)}


def spread(values: list[float]) -> dict[str, float | None]:
    """Mean and standard deviation of runs; one alone has no spread."""
    return {"mean": float(np.mean(values)), "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None}
