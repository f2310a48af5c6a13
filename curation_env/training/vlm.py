"""The one fixed trainer of vision-language students: settings, data, model, optimizer, loop, top to bottom.

The optimizer step is `examples_per_step` rows, however they are packed and however many processes share them: the loss
of a step is the token mean over its whole window. On a CPU the same rows, recipe and seed give the same weights bit for
bit. `python -m curation_env.worker` runs it; nothing here reads anything that an agent can write.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from curation_env.errors import NonFiniteLoss
from curation_env.pool import Pool
from curation_env.training import engine as engines
from curation_env.training import plan as plans
from curation_env.training.data import Encoder, read_rows
from curation_env.training.images import CACHE_BYTES, make_features
from curation_env.training.model import Student, resolve_device
from curation_env.training.recipe import Recipe
from curation_env.training.share import even_shares, share

log = logging.getLogger(__name__)
Progress = Callable[[dict[str, Any]], None]


def train(
    *,
    init: str | Path,
    recipe: Recipe,
    pool: str | Path,
    ids: Sequence[str],
    seed: int,
    out: str | Path,
    rewrites: dict[str, list[dict[str, str]]] | None = None,
    device: str = "auto",
    zero_stage: int = 0,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Fine-tune `init` on the rows `ids` of a pool and write a checkpoint.

    Args:
        init: Folder of the starting checkpoint with its tokenizer and image processor.
        ids: Row ids with repeats; their order does not matter.
        seed: One of the recipe's seeds: it draws the order of the rows, nothing else.
        out: Folder for `checkpoint/` and `training.jsonl` (step, loss, lr, tokens; no times).
        rewrites: Conversations that replace those of the pool, by row id.
        zero_stage: What processes that a launcher started share out besides rows: nothing (0), or what DeepSpeed's
            ZeRO of this stage does.

    Returns:
        `checkpoint` (folder), `steps`, `supervised_tokens` (of one epoch), `final_loss`, `seconds` by part, and
        `memory`: the way that the run took on a GPU (`plan.Plan.record`), None on a CPU.

    Raises:
        MissingAssets: The init or the pool is not there.
        UnsupervisedRow: A row has no supervised token after truncation.
        OutOfMemory: There is no way to train this student on this GPU; nothing was trained.
        NonFiniteLoss: The loss became NaN or infinite; no checkpoint is written.
    """
    clock = time.perf_counter
    started, seconds = clock(), {}
    rank, world = engines.rank_and_world()
    report = on_progress if on_progress is not None and rank == 0 else lambda event: None

    # Settings. The order of a submission is not part of it: everything works on the sorted multiset of ids.
    place = resolve_device(device, int(os.environ.get("LOCAL_RANK", 0)))
    torch.manual_seed(seed)
    # In half precision on a GPU the order of sums is left to the kernels: those that fix it are slower.
    fixed_order = place.type == "cpu" or recipe.precision == "fp32"
    torch.use_deterministic_algorithms(fixed_order, warn_only=place.type != "cpu")
    # Nothing reads such memory; filling it takes time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    total = recipe.total_steps(len(ids))

    # Data.
    encoder = Encoder.load(init, recipe)
    rows = encoder.encode(read_rows(Pool.open(pool), sorted(ids), rewrites or {}))
    supervised = sum(row.n_supervised for row in rows)
    steps = list(windows(len(rows), recipe, seed))
    seconds["data"] = clock() - started

    # Memory. What does not fit is known before anything is loaded; a CPU has no way but the recipe's.
    # Processes that share steps go the same way: the one for which the GPU with the least room has enough.
    plan = None
    if world > 1:
        engines.join(place)
    if place.type == "cuda":
        machine = plans.Machine(*engines.least(plans.read_machine(place), place))
        parts = [part for window in steps for part in even_shares(rows, window, world)]
        plan = plans.of_run(init, recipe, rows, parts, machine, plans.Shares(world, zero_stage))
        recipe = plan.applied(recipe)

    # Model. The frozen tower sees every distinct image once, in an order that the seed does not move; where features of
    # all are too much to keep, it sees the images of a step at each step.
    mark = clock()
    student = Student.load(init, recipe, place)
    seconds["model"], mark = clock() - mark, clock()
    images = {row.image: row.image_bytes for row in rows if row.image is not None}
    features = make_features(
        student,
        encoder,
        images,
        ((() if row.image is None else (row.image,), row.tokens) for row in rows),
        lambda: [
            [key for batch in share(rows, window, recipe, rank, world) for row in batch.rows if (key := row.image)]
            for window in steps
        ],
        CACHE_BYTES,
        lambda done, n: report(_event("images", done, n, "images", mark)),
    )
    seconds["features"], mark = clock() - mark, clock()

    # Optimizer.
    engine = engines.make(student, recipe, rows, features, zero_stage, plan)

    # Loop.
    loss_value, step = float("nan"), 0
    with features, open(out / "training.jsonl" if rank == 0 else os.devnull, "w") as log_file:
        for window in steps:
            lr = recipe.lr_at(step, total)
            loss_value, grad_norm = engine.step(window, lr)
            if not np.isfinite(loss_value):
                raise NonFiniteLoss(
                    f"the loss became {loss_value} at step {step} of {total}: no checkpoint was written",
                    details="rows of the window: " + ", ".join(rows[k].id for k in window),
                )
            step += 1
            if rank == 0:
                tokens = sum(rows[k].n_supervised for k in window)
                line = {"step": step, "loss": loss_value, "lr": lr, "tokens": tokens, "grad_norm": grad_norm}
                log_file.write(json.dumps(line) + "\n")
                done = {
                    "loss": loss_value,
                    "rows": min(step * recipe.examples_per_step, recipe.epochs * len(rows)),
                }
                report(_event("train", step, total, "steps", mark) | done)
    seconds["steps"], mark = clock() - mark, clock()

    checkpoint = out / "checkpoint"
    with engine.whole():
        if rank == 0:
            student.save(checkpoint, init)
    seconds["save"] = clock() - mark
    log.info("trained %d steps on %d rows, final loss %.4f", step, len(rows), loss_value)
    return {
        "checkpoint": str(checkpoint),
        "steps": step,
        "supervised_tokens": supervised,
        "final_loss": loss_value,
        "seconds": {name: round(value, 4) for name, value in seconds.items()},
        "memory": None if plan is None else plan.record(),
    }


def windows(n_rows: int, recipe: Recipe, seed: int) -> Iterator[list[int]]:
    """Yield the row indices of every optimizer step: each epoch is one permutation, cut into windows."""
    for epoch in range(recipe.epochs):
        order = np.random.default_rng([seed, epoch]).permutation(n_rows).tolist()
        for start in range(0, n_rows, recipe.examples_per_step):
            yield order[start : start + recipe.examples_per_step]


def _event(stage: str, done: int, total: int, unit: str, since: float) -> dict[str, Any]:
    left = (time.perf_counter() - since) / max(1, done) * (total - done)
    return {"stage": stage, "done": done, "total": total, "unit": unit, "seconds_left": round(left, 2)}
