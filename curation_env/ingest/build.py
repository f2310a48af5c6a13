"""From a folder of public files to pool folders: records streamed, shards made by worker processes, pools published.

One pass makes both versions of a pool that has rows without images: those rows have shards of their own, so the version
without them is the same files under other names. Pool order is that of the file, rows with images first.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any

import numpy as np

from curation_env.errors import InvalidSetting, WorkerDied
from curation_env.ingest.catalog import Catalog, pool_key
from curation_env.ingest.records import JsonArray, Record, parse
from curation_env.ingest.report import write_report
from curation_env.ingest.shards import ROWS, Job, Shard, adopt, fingerprint, finished, write_shard
from curation_env.pool import features, finish_rows, link, publish
from curation_env.task import PublicKind, PublicPool

Progress = Callable[[dict[str, Any]], None]


def ingest(
    kind: PublicKind,
    source: Path,
    pools: Path,
    on_progress: Progress | None = None,
    *,
    workers: int | None = None,
    rows_per_shard: int = ROWS,
) -> list[Path]:
    """Make the pools of one kind of public files.

    Shards that an interrupted call finished, and those of an earlier pool without a fault in them, are taken as they
    are: calling it again goes on, or looks again for what was missing. The caller sees that nobody else makes them.

    Args:
        kind: Name of a file in `conf/pool/`.
        source: The folder of the public files.
        pools: The folder of pools.
        on_progress: Called with {"stage", "done", "total", "unit", "rows", "seconds_left"}.
        workers: Worker processes; default: what `processors` says.
        rows_per_shard: Records of a shard.

    Returns:
        Folders of the pools: with all rows and, where some have no image, without those.

    Raises:
        MissingAssets: The folder lacks the records, or all images.
        InvalidSetting: The records are not what they should be, or none of them gave a row.
        WorkerDied: A worker process was killed; what was finished is kept.
    """
    catalog = Catalog.load(kind)
    catalog.check(source)
    work = pools / f".{kind}.ingest"
    work.mkdir(parents=True, exist_ok=True)
    records = JsonArray(source / catalog.records)
    earlier = pools / pool_key(PublicPool(kind=kind, text=True))
    jobs = _Jobs(records, kind, rows_per_shard)
    shards = _make_shards(jobs, work, earlier, source / catalog.images, on_progress, workers or processors())
    made_of = {"file": catalog.records, "bytes": records.size, "sha256": records.sha256, "records": jobs.records}
    if not any(sum(shard.rows.values()) for shard in shards):
        reasons = Counter({reason: n for shard in shards for of in shard.faults.values() for reason, n in of.items()})
        raise InvalidSetting(f"no record of {records.path} gave a row: {dict(reasons) or 'it is empty'}")
    # Shards of rows with images first, each kind in the file's order.
    images, text = ([s for s in sorted(shards, key=_name) if s.name.startswith(k)] for k in ("image", "text"))
    versions = {True: images + text, **({False: images} if text else {})}
    paths = []
    for with_text, chosen in versions.items():
        version = PublicPool(kind=kind, text=with_text)
        paths.append(_publish(work, chosen, pools / pool_key(version), made_of, catalog.reference(version)))
    shutil.rmtree(work)
    return paths


class _Jobs:
    """Shards to be made of a file's records; `records` counts those that were read so far."""

    def __init__(self, array: JsonArray, kind: str, rows: int) -> None:
        self.array = array
        self.records = 0
        self._kind, self._rows = kind, rows

    def __iter__(self) -> Iterator[Job]:
        waiting: dict[str, list[tuple[Record, str]]] = {"image": [], "text": []}
        made: Counter[str] = Counter()
        seen: Counter[bytes] = Counter()

        def job(group: str) -> Job:
            records, ids = map(list, zip(*waiting[group], strict=True))
            waiting[group] = []
            made[group] += 1
            return Job(f"{group}-{made[group] - 1:05d}", records, ids, fingerprint(records, ids), self.array.done)

        for raw in self.array:
            record = parse(raw, self.records, self._kind)
            self.records += 1
            group = "text" if record.image is None else "image"
            waiting[group].append((record, _numbered(record.base_id, seen)))
            if len(waiting[group]) == self._rows:
                yield job(group)
        for group in waiting:
            if waiting[group]:
                yield job(group)


def _numbered(base: str, seen: Counter[bytes]) -> str:
    """A row's id: repeats of a record are numbered in the file's order, whether or not their images are there."""
    if not base:
        return ""
    key = bytes.fromhex(base)
    repeat = seen[key]
    seen[key] += 1
    return f"{base}-{repeat}" if repeat else base


def _name(shard: Shard) -> str:
    return shard.name


def processors() -> int:
    """Worker processes: one for each processor that this process may use, and no more than memory for 16."""
    return min(16, len(os.sched_getaffinity(0)))


def _make_shards(
    jobs: _Jobs, work: Path, earlier: Path, images: Path, on_progress: Progress | None, workers: int
) -> list[Shard]:
    """Make or take up every shard; a few jobs a worker are in memory at a time."""
    report = _Reporter(jobs.array, on_progress)
    schema = features(tokens=False).arrow_schema
    pending: dict[Future[Shard], Job] = {}
    shards: list[Shard] = []

    def collect(left: int) -> None:
        while len(pending) > left:
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                shards.append(future.result())
                report(pending.pop(future), shards[-1])

    executor = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=stay_with_parent)
    try:
        for job in jobs:
            shard = finished(work, job) or _adopted(earlier, work, job)
            if shard is not None:
                shards.append(shard)
                report(job, shard)
                continue
            pending[executor.submit(write_shard, work, images, schema, job)] = job
            collect(2 * workers - 1)
        collect(0)
    except BrokenProcessPool as error:
        raise WorkerDied(
            "a process that makes the pool was killed, perhaps for want of memory: call prepare again, it goes on"
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)
    return shards


def _adopted(earlier: Path, work: Path, job: Job) -> Shard | None:
    """The job's shard of an earlier pool, unless a fault in it may be gone by now."""
    try:
        places = json.loads((earlier / "shards" / "files.json").read_text())
        arrow = earlier / "rows" / places[job.name]
        shard = Shard.model_validate_json((earlier / "shards" / f"{job.name}.json").read_text())
    except (OSError, ValueError, KeyError):
        return None
    if shard.faults:
        return None
    adopt(earlier / "shards", arrow, work, shard)
    return finished(work, job)


def stay_with_parent() -> None:
    """Of a worker: an interrupt is the parent's to answer, and a parent that is gone leaves no worker behind."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None

    def follow() -> None:
        wait_for([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


class _Reporter:
    """Progress in megabytes of the file of records: how many records it has is known at its end alone."""

    def __init__(self, array: JsonArray, on_progress: Progress | None) -> None:
        self._array, self._on_progress = array, on_progress
        self._started = time.monotonic()
        self._done = self._rows = 0

    def __call__(self, job: Job, shard: Shard) -> None:
        if self._on_progress is None:
            return
        self._done, self._rows = max(self._done, job.end), self._rows + sum(shard.rows.values())
        spent = time.monotonic() - self._started
        left = spent * (self._array.size - self._done) / max(self._done, 1)
        self._on_progress(
            {
                "stage": "prepare pool",
                "done": self._done // 1_000_000,
                "total": self._array.size // 1_000_000,
                "unit": "MB of records",
                "rows": self._rows,
                "seconds_left": round(left, 1),
            }
        )


def _publish(work: Path, shards: list[Shard], path: Path, made_of: dict[str, Any], reference: dict[str, int]) -> Path:
    """Make a pool folder of finished shards, beside its place, and put it there; an equal pool is left as it is."""
    import datasets

    scratch = path.with_name(f".{path.name}.{os.getpid()}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    for folder in ("rows", "shards"):
        (scratch / folder).mkdir(parents=True)
    streams = []
    for shard in shards:
        streams.append(scratch / "rows" / f"{shard.name}.arrow")
        link(work / streams[-1].name, streams[-1])
        for ending in (".json", ".npy", ".jsonl"):
            link(work / f"{shard.name}{ending}", scratch / "shards" / f"{shard.name}{ending}")
    digests = np.concatenate([np.load(work / f"{shard.name}.npy") for shard in shards])
    np.save(scratch / "image_digests.npy", digests)
    pool_hash = _hash(streams, digests)
    finish_rows(scratch / "rows", streams, features(tokens=False))
    names = (f"data-{k:05d}-of-{len(shards):05d}.arrow" for k in range(len(shards)))
    files = {shard.name: name for shard, name in zip(shards, names, strict=True)}
    (scratch / "shards" / "files.json").write_text(json.dumps(files))
    report = write_report(scratch, shards, path.name, made_of, reference)
    meta = {"key": path.name, "hash": pool_hash, "rows": report["rows"], "made_of": made_of}
    meta["datasets"] = datasets.__version__
    (scratch / "meta.json").write_text(json.dumps(meta, indent=1, sort_keys=True))
    if path.exists():  # moved first: a folder that is half removed must not pass for a pool
        outdated = path.with_name(f".{path.name}.{os.getpid()}.outdated.partial")
        path.rename(outdated)
        shutil.rmtree(outdated, ignore_errors=True)
    publish(scratch, path)
    return path


def _hash(streams: Iterable[Path], digests: np.ndarray) -> str:
    """sha256 over ids and image digests in order, in hex."""
    import pyarrow as pa

    hasher = hashlib.sha256()
    position = 0
    for stream in streams:
        with pa.memory_map(str(stream)) as source:
            ids = pa.ipc.open_stream(source).read_all()["id"].to_pylist()
        for id_ in ids:
            hasher.update(f"{id_} {digests[position].tobytes().hex()}\n".encode())
            position += 1
    return hasher.hexdigest()
