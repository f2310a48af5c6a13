"""Published lists of rows (ICONS-133K, ARDS-200K) on a pool: matched by the full record, never by `id` or place.

An `id` of LLaVA's file stands for several records, and a place depends on how the list's maker counted: both send most
of a list to other rows. A record's image path and conversation are what a row id is made of, so they name the row.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curation_env.errors import InvalidSetting
from curation_env.ingest.catalog import pool_key
from curation_env.ingest.records import JsonArray, Record, parse
from curation_env.ingest.report import read_faults
from curation_env.pool import Pool

if TYPE_CHECKING:
    from curation_env.task import Task


@dataclass
class Match:
    """What became of a list.

    Attributes:
        audited: Whether rows that the audit blocks were left out; before the task's view is made they can't be.
        records: Records of the list.
        ids: Row ids, in the list's order.
        lost: One entry for each record without a row: `record` (its place from 0), `name`, `image`, `reason`.
    """

    audited: bool
    records: int = 0
    ids: list[str] = field(default_factory=list)
    lost: list[dict[str, Any]] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Counts: records, matched, and lost by reason."""
        reasons = Counter(entry["reason"] for entry in self.lost)
        counts = {"records": self.records, "matched": len(self.ids), "lost": dict(reasons.most_common())}
        return {**counts, "audited": self.audited}

    def lines(self) -> list[str]:
        """The same for a person."""
        summary = self.summary()
        lines = [f"{summary['matched']:,} of {summary['records']:,} records are rows of the pool"]
        lines += [f"  {count:,} lost: {reason}" for reason, count in summary["lost"].items()]
        if not self.audited:
            lines.append("  rows that the audit blocks are among them: the task's view is not prepared")
        return lines

    def write(self, out: Path) -> Path:
        """Write the ids, one a line, and beside them the report, whose path is returned."""
        out.write_text("".join(f"{id_}\n" for id_ in self.ids))
        report = out.with_name(f"{out.name}.report.json")
        report.write_text(json.dumps({**self.summary(), "records_lost": self.lost}, indent=1) + "\n")
        return report


def match(task: Task, root: Path, file: Path) -> Match:
    """Find a list's records in a task's pool.

    Args:
        task: A task over a public pool.
        root: The data root.
        file: A JSON array of records as LLaVA's file has them.

    Raises:
        InvalidSetting: The file is no list of records: bare ids or places can't be mapped, and the message says why.
        MissingAssets: The pool is not prepared.
    """
    if task.pool.kind == "mini":
        raise InvalidSetting(f"task {task.name!r} has a generated pool: nobody has published a list of its rows")
    pool = Pool.open(root / "pools" / pool_key(task.pool))
    visible = _visible(task, root)
    explain = _explainer(pool)
    found = Match(audited=visible is not None)
    seen: Counter[str] = Counter()
    for raw in JsonArray(file):
        record = parse(_full(raw, file), found.records, task.pool.kind)
        found.records += 1
        repeat = seen[record.base_id]
        seen[record.base_id] += 1
        id_ = f"{record.base_id}-{repeat}" if repeat else record.base_id
        if id_ not in pool.position:
            reason = explain(record, id_)
        elif visible is not None and id_ not in visible:
            reason = "blocked by the audit"
        else:
            found.ids.append(id_)
            continue
        place = {"record": record.number, "name": record.name, "image": record.image}
        found.lost.append({**place, "reason": reason})
    return found


def _full(raw: Any, file: Path) -> Any:
    """The value, if it holds a conversation."""
    if isinstance(raw, dict) and raw.get("conversations"):
        return raw
    what = f"records without conversations, such as {str(raw)[:80]}" if isinstance(raw, dict) else f"{str(raw)[:40]!r}"
    raise InvalidSetting(
        f"{file} lists {what}: a row is found by its image and conversation alone, because ids are shared by several"
        " records and places depend on how they were counted. Take the form of the list that has full records"
    )


def _visible(task: Task, root: Path) -> dict[str, int] | None:
    """Ids of the agent's view, None before it is made."""
    from curation_env.assets import audited, locate

    assets = locate(task, root)
    return Pool.open(assets.index.parent).position if audited(task, assets) else None


def _explainer(pool: Pool) -> Callable[[Record, str], str]:
    """Says why a record has no row."""

    @functools.cache
    def faults() -> dict[str, str]:
        return {line["id"]: line["what"] for line in read_faults(pool.path) if not line["kept"]}

    @functools.cache
    def images() -> set[str | None]:
        import pyarrow.compute as pc

        return set(pc.struct_field(pool.table.data.column("image"), "path").to_pylist())

    def explain(record: Record, id_: str) -> str:
        if record.fault:
            return f"malformed: {record.fault}"
        if id_ in faults():
            return f"left out of the pool: {faults()[id_]}"
        if record.base_id in pool.position or record.base_id in faults():
            return "a copy more than the pool has"
        if record.image is None:
            return "a text of no row"
        return "another conversation about an image of the pool" if record.image in images() else "an image of no row"

    return explain
