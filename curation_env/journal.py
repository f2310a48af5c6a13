"""Append-only files of JSON lines, on the disk when a call returns: the journal of a run and its sealed scores."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from curation_env.errors import InfrastructureError


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
        line = (json.dumps(_plain(record), allow_nan=False, ensure_ascii=False) + "\n").encode(errors="replace")
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


def _plain(value: Any) -> Any:
    """The value with NaN and infinities as None: a journal that any JSON reader can read."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
