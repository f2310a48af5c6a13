"""The agent's view of a pool: the same rows without those that leak the evaluation."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np

from curation_env.audit.index import BATCH, AuditIndex
from curation_env.pool import Pool, features, finish_rows, link, row_files


def write_view(pool: Pool, index: AuditIndex, path: str | Path) -> int:
    """Write the view as a pool folder: `rows/`, `image_digests.npy` and, last, `meta.json`.

    Files of rows that lose none are shared with the pool, not copied.
    Nothing in it tells which rows were left out, or why. Other files in `path` (the audit index) stay as they are.

    Args:
        pool: The whole pool.
        index: Its audit index.
        path: Folder of the view; only its `rows/` is mounted into the sandbox.

    Returns:
        Rows of the view.
    """
    import pyarrow as pa

    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    (path / "meta.json").unlink(missing_ok=True)  # a view that is half replaced is none
    kept = np.array([id_ not in index.blocked for id_ in pool.ids])
    scratch = path / f".rows.{os.getpid()}.partial"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    streams, start = [], 0
    for number, file in enumerate(row_files(pool.path / "rows")):
        streams.append(scratch / f"{number}.arrow")
        with pa.memory_map(str(file)) as source:
            table = pa.ipc.open_stream(source).read_all()
            keep, start = kept[start : start + len(table)], start + len(table)
            if keep.all():
                link(file, streams[-1])
                continue
            with pa.ipc.new_stream(str(streams[-1]), table.schema) as writer:
                for first in range(0, len(table), BATCH):
                    writer.write_table(table.slice(first, BATCH).filter(pa.array(keep[first : first + BATCH])))
    finish_rows(scratch, streams, features(tokens="n_tokens" in pool.table.column_names))
    shutil.rmtree(path / "rows", ignore_errors=True)
    scratch.rename(path / "rows")
    np.save(path / "image_digests.npy", pool.image_digests[kept])
    meta = {**pool.meta, "rows": int(kept.sum()), "rows_of_pool": len(pool)}
    text = path / f".meta.{os.getpid()}.partial"
    text.write_text(json.dumps(meta, indent=1, sort_keys=True))
    text.rename(path / "meta.json")
    return int(kept.sum())
