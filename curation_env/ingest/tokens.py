"""Supervised tokens of a pool's rows under one student: counted once for each pool, student and recipe, in parallel.

The public pools are shared by several students, so the counts stand beside the rows (`pool.TOKENS`), not in them.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from curation_env.ingest.build import processors, stay_with_parent
from curation_env.pool import row_files
from curation_env.training.recipe import Recipe
from curation_env.training.tokens import TokenCounter

_ROWS_PER_READ = 500


def count_tokens(
    rows: Path,
    student: Path,
    recipe: Recipe,
    on_progress: Callable[[dict[str, Any]], None] | None = None,
    *,
    workers: int | None = None,
) -> np.ndarray:
    """Count the supervised tokens of every row of a folder of rows: int32 of shape (rows,).

    Args:
        rows: The folder, as `pool.finish_rows` leaves it.
        student: Folder of the init.
        recipe: How a conversation becomes text, and where it is cut.
        on_progress: Called with {"stage", "done", "total", "unit"}.
        workers: Worker processes; default: what `processors` says.
    """
    files = row_files(rows)
    count = partial(_count_file, student=student, recipe=recipe)
    counts = []
    with ProcessPoolExecutor(
        workers or processors(), mp_context=get_context("spawn"), initializer=stay_with_parent
    ) as executor:
        for counted in executor.map(count, files):
            counts.append(counted)
            if on_progress is not None:
                on_progress({"stage": "count tokens", "done": len(counts), "total": len(files), "unit": "files"})
    return np.concatenate(counts)


def _count_file(file: Path, student: Path, recipe: Recipe) -> np.ndarray:
    count = TokenCounter(student, recipe)
    found: list[int] = []
    with pa.memory_map(str(file)) as source:
        table = pa.ipc.open_stream(source).read_all()
        for start in range(0, len(table), _ROWS_PER_READ):
            part = table.slice(start, _ROWS_PER_READ)
            images = part["image"].is_valid().to_pylist()
            found += map(count, part["conversation"].to_pylist(), images)
    return np.array(found, np.int32)
