"""What of the public files became a pool, what did not and why: `report.json`, and `faults.jsonl` row by row."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from curation_env.ingest.shards import Shard

REPORT, FAULTS = "report.json", "faults.jsonl"
_SHOWN = 6  # sources that a line names


def write_report(
    folder: Path, shards: Sequence[Shard], key: str, made_of: dict[str, Any], reference: dict[str, int]
) -> dict[str, Any]:
    """Write both files of a pool that is in the making: `folder/shards` holds what its shards found.

    Returns:
        What `report.json` holds: `pool`, `made_of`, `rows`, `reference` (rows by source as published, or empty),
        `sources` (each with `rows`, `faults` and `notes` by what) and the sums `faults` and `notes`.
    """
    sources: dict[str, dict[str, Any]] = {}
    for shard in shards:
        for source, rows in shard.rows.items():
            _of(sources, source)["rows"] += rows
        for what in ("faults", "notes"):
            for source, counts in getattr(shard, what).items():
                _of(sources, source)[what].update(counts)
    report = {
        "pool": key,
        "made_of": made_of,
        "rows": sum(entry["rows"] for entry in sources.values()),
        "reference": reference,
        "faults": _sum(entry["faults"] for entry in sources.values()),
        "notes": _sum(entry["notes"] for entry in sources.values()),
        "sources": dict(sorted(sources.items())),
    }
    (folder / REPORT).write_text(json.dumps(report, indent=1) + "\n")
    with (folder / FAULTS).open("wb") as stream:
        for shard in shards:
            with (folder / "shards" / f"{shard.name}.jsonl").open("rb") as lines:
                shutil.copyfileobj(lines, stream)
    return report


def read_report(pool: Path) -> dict[str, Any]:
    """The report of a pool folder; empty where there is none."""
    try:
        found = json.loads((pool / REPORT).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def read_faults(pool: Path) -> Iterator[dict[str, Any]]:
    """Lines of a pool's `faults.jsonl`: `record` (its place in the file), `name`, `id`, `source`, `image`, `kept`,
    `what` and `detail`."""
    with (pool / FAULTS).open() as lines:
        yield from map(json.loads, lines)


def coverage(report: dict[str, Any]) -> str:
    """How much of the published pool is there, in a line.

    Example:
        >>> coverage({"rows": 8, "reference": {"coco": 6, "vg": 4}, "faults": {"missing": 2},
        ...           "sources": {"coco": {"faults": {}}, "vg": {"faults": {"missing": 2}}}})
        '8 of 10 rows; 2 missing: vg 2'
    """
    whole = sum(report["reference"].values()) or report["rows"] + sum(report["faults"].values())
    parts = [f"{report['rows']:,} of {whole:,} rows"]
    for fault, count in Counter(report["faults"]).most_common():
        of = Counter({source: entry["faults"].get(fault, 0) for source, entry in report["sources"].items()})
        shown = [f"{source} {n:,}" for source, n in of.most_common(_SHOWN) if n]
        more = ["..."] if sum(n > 0 for n in of.values()) > _SHOWN else []
        parts.append(f"{count:,} {fault}: {', '.join(shown + more)}")
    return "; ".join(parts)


def differences(report: dict[str, Any]) -> list[str]:
    """Sources whose records are not as many as published: another release, or a file that was changed."""
    if not report["reference"]:
        return []
    found = {name: entry["rows"] + sum(entry["faults"].values()) for name, entry in report["sources"].items()}
    names = sorted(found.keys() | report["reference"].keys())
    counts = ((name, found.get(name, 0), report["reference"].get(name, 0)) for name in names)
    return [f"{name}: {have:,} records, {want:,} as published" for name, have, want in counts if have != want]


def _of(sources: dict[str, dict[str, Any]], source: str) -> dict[str, Any]:
    return sources.setdefault(source, {"rows": 0, "faults": Counter(), "notes": Counter()})


def _sum(counts: Iterable[Counter[str]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return dict(sorted(total.items()))
