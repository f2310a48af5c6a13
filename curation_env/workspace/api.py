"""The functions of `import curation`. Heavy libraries are imported by the function that needs them."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .client import request

if TYPE_CHECKING:
    import datasets
    import numpy as np

SUBMISSION = ".submission"


def workspace() -> Path:
    """The workspace folder: `$CURATION_WORKSPACE`, or `/workspace`."""
    return Path(os.environ.get("CURATION_WORKSPACE", "/workspace"))


def task() -> dict[str, Any]:
    """What is asked: `rows`, `tokens`, `sources`, `benchmarks`, `signals`, `iteration`, `iterations`, `seed`, ...

    Raises:
        CurationError: The host cannot be reached.
    """
    result: dict[str, Any] = request("task")[0]
    return result


def history() -> list[dict[str, Any]]:
    """The iterations so far, the base model first: `iteration`, `status`, `score`, `scores` by benchmark, ...

    Raises:
        CurationError: The host cannot be reached.
    """
    result: list[dict[str, Any]] = request("history")[0]
    return result


def pool() -> datasets.Dataset:
    """The candidate rows, memory-mapped: `id`, `source`, `image` {bytes, path} or None, `conversation`, `n_tokens`.

    Nothing is read until a row is; what `map` and `filter` derive from it goes to the temporary folder, for the pool
    itself is read-only.

    Raises:
        FileNotFoundError: There is no pool in the workspace.
    """
    path = workspace() / "pool"
    if not path.is_dir():
        raise FileNotFoundError(f"no pool at {path}: is this running inside the sandbox?")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import datasets

    datasets.disable_caching()
    datasets.disable_progress_bars()  # they fill logs, and the context of whoever reads them
    from .rows import counted_tokens

    rows = datasets.load_from_disk(str(path))
    assert isinstance(rows, datasets.Dataset)
    tokens = counted_tokens(path)
    return rows if tokens is None else rows.add_column("n_tokens", tokens)


def column(name: str) -> np.ndarray:
    """One value per row of the pool, in its order: texts for "id" and "source", int32 for "n_tokens".

    Half a second faster than `pool()[name]` in a policy that needs no more than this: `datasets` is not imported.

    Raises:
        KeyError: There is no such column, or its values are no plain texts and numbers: take `pool()` for those.
        FileNotFoundError: There is no pool in the workspace.
    """
    import numpy as np

    from .rows import open_table

    plain = ("id", "source", "n_tokens")
    if name not in plain:
        raise KeyError(f"column gives {', '.join(plain)}, not {name!r}: pool() has whole rows")
    values = open_table(workspace() / "pool")[name]
    return values.to_numpy() if name == "n_tokens" else np.array(values.to_pylist(), dtype=str)


def signal(name: str) -> np.ndarray:
    """One float32 per row of `pool()`, in its order, computed on the host by fixed code; every call is charged.

    Args:
        name: One of `task()["signals"]`, for example "loss": the mean loss of the student's init over a row's
            assistant tokens. NaN where the signal is not defined for a row.

    Raises:
        CurationError: Unknown signal, budget used up, or the host cannot be reached.
    """
    import numpy as np

    result, payload = request("signal", {"name": name}, timeout=None)
    return np.frombuffer(payload, dtype=result["dtype"]).reshape(result["shape"]).copy()


def seed() -> int:
    """The seed to use: `$CURATION_SEED` in a policy's scored run, else the task's."""
    given = os.environ.get("CURATION_SEED")
    return int(given) if given else int(task().get("seed", 0))


def select(ids: Any, rewrites: Mapping[str, Iterable[Mapping[str, str]]] | None = None) -> int:
    """Write the submission: the rows to train on. The last call counts, and order never matters.

    Args:
        ids: Row ids as a list, tuple, set, numpy array or column; a `datasets.Dataset` with an `id` column; or
            `{id: count}` where the task allows repeats.
        rewrites: For some of these ids another conversation, a list of `{"user": text, "assistant": text}`, where the
            task allows rewriting. The row's image stays; a text holds no image mark.

    Returns:
        How many rows were selected, repeats included.

    Raises:
        TypeError, ValueError: These are not ids, or a rewrite is malformed or of a row that is not selected.
    """
    chosen = _ids(ids)
    lines = _rewrite_lines(rewrites or {}, set(chosen))
    target = workspace() / SUBMISSION
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ValueError(f"{target} must be a folder: remove it")
    target.mkdir(exist_ok=True)
    ids_file, rewrites_file = target / "ids.txt", target / "rewrites.jsonl"
    # Without ids.txt nothing is selected: whoever is killed in between leaves nothing, never half of each.
    ids_file.unlink(missing_ok=True)
    if lines:
        _write(rewrites_file, lines)
    else:
        rewrites_file.unlink(missing_ok=True)
    _write(ids_file, [f"{id_}\n" for id_ in chosen])
    return len(chosen)


def _ids(given: Any) -> list[str]:
    if isinstance(given, (str, bytes)):
        raise TypeError("select takes a list of ids, not one text: select([id])")
    if isinstance(given, Mapping):
        given = [id_ for id_, count in given.items() for _ in range(int(count))]
    elif hasattr(given, "column_names"):  # a datasets.Dataset, without importing datasets
        given = given["id"]
    if hasattr(given, "tolist"):  # numpy, pandas
        given = given.tolist()
    elif hasattr(given, "to_pylist"):  # pyarrow
        given = given.to_pylist()
    chosen = list(given)
    for id_ in chosen:
        if not isinstance(id_, str):
            raise TypeError(
                f"a row is named by its id, a text, not by {id_!r}; by position: select(pool().select(positions))"
            )
        if not id_ or id_.split() != [id_]:
            raise ValueError(f"not a row id: {id_[:80]!r}")
    return chosen


def _rewrite_lines(rewrites: Mapping[str, Iterable[Mapping[str, str]]], chosen: set[str]) -> list[str]:
    lines = []
    for id_, conversation in rewrites.items():
        if id_ not in chosen:
            raise ValueError(f"{id_!r} is rewritten but not selected")
        turns = [dict(turn) for turn in conversation]
        for turn in turns:
            if set(turn) != {"user", "assistant"} or not all(isinstance(text, str) for text in turn.values()):
                raise ValueError(f'the rewrite of {id_!r} must be a list of {{"user": text, "assistant": text}}')
        if not turns:
            raise ValueError(f"the rewrite of {id_!r} has no turn")
        lines.append(json.dumps({"id": id_, "conversation": turns}, ensure_ascii=False) + "\n")
    return lines


def _write(path: Path, lines: Iterable[str]) -> None:
    handle, temporary = tempfile.mkstemp(prefix=".writing-", dir=path.parent)
    try:
        with open(handle, "w", encoding="utf-8", newline="\n") as stream:
            stream.writelines(lines)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
