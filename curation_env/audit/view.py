"""The agent's view of a pool: the same rows without those that leak the evaluation."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np

from curation_env.audit.index import AuditIndex
from curation_env.pool import Pool


def write_view(pool: Pool, index: AuditIndex, path: str | Path) -> int:
    """Write the view as a pool folder: `rows/`, `image_digests.npy` and, last, `meta.json`.

    Nothing in it tells which rows were left out, or why. Other files in `path` (the audit index) stay as they are.

    Args:
        pool: The whole pool.
        index: Its audit index.
        path: Folder of the view; only its `rows/` is mounted into the sandbox.

    Returns:
        Rows of the view.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    keep = np.flatnonzero([id_ not in index.blocked for id_ in pool.ids])
    scratch = path / f".rows.{os.getpid()}.partial"
    shutil.rmtree(scratch, ignore_errors=True)
    import datasets

    datasets.disable_progress_bars()  # the caller shows progress, once
    pool.table.select(keep).flatten_indices().save_to_disk(str(scratch))
    shutil.rmtree(path / "rows", ignore_errors=True)
    scratch.rename(path / "rows")
    np.save(path / "image_digests.npy", pool.image_digests[keep])
    meta = {**pool.meta, "rows": len(keep), "rows_of_pool": len(pool)}
    (path / "meta.json").write_text(json.dumps(meta, indent=1, sort_keys=True))
    return len(keep)
