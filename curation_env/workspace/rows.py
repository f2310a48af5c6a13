"""Look rows of the pool up by id or number with pyarrow alone: the `datasets` library takes a second to import."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa


def open_table(pool: Path) -> pa.Table:
    """The pool as a memory-mapped table.

    Raises:
        FileNotFoundError: There is no pool there.
    """
    import pyarrow as pa

    state = pool / "state.json"
    if not state.is_file():
        raise FileNotFoundError(f"no pool at {pool}: is this running inside the sandbox?")
    parts = []
    for entry in json.loads(state.read_text())["_data_files"]:
        with pa.memory_map(str(pool / entry["filename"])) as source:
            parts.append(pa.ipc.open_stream(source).read_all())
    table = pa.concat_tables(parts)
    tokens = counted_tokens(pool)
    return table if tokens is None else table.append_column("n_tokens", pa.array(tokens))


def counted_tokens(pool: Path) -> np.ndarray | None:
    """Supervised tokens of each row where the rows don't hold them: students share the files of a large pool."""
    path = pool / "n_tokens.npy"
    if not path.is_file():
        return None
    import numpy as np

    counts: np.ndarray = np.load(path)
    return counts


def find_rows(pool: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """The rows called `names`: ids, or row numbers (a short run of digits, counted from 0).

    Raises:
        KeyError: Some name is no row of this pool.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    table = open_table(pool)
    ids = [name for name in names if not _is_number(name)]
    by_id = {}
    if ids:
        found = pc.index_in(pa.array(ids, table["id"].type), table["id"]).to_pylist()
        by_id = dict(zip(ids, found, strict=True))
    positions = [int(name) if _is_number(name) else by_id[name] for name in names]
    unknown = [
        name for name, position in zip(names, positions, strict=True) if position is None or position >= len(table)
    ]
    if unknown:
        shown = ", ".join(unknown[:5]) + (", ..." if len(unknown) > 5 else "")
        raise KeyError(f"{len(unknown)} of {len(names)} are no rows of the pool ({len(table):,} rows): {shown}")
    # Sliced one by one: `take` would first join the images of a pool of many files into one array.
    rows: list[dict[str, Any]] = [table.slice(position, 1).to_pylist()[0] for position in positions]
    return rows


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdigit() and len(name) <= 10
