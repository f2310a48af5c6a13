"""A shard: some thousand records made rows of one Arrow file, by a worker process, as a whole or not at all.

A shard is four files: `<name>.arrow` (rows), `<name>.npy` (image digests), `<name>.jsonl` (what was wrong or odd), and,
written last, `<name>.json` (`Shard`), which says that the others are whole.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ValidationError

from curation_env.ingest.images import find_image
from curation_env.ingest.records import Record
from curation_env.pool import image_digest, link

#: Raised when a shard of an older version would hold other rows.
FORMAT = 1
ROWS = 4000  # records of a shard: 600 MB of COCO's images, a few seconds of work
_BATCH_ROWS, _BATCH_BYTES = 256, 32 << 20  # of an Arrow batch, whichever is less: what a worker holds in memory
_ENDINGS = (".arrow", ".npy", ".jsonl")


class Job(NamedTuple):
    """A shard to be made.

    Attributes:
        name: Its files' name in the folder.
        ids: Row id of each record, empty where the record has a fault.
        fingerprint: Of the records: a shard that was made of the same ones is not made again.
        end: Bytes of the file of records that were read when its last record was.
    """

    name: str
    records: list[Record]
    ids: list[str]
    fingerprint: str
    end: int


class Shard(BaseModel):
    """What is known of a finished shard.

    Attributes:
        bytes: Size of its Arrow file.
        rows: Rows by source.
        faults: Records that gave no row, by source and reason.
        notes: Rows that something is odd about, by source and what.
    """

    format: int = FORMAT
    name: str
    fingerprint: str
    bytes: int
    rows: dict[str, int]
    faults: dict[str, dict[str, int]]
    notes: dict[str, dict[str, int]]


def fingerprint(records: list[Record], ids: list[str]) -> str:
    """What tells one list of records from another."""
    hasher = hashlib.blake2b(digest_size=16)
    for record, id_ in zip(records, ids, strict=True):
        hasher.update(f"{record.number} {id_} {record.fault}\n".encode(errors="replace"))
    return hasher.hexdigest()


def finished(folder: Path, job: Job) -> Shard | None:
    """The shard in a folder, if it is whole and of the job's records."""
    try:
        shard = Shard.model_validate_json((folder / f"{job.name}.json").read_text())
        same = (shard.format, shard.fingerprint) == (FORMAT, job.fingerprint)
        whole = (folder / f"{job.name}.arrow").stat().st_size == shard.bytes
    except (OSError, ValidationError):
        return None
    return shard if same and whole else None


def adopt(source: Path, arrow: Path, folder: Path, shard: Shard) -> None:
    """Put a finished shard of an earlier pool into a folder: its Arrow file at `arrow`, its others in `source`."""
    for ending in (*_ENDINGS, ".json"):
        target = folder / f"{shard.name}{ending}"
        target.unlink(missing_ok=True)
        link(arrow if ending == ".arrow" else source / target.name, target)


def write_shard(folder: Path, images: Path, schema: pa.Schema, job: Job) -> Shard:
    """Make a shard in a folder; what a killed worker left of it is overwritten.

    The schema is given, because `datasets`, which knows it, would double a worker's memory.
    """
    made = _Rows(images, job)
    partial = {ending: folder / f"{job.name}{ending}.partial" for ending in (*_ENDINGS, ".json")}
    for path in partial.values():
        path.unlink(missing_ok=True)
    with pa.OSFile(str(partial[".arrow"]), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for batch in made.batches():
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
    with partial[".npy"].open("wb") as stream:
        np.save(stream, np.frombuffer(b"".join(made.digests), np.uint8).reshape(-1, 16))
    partial[".jsonl"].write_text("".join(json.dumps(line) + "\n" for line in made.report))
    shard = Shard(
        name=job.name,
        fingerprint=job.fingerprint,
        bytes=partial[".arrow"].stat().st_size,
        rows=made.rows,
        faults=made.faults,
        notes=made.notes,
    )
    partial[".json"].write_text(shard.model_dump_json())
    for ending, path in partial.items():  # the last one says that all are there, so the others are on disk before it
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
        path.chmod(0o444)  # pools and views share the file
        os.replace(path, folder / f"{job.name}{ending}")
    return shard


class _NoRow(Exception):
    """A record can't become a row, for a reason that is told."""


class _Rows:
    """Rows of a job's records, and what is learnt on the way."""

    def __init__(self, images: Path, job: Job) -> None:
        self._images, self._job = images, job
        self.digests: list[bytes] = []
        self.report: list[dict[str, Any]] = []
        self.rows: Counter[str] = Counter()
        self.faults: dict[str, dict[str, int]] = {}
        self.notes: dict[str, dict[str, int]] = {}

    def batches(self) -> Iterator[list[dict[str, Any]]]:
        batch: list[dict[str, Any]] = []
        size = 0
        for record, id_ in zip(self._job.records, self._job.ids, strict=True):
            try:
                image = self._image(record, id_)
            except _NoRow as error:
                self._add(self.faults, record, id_, str(error), kept=False)
                continue
            for note in record.notes:
                self._note(record, id_, note)
            data = image["bytes"] if image else None
            self.digests.append(image_digest(data))
            self.rows[record.source] += 1
            batch.append({"id": id_, "source": record.source, "image": image, "conversation": record.conversation})
            size += len(data or b"")
            if len(batch) == _BATCH_ROWS or size >= _BATCH_BYTES:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    def _image(self, record: Record, id_: str) -> dict[str, Any] | None:
        """The image cell of a row; `_NoRow` says why there can't be one."""
        if record.fault:
            raise _NoRow(f"malformed: {record.fault}")
        if record.image is None:
            return None
        data, check = find_image(self._images, record.image)
        if data is None:
            raise _NoRow(check.fault)
        if check.note:
            self._note(record, id_, check.note)
        return {"bytes": data, "path": record.image}

    def _note(self, record: Record, id_: str, text: str) -> None:
        self._add(self.notes, record, id_, text, kept=True)

    def _add(self, counts: dict[str, dict[str, int]], record: Record, id_: str, text: str, *, kept: bool) -> None:
        kind, _, detail = text.partition(": ")
        counts.setdefault(record.source, Counter())[kind] += 1
        line = {"record": record.number, "name": record.name, "id": id_, "source": record.source, "image": record.image}
        self.report.append({**line, "kept": kept, "what": kind, "detail": detail})
