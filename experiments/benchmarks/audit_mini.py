"""Recall of the audit per kind of planted leak, and clean rows blocked by mistake, on worlds of the miniature.

    python experiments/benchmarks/audit_mini.py                  # world 0 and the five test worlds
    python experiments/benchmarks/audit_mini.py --worlds 0 7 --scale nano --json audit.json

The truth file says which rows are leaks; the audit never reads it. Seconds are of one process, CPU time. A second table
takes every picture of the suite: altered copies that must be found, and pictures that must not.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from curation_env.audit.gate import audit
from curation_env.audit.image import ImageIndex
from curation_env.audit.index import AuditIndex, build_index
from curation_env.audit.rules import as_rules
from curation_env.audit.view import write_view
from curation_env.mini import language
from curation_env.mini.pool import ALTERATIONS, build_pool
from curation_env.mini.render import Look, alter, encode_png, pixels
from curation_env.mini.suite import build_suite, suite_items
from curation_env.mini.world import SCALES, TEST_WORLDS, Scale
from curation_env.pool import Pool
from curation_env.submission import Submission
from curation_env.task import Task


def measure(world: int, scale: Scale, task: Task, folder: Path) -> dict:
    """Build one world, audit it, and compare with the truth."""
    pool_dir = folder / f"pool-{world}"
    build_pool(world, pool_dir, scale)
    pool = Pool.open(pool_dir)
    started = time.process_time()
    build_index(pool, folder / "suite", task.suite_config, task.audit_config, folder / "view" / "audit")
    built = time.process_time() - started
    index = AuditIndex.open(folder / "view" / "audit")
    write_view(pool, index, folder / "view")
    view = Pool.open(folder / "view")
    chosen = np.random.default_rng(0).choice(len(view), min(1000, len(view) // 2), replace=False)
    submission = Submission.of([view.ids[k] for k in chosen])
    _ = index.base_rates, submission.digest
    started = time.perf_counter()
    passed = audit(submission, index, view).passed
    gate = time.perf_counter() - started
    planted: Counter[str] = Counter()
    found: Counter[str] = Counter()
    clean = wrong = 0
    for row in pq.read_table(pool_dir / "truth.parquet").to_pylist():
        blocked = row["id"] in index.blocked
        if row["leak_of"]:
            planted[row["leak_kind"]] += 1
            found[row["leak_kind"]] += blocked
        else:
            clean += 1
            wrong += blocked
    return {
        "world": world,
        "rows": len(pool),
        "items": index.meta["items"],
        "planted": dict(planted),
        "found": {kind: found[kind] for kind in planted},
        "clean": clean,
        "clean_blocked": wrong,
        "build_seconds": round(built, 2),
        "gate_ms": round(1000 * gate, 2),
        "gate_rows": len(submission.ids),
        "passed": passed,
    }


def measure_pictures(scale: Scale, task: Task) -> dict[str, tuple[int, int]]:
    """How many altered copies match the right item, and how many other pictures match any; each of how many."""
    pictures = [item.picture for items in suite_items(scale).values() for item in items if item.image_of is None]
    index = ImageIndex([(k, encode_png(pixels(p))) for k, p in enumerate(pictures)], as_rules(task.audit_config).image)
    rng = random.Random(0)
    figures = {}
    for kind in ALTERATIONS:
        found = index.match([encode_png(alter(pixels(p), kind, rng)) for p in pictures for _ in range(3)])
        right = [k // 3 in {match.item for match in matches} for k, matches in enumerate(found)]
        figures[f"altered copy: {kind}"] = (sum(right), len(right))
    draws = (language.draw_scene, language.draw_sign, language.draw_digits, language.draw_chart)
    others = {
        "clean picture": [draw(rng, False) for draw in draws for _ in range(len(pictures))],
        "same scene, other background and place": [
            dataclasses.replace(p, look=Look.draw(rng)) for p in pictures for _ in range(3)
        ],
    }
    for kind, drawn in others.items():
        found = index.match([encode_png(pixels(p)) for p in drawn])
        figures[kind] = (sum(map(bool, found)), len(drawn))
    return figures


def show(results: list[dict]) -> None:
    """Print one row per leak kind, one column per world."""
    table = Table("planted leak", *(f"world {r['world']}" for r in results), "recall")
    for kind in sorted({kind for r in results for kind in r["planted"]}):
        found, planted = (sum(r[what].get(kind, 0) for r in results) for what in ("found", "planted"))
        cells = (f"{r['found'].get(kind, 0)}/{r['planted'].get(kind, 0)}" for r in results)
        table.add_row(kind, *cells, f"{found / planted:.3f}")
    table.add_section()
    clean, wrong = (sum(r[what] for r in results) for what in ("clean", "clean_blocked"))
    rate = f"1 in {clean / wrong:,.0f}" if wrong else f"0 of {clean:,}"
    table.add_row("clean rows blocked", *(f"{r['clean_blocked']}/{r['clean']:,}" for r in results), rate)
    table.add_row("index, CPU s", *(f"{r['build_seconds']:.1f}" for r in results), "")
    table.add_row(f"gate, {results[0]['gate_rows']:,} rows, ms", *(f"{r['gate_ms']:.1f}" for r in results), "")
    Console(width=160).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, nargs="+", default=[0, *TEST_WORLDS[:5]])
    parser.add_argument("--scale", choices=sorted(SCALES), default="mini")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    options = parser.parse_args()
    scale = SCALES[options.scale]
    task = Task.load("mini")
    with tempfile.TemporaryDirectory() as folder:
        build_suite(Path(folder) / "suite", scale)
        results = [measure(world, scale, task, Path(folder)) for world in options.worlds]
    show(results)
    pictures = measure_pictures(scale, task)
    table = Table("picture", "matched", "of")
    for kind, (matched, of) in pictures.items():
        table.add_row(kind, f"{matched:,}", f"{of:,}")
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps({"worlds": results, "pictures": pictures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
