"""The pool: the candidate examples, a memory-mapped Arrow dataset with ids that are the same on every copy."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from curation_env.errors import MissingAssets

if TYPE_CHECKING:
    import datasets

Conversation = list[dict[str, str]]
_ROWS_PER_READ = 256
#: In a folder of rows that lack the column: supervised tokens of each row, int32 of shape (rows,).
TOKENS = "n_tokens.npy"


def canonical_json(value: Any) -> str:
    """One text for one value: sorted keys, no spaces, non-ASCII kept."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def row_id(source: str, image_path: str | None, conversation: Sequence[dict[str, str]]) -> str:
    """Return the id of a row: blake2b-128, in hex, of its source, relative image path and conversation.

    Image bytes stay out of it, because mirrors of the public pools re-encode images. Identical rows get the suffix
    `-k` for the k-th repeat (k from 1) when the pool is written.
    """
    turns = [[turn["user"], turn["assistant"]] for turn in conversation]
    return hashlib.blake2b(canonical_json([source, image_path or "", turns]).encode(), digest_size=16).hexdigest()


def image_digest(data: bytes | None) -> bytes:
    """Return blake2b-128 of an image's bytes; sixteen zero bytes for a text-only row."""
    return hashlib.blake2b(data, digest_size=16).digest() if data is not None else bytes(16)


def features(tokens: bool = True) -> datasets.Features:
    """Arrow columns of a pool (and of the agent's view of it).

    Args:
        tokens: Whether rows hold `n_tokens`. Those of the public pools don't, because several students share them: the
            counts of one student are a file beside its view's rows (`TOKENS`), which readers join as the last column.
    """
    import datasets

    text = datasets.Value("string")
    columns = {
        "id": text,
        "source": text,
        "image": {"bytes": datasets.Value("binary"), "path": text},
        "conversation": [{"user": text, "assistant": text}],
    }
    return datasets.Features({**columns, **({"n_tokens": datasets.Value("int32")} if tokens else {})})


class Pool:
    """Read access to a pool folder (see `write_pool`); rows are read from the memory map when asked for."""

    def __init__(self, path: Path, table: datasets.Dataset, meta: dict[str, Any]) -> None:
        self.path = path
        self.table = table
        self.meta = meta

    @classmethod
    def open(cls, path: str | Path) -> Pool:
        """Open a pool folder.

        Raises:
            MissingAssets: There is no pool at `path`.
        """
        import datasets

        path = Path(path)
        if not (path / "meta.json").is_file():
            raise MissingAssets(f"no pool at {path}: prepare it with `curation-env prepare TASK`")
        meta = json.loads((path / "meta.json").read_text())
        table = datasets.load_from_disk(str(path / "rows"), keep_in_memory=False)
        assert isinstance(table, datasets.Dataset)
        if (path / "rows" / TOKENS).is_file():
            table = table.add_column("n_tokens", np.load(path / "rows" / TOKENS))
        return cls(path, table, meta)

    def __len__(self) -> int:
        return len(self.table)

    @property
    def key(self) -> str:
        return self.meta["key"]

    @property
    def hash(self) -> str:
        return self.meta["hash"]

    @functools.cached_property
    def ids(self) -> list[str]:
        return self._column("id").to_pylist()

    @functools.cached_property
    def sources(self) -> list[str]:
        return self._column("source").to_pylist()

    @functools.cached_property
    def n_tokens(self) -> np.ndarray:
        """Supervised tokens of each row, int32 of shape (rows,).

        Raises:
            MissingAssets: They are not counted here: a public pool's are, for each student, in its view.
        """
        if "n_tokens" not in self.table.column_names:
            raise MissingAssets(f"{self.path} has no counts of supervised tokens: a task's view of it has")
        return self._column("n_tokens").to_numpy()

    @functools.cached_property
    def image_digests(self) -> np.ndarray:
        """Digest of each row's image bytes, uint8 of shape (rows, 16); zeros where there is none."""
        return np.load(self.path / "image_digests.npy")

    @functools.cached_property
    def position(self) -> dict[str, int]:
        return {id_: k for k, id_ in enumerate(self.ids)}

    def row(self, index: int) -> dict[str, Any]:
        """One row: `id`, `source`, `image` ({"bytes", "path"} or None), `conversation`, `n_tokens` where counted."""
        return next(self.rows([index]))

    def rows(self, indices: Iterable[int]) -> Iterator[dict[str, Any]]:
        """Yield rows in the order of `indices`, a few hundred read at a time: one by one takes three times as long."""
        left = iter(indices)
        while chunk := [int(index) for index in itertools.islice(left, _ROWS_PER_READ)]:
            columns = self.table[chunk]
            for values in zip(*columns.values(), strict=True):
                row = dict(zip(columns, values, strict=True))
                if row["image"] is not None and row["image"]["bytes"] is None:
                    row["image"] = None
                yield row

    def _column(self, name: str) -> Any:
        return self.table.data.column(name)


def write_pool(
    path: str | Path, rows: Iterable[dict[str, Any]], *, key: str, meta: dict[str, Any] | None = None
) -> str:
    """Write a pool folder atomically and return its hash.

    Args:
        path: The folder to make; it must not exist yet.
        rows: Dicts with `source`, `image` ({"bytes", "path"} or None), `conversation` (list of {"user", "assistant"})
            and `n_tokens` (supervised tokens). Ids are computed here, repeats numbered in the order given.
        key: The pool's name on disk.
        meta: More fields for `meta.json` (generator, versions of libraries).

    Returns:
        sha256 over ids, image digests and token counts in order, in hex: what a task pins.
    """
    import datasets

    path = Path(path)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    seen: Counter[str] = Counter()
    digests: list[bytes] = []
    hasher = hashlib.sha256()

    def numbered() -> Iterator[dict[str, Any]]:
        for row in rows:
            image = row["image"]
            base = row_id(row["source"], image["path"] if image else None, row["conversation"])
            repeat = seen[base]
            seen[base] += 1
            id_ = f"{base}-{repeat}" if repeat else base
            digest = image_digest(image["bytes"] if image else None)
            digests.append(digest)
            hasher.update(f"{id_} {digest.hex()} {row['n_tokens']}\n".encode())
            yield {**row, "id": id_}

    write_rows(scratch / "rows", numbered())
    np.save(scratch / "image_digests.npy", np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 16))
    record = {**(meta or {}), "key": key, "hash": hasher.hexdigest(), "rows": len(digests)}
    record["datasets"] = datasets.__version__
    (scratch / "meta.json").write_text(json.dumps(record, indent=1, sort_keys=True))
    publish(scratch, path)
    return record["hash"]


def publish(scratch: Path, path: Path) -> None:
    """Rename a pool that is whole to its place, or drop it where another process was faster.

    That one's pool is the same, or the hash check of the task will say so.
    """
    try:
        scratch.rename(path)
    except OSError:
        shutil.rmtree(scratch, ignore_errors=True)
        if not (path / "meta.json").is_file():
            raise


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as a `datasets` folder, a thousand in memory at a time."""
    import pyarrow as pa

    path.mkdir(parents=True, exist_ok=True)
    columns = features()
    with pa.ipc.new_stream(str(path / "rows.arrow"), columns.arrow_schema) as writer:
        iterator = iter(rows)
        while batch := list(itertools.islice(iterator, 1000)):
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=columns.arrow_schema))
    finish_rows(path, [path / "rows.arrow"], columns)


def finish_rows(path: Path, streams: Sequence[Path], columns: datasets.Features) -> None:
    """Make a folder with Arrow streams in it one that `datasets.load_from_disk` opens, without copying a row.

    Args:
        path: The folder.
        streams: Files in it with rows of the same columns, in the order of the rows; they are renamed.
        columns: Their columns.
    """
    import datasets

    datasets.disable_progress_bars()  # the caller shows progress, once
    # The library writes the folder of an empty dataset, and the files are added to its list.
    datasets.Dataset.from_dict({name: [] for name in columns}, features=columns).save_to_disk(str(path))
    names = [f"data-{k:05d}-of-{len(streams):05d}.arrow" for k in range(len(streams))]
    for stream, name in zip(streams, names, strict=True):
        stream.rename(path / name)
    state = json.loads((path / "state.json").read_text())
    files = [(name, info.st_size, info.st_mtime_ns) for name in names for info in [(path / name).stat()]]
    state["_data_files"] = [{"filename": name} for name in names]
    state["_fingerprint"] = hashlib.blake2b(canonical_json(files).encode(), digest_size=8).hexdigest()
    (path / "state.json").write_text(json.dumps(state, indent=2, sort_keys=True))


def row_files(path: Path) -> list[Path]:
    """The Arrow streams of a folder of rows, in the order of the rows."""
    return [path / entry["filename"] for entry in json.loads((path / "state.json").read_text())["_data_files"]]


def link(source: Path, target: Path) -> None:
    """Put a file that never changes under a second name: a hard link, or a copy where the file system has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
