"""Speed and memory of `curation-env prepare --source`: a synthetic source of N rows, made a pool in a fresh process.

    python experiments/benchmarks/ingest.py                                      # 665,298 rows, small images
    python experiments/benchmarks/ingest.py --rows 20000 --size 640x480 --rest   # images of COCO's size, and the rest

The source has the shares of LLaVA's folders, its record sizes (1.5 kB a record) and some faults: images that are
missing, cut off or GIFs named .jpg. Pictures are a few hundred; up to 50,000 rows each has a file of its own with other
bytes at its end, above that they are hard links. Reading comes from memory: what is measured is the work. Memory is the
sum over all processes, sampled ten times a second: what they share counts as often as they share it.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import resource
import tempfile
import threading
import time
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image
from rich.console import Console
from rich.table import Table

from curation_env.ingest.build import ingest
from curation_env.ingest.catalog import TEXT, Catalog
from curation_env.ingest.report import coverage, read_report

PICTURES = 300
DISTINCT = 50_000
#: An image folder of each source.
FOLDERS = {name.partition("/")[0]: name for name in reversed(Catalog.load("llava").public) if "/" in name}


def make_pictures(folder: Path, width: int, height: int) -> list[Path]:
    """JPEGs of soft noise, about as large as photographs of their size."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    paths = []
    for k in range(PICTURES):
        coarse = rng.integers(0, 256, (max(2, height // 6), max(2, width // 6), 3), np.uint8)
        image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=90)
        paths.append(folder / f"{k}.jpg")
        paths[-1].write_bytes(stream.getvalue())
    data = paths[0].read_bytes()
    (folder / "cut.jpg").write_bytes(data[: len(data) // 2])
    Image.new("RGB", (width, height), (200, 30, 30)).save(folder / "really.gif")
    return paths


def make_source(folder: Path, rows: int, width: int, height: int) -> None:
    """Write the records and link the images; one row in 500 has a fault."""
    rng = random.Random(0)
    shares = Catalog.load("llava").rows
    sources = rng.choices(list(shares), list(shares.values()), k=rows)
    pictures = make_pictures(folder / "pictures", width, height)
    faults = [None, folder / "pictures" / "cut.jpg", folder / "pictures" / "really.gif"]
    for path in FOLDERS.values():
        (folder / path).mkdir(parents=True)
    (folder / "vg" / "VG_100K_2").mkdir()
    words = [f"w{k:04x}" for k in range(4000)]
    lines = [" ".join(rng.choices(words, k=12)) for _ in range(5000)]
    with (folder / "llava_v1_5_mix665k.json").open("w") as stream:
        stream.write("[")
        for number, source in enumerate(sources):
            texts = [" ".join(rng.choices(lines, k=3)) for _ in range(6)]
            record: dict[str, Any] = {"id": f"{number % (rows // 2):012d}"}
            if source != TEXT:
                record["image"] = f"{FOLDERS[source]}/{number:012d}.jpg"
                texts[0] = f"<image>\n{texts[0]}"
                picture = faults[number // 500 % 3] if number % 500 == 0 else pictures[number % PICTURES]
                if picture is not None and rows > DISTINCT:
                    os.link(picture, folder / record["image"])
                elif picture is not None:
                    (folder / record["image"]).write_bytes(picture.read_bytes() + number.to_bytes(4, "big"))
            record["conversations"] = [
                {"from": "human" if k % 2 == 0 else "gpt", "value": text} for k, text in enumerate(texts)
            ]
            stream.write(("," if number else "") + json.dumps(record))
        stream.write("]")


def watched(work: Any, *arguments: Any) -> dict[str, float]:
    """Run a function in a fresh process: seconds, CPU seconds, largest memory (GB) of it and its children together."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = get_context("spawn").Process(target=work, args=arguments)
    started = time.perf_counter()
    process.start()
    peak, done = [0.0, 0.0], threading.Event()

    def sample() -> None:
        while not done.wait(0.1):
            sizes = [size for each in _family(process.pid) for size in _sizes(each)]
            peak[0] = max(peak[0], sum(total for total, _ in sizes) / 1e9)
            peak[1] = max(peak[1], sum(own for _, own in sizes) / 1e9)

    sampler = threading.Thread(target=sample)
    sampler.start()
    process.join()
    seconds = time.perf_counter() - started
    done.set()
    sampler.join()
    if process.exitcode:
        raise SystemExit(f"{work.__name__} ended with exit code {process.exitcode}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": seconds, "cpu_seconds": cpu, "resident_gb": peak[0], "own_gb": peak[1]}


def _family(pid: int | None) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _sizes(process: psutil.Process) -> Iterator[tuple[int, int]]:
    """Resident bytes, and those that no file holds."""
    try:
        info = process.memory_info()
        yield info.rss, info.rss - info.shared
    except psutil.NoSuchProcess:
        return


def make_pool(source: Path, pools: Path, workers: int) -> None:
    ingest("llava", source, pools, workers=workers)


def make_index(pool: Path, suite: Path, out: Path) -> None:
    """The audit of the pool against the miniature's suite: every image is decoded."""
    from curation_env.audit.index import build_index
    from curation_env.mini.suite import build_suite
    from curation_env.pool import Pool
    from curation_env.task import Task

    task = Task.load("mini")
    build_suite(suite)  # a few seconds of it
    build_index(Pool.open(pool), suite, task.suite_config, task.audit_config, out)


def count(pool: Path) -> None:
    """Supervised tokens under the miniature's student."""
    from curation_env.assets import student_dir
    from curation_env.ingest.tokens import count_tokens
    from curation_env.training.recipe import Recipe

    count_tokens(pool / "rows", student_dir("mini-llava"), Recipe.load("mini-v1"), workers=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=665_298)
    parser.add_argument("--size", default="32x32", help="of the images, in pixels")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rest", action="store_true", help="count tokens and build the audit index as well")
    parser.add_argument("--dir", type=Path, help="where the source and the pool are made, and removed; default: /tmp")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    options = parser.parse_args()
    width, height = map(int, options.size.split("x"))
    with tempfile.TemporaryDirectory(dir=options.dir) as name:
        folder = Path(name)
        make_source(folder / "source", options.rows, width, height)
        picture = (folder / "source" / "pictures" / "0.jpg").stat().st_size
        figures = {"pool": watched(make_pool, folder / "source", folder / "pools", options.workers)}
        pool = folder / "pools" / "llava"
        report = read_report(pool)
        if options.rest:
            figures["token counts"] = watched(count, pool)
            figures["audit index"] = watched(make_index, pool, folder / "suite", folder / "audit")
    table = Table("step", "seconds", "rows a second", "rows a CPU second", "memory, GB", "of it not files, GB")
    for step, found in figures.items():
        rates = [f"{options.rows / found[of]:,.0f}" for of in ("seconds", "cpu_seconds")]
        table.add_row(step, f"{found['seconds']:.1f}", *rates, f"{found['resident_gb']:.2f}", f"{found['own_gb']:.2f}")
    Console(width=120).print(table)
    print(f"{options.rows:,} records, images of {options.size} ({picture:,} bytes), {options.workers} processes")
    print(f"{coverage({**report, 'reference': {}})}; {report['notes']}")
    if options.json:
        options.json.write_text(json.dumps({"rows": options.rows, "size": options.size, **figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
