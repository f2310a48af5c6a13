"""Append-only files of JSON lines, on the disk when a call returns: the journal of a run and its sealed scores."""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from curation_env.errors import InfrastructureError

#: What the journal keeps of an action that was refused: it may hold anything, itself too.
TEXT_CHARS = 1_000_000
CUT_CHARS = 1_000
DEPTH = 16
ITEMS = 100_000


class LedgerError(InfrastructureError):
    """The record could not be written (a full or read-only disk) or is damaged; `details` has the cause."""

    code = "ledger"


def read_events(run_dir: str | Path) -> list[dict[str, Any]]:
    """The journal of a run, without its lock: the run may be going on.

    Raises:
        LedgerError: A line is damaged.
    """
    return Lines(Path(run_dir) / "journal.jsonl").read()


class Lines:
    """A file of JSON lines that is only ever appended to."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one line and sync it; NaN and infinities become null.

        Raises:
            LedgerError: It could not be written; the file is as it was.
        """
        line = (_json(record) + "\n").encode(errors="replace")
        try:
            new = not self.path.exists()
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            try:
                before = os.fstat(descriptor).st_size
                try:
                    if os.write(descriptor, line) != len(line):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    os.fsync(descriptor)
                except OSError:
                    os.ftruncate(descriptor, before)
                    raise
            finally:
                os.close(descriptor)
            if new:
                sync_folder(self.path.parent)
        except OSError as error:
            raise LedgerError(f"{self.path} can't be written: {error.strerror}") from error

    def read(self) -> list[dict[str, Any]]:
        """Every whole line. A last line without its end is one that is being written, or was when a crash came.

        Raises:
            LedgerError: A line is damaged.
        """
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return []
        records = []
        for number, line in enumerate(data.split(b"\n")[:-1], start=1):
            try:
                records.append(json.loads(line))
            except ValueError as error:
                raise LedgerError(f"{self.path}, line {number} is damaged: restore it from a copy") from error
        return records

    def repair(self) -> None:
        """Move a torn last line to a file beside this one."""
        if not self.path.exists():
            return
        with open(self.path, "r+b") as stream:
            data = stream.read()
            whole = data.rfind(b"\n") + 1
            tail = data[whole:]
            if not tail:
                return
            with open(self.path.with_suffix(".torn"), "ab") as torn:
                torn.write(tail + b"\n")
                os.fsync(torn.fileno())
            stream.truncate(whole)
            os.fsync(stream.fileno())


def _json(record: Mapping[str, Any]) -> str:
    try:
        return json.dumps(record, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError):  # rare, so no line pays for looking through it first
        return json.dumps(finite(record), allow_nan=False, ensure_ascii=False)


def finite(value: Any) -> Any:
    """The value with NaN and infinities as None: a journal that any JSON reader can read."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def plain(value: Any) -> Any:
    """An action, observation or info as the journal keeps it: JSON, and equal for equal values in any process.

    Numpy values become JSON's, NaN and infinities None, lone surrogates their escapes, integers beyond 64 bits hex.
    What only a refused action holds is cut short: texts of more than `TEXT_CHARS`, nesting deeper than `DEPTH`,
    everything after `ITEMS` items. An object that JSON has no word for is named by its type.
    """
    left = [ITEMS]

    def convert(item: Any, depth: int) -> Any:
        left[0] -= 1
        if left[0] < 0 or depth > DEPTH:
            return "..."
        if isinstance(item, (str, float, int, type(None))):  # almost all are: asked before what takes longer to ask
            return _scalar(item)
        if isinstance(item, Mapping):
            return {_key(convert(key, depth + 1)): convert(inner, depth + 1) for key, inner in _first(item, left[0])}
        if isinstance(item, np.ndarray):
            return convert(item.tolist(), depth) if item.size <= left[0] else f"<array of shape {item.shape}>"
        if isinstance(item, list | tuple):
            return [convert(inner, depth + 1) for inner in item[: left[0] + 1]]
        return _scalar(item)

    return convert(value, 0)


def _first(mapping: Mapping[Any, Any], count: int) -> Iterator[tuple[Any, Any]]:
    return itertools.islice(mapping.items(), max(count, 0))


def _key(key: Any) -> str:
    return key if isinstance(key, str) else str(key)


def _scalar(value: Any) -> Any:
    if type(value) is str and len(value) <= TEXT_CHARS and value.isascii():
        return value
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value) if abs(value) < 1 << 63 else _cut(hex(value))
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, str):
        return _cut(value[: TEXT_CHARS + 1].encode(errors="backslashreplace").decode(), len(value))
    if isinstance(value, bytes | bytearray):
        return repr(bytes(value[:CUT_CHARS]))
    return f"<{type(value).__module__}.{type(value).__qualname__}>"


def _cut(text: str, length: int | None = None) -> str:
    length = len(text) if length is None else length
    return text if max(length, len(text)) <= TEXT_CHARS else f"{text[:CUT_CHARS]}... ({length:,} characters)"


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
