"""Signals of a student's init over the pool: fixed code that the host runs, for selection policies to read."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from curation_env.errors import StageFailed
from curation_env.pool import Pool
from curation_env.training.data import Encoder, Row, micro_batches
from curation_env.training.images import image_features
from curation_env.training.model import Student, resolve_device
from curation_env.training.recipe import Recipe

ROWS_PER_CHUNK = 512  # rows whose images are in memory at a time


def signal_stage(
    *,
    name: str,
    init: str | Path,
    recipe: Recipe,
    pool: str | Path,
    out: str | Path,
    device: str = "auto",
    on_progress: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Compute a signal for every row of a pool and save it: float32 of shape (rows,), in the pool's order.

    "loss" is the init's mean loss over the supervised tokens of a row; NaN for a row without any.

    Returns:
        `price`: the seconds that it took.

    Raises:
        StageFailed: There is no signal of that name.
    """
    if name != "loss":
        raise StageFailed(f"no signal {name!r}: there is loss")
    started = time.perf_counter()
    opened = Pool.open(pool)
    encoder = Encoder.load(init, recipe)
    student = Student.load(init, recipe, resolve_device(device))
    values = np.full(len(opened), np.nan, np.float32)
    for start in range(0, len(opened), ROWS_PER_CHUNK):
        indices = range(start, min(start + ROWS_PER_CHUNK, len(opened)))
        rows = encoder.encode_rows(list(opened.rows(indices)))
        values[start : indices.stop] = mean_losses(student, encoder, rows)
        if on_progress:
            left = (time.perf_counter() - started) / indices.stop * (len(opened) - indices.stop)
            on_progress(
                {
                    "stage": "signal",
                    "done": indices.stop,
                    "total": len(opened),
                    "unit": "rows",
                    "seconds_left": round(left, 2),
                }
            )
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    np.save(out, values)
    return {"price": time.perf_counter() - started}


def mean_losses(student: Student, encoder: Encoder, rows: list[Row]) -> np.ndarray:
    """Return each row's mean loss over its supervised tokens, float32 of shape (rows,); NaN where it has none."""
    images = {row.image: row.image_bytes for row in rows if row.image is not None}
    features = image_features(student, encoder, images)
    losses = np.full(len(rows), np.nan, np.float32)
    order = sorted((k for k in range(len(rows)) if rows[k].n_supervised), key=lambda k: (len(rows[k].tokens), k))
    position = 0
    for batch in micro_batches([rows[k] for k in order], encoder.recipe.tokens_per_micro_batch):
        with torch.inference_mode():
            flat = student.token_losses(batch, features).cpu()
        owners = torch.repeat_interleave(torch.tensor([row.n_supervised for row in batch]))
        sums = torch.zeros(len(batch)).index_add(0, owners, flat)
        means = sums / torch.tensor([row.n_supervised for row in batch])
        losses[order[position : position + len(batch)]] = means.numpy()
        position += len(batch)
    return losses
