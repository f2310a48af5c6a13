"""The gate between a submission and training: a look-up for selected rows, a fresh check of rewritten ones."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from functools import cached_property

from pydantic import BaseModel, ConfigDict

from curation_env.audit.index import AuditIndex, Finding
from curation_env.audit.rules import KINDS, Action, AuditRules, Kind
from curation_env.audit.text import segments
from curation_env.errors import TaskMismatch
from curation_env.pool import Conversation, Pool, canonical_json
from curation_env.submission import Submission

SHOWN = 5  # rows that a rejection's message names; the certificate has all


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Count(_Record):
    """Rows of the submission with one kind of finding for one benchmark, beside what chance would give."""

    benchmark: str
    kind: Kind
    action: Action
    rows: int
    pool_rows: int
    expected: float  # rows that a random submission of this size would show


class Rejected(_Record):
    """A row that may not be trained on, by the agent's own name for it. Items are never named."""

    id: str
    kinds: tuple[Kind, ...]
    rewritten: bool


class Certificate(_Record):
    """What the audit found in one submission; equal submissions get equal certificates."""

    version: int = 1
    pool: str
    suite: str
    rules: str
    submission: str
    rows: int
    rewrites: int
    passed: bool
    counts: tuple[Count, ...]
    rejected: tuple[Rejected, ...]

    def canonical(self) -> str:
        """One text for one certificate: JSON with sorted keys and no spaces."""
        return canonical_json(self.model_dump(mode="json"))

    @cached_property
    def digest(self) -> str:
        """blake2b-128 of the canonical JSON, in hex."""
        return hashlib.blake2b(self.canonical().encode(), digest_size=16).hexdigest()

    @property
    def totals(self) -> dict[str, int]:
        """Rows with a finding by kind, summed over benchmarks, zeros included: `info["audit/<kind>"]`."""
        totals = dict.fromkeys(map(str, KINDS), 0)
        for count in self.counts:
            totals[count.kind] += count.rows
        return totals

    @property
    def reason(self) -> str:
        """What to tell the agent; empty when the submission passed."""
        if self.passed:
            return ""
        shown = "; ".join(f"{row.id} ({', '.join(row.kinds)})" for row in self.rejected[:SHOWN])
        more = f" and {len(self.rejected) - SHOWN:,} more" if len(self.rejected) > SHOWN else ""
        rewritten = any(row.rewritten for row in self.rejected)
        remedy = "leave them out, or rewrite from their own content only" if rewritten else "leave them out"
        return f"{len(self.rejected):,} rows overlap with the evaluation: {shown}{more}. To pass, {remedy}."


def audit(
    submission: Submission,
    index: AuditIndex,
    pool: Pool,
    rules: AuditRules | None = None,
    suite: str | None = None,
) -> Certificate:
    """Audit a validated submission.

    Args:
        submission: Rows and rewrites; the order in which they were selected doesn't matter.
        index: The pool's index against the suite.
        pool: The pool, or the agent's view of it.
        rules: Rules to hold the submission to; those of the index when left out.
        suite: Digest of the items that are evaluated (`audit.items.suite_digest`); those of the index when left out.

    Raises:
        TaskMismatch: The index was built for another pool or suite, or with other rules.
    """
    if index.meta["pool"] != pool.hash:
        raise TaskMismatch(f"the audit index {index.path} is of another pool than {pool.path}: prepare the task again")
    if rules is not None and rules.digest != index.rules.digest:
        raise TaskMismatch(f"the audit index {index.path} was built with other rules: prepare the task again")
    if suite is not None and suite != index.meta["suite"]:
        raise TaskMismatch(f"the audit index {index.path} is of another suite: prepare the task again")
    findings: list[Finding] = []
    for id_ in submission.counts:
        if id_ in submission.rewrites:
            findings += _audit_rewrite(id_, submission.rewrites[id_], index)
        else:
            findings += index.blocked.get(id_, ())
            findings += index.noted.get(id_, ())
    rejected: dict[str, set[Kind]] = defaultdict(set)
    rows: dict[tuple[str, Kind, Action], set[str]] = defaultdict(set)
    for finding in findings:
        rows[finding.benchmark, finding.kind, finding.action].add(finding.id)
        if finding.action == "block":
            rejected[finding.id].add(finding.kind)
    share = len(submission.ids) / index.meta["rows"]
    counts = []
    for (benchmark, kind, action), ids in sorted(rows.items()):
        base = index.base_rates.get((benchmark, kind), 0)
        counts.append(
            Count(
                benchmark=benchmark,
                kind=kind,
                action=action,
                rows=len(ids),
                pool_rows=base,
                expected=round(base * share, 3),
            )
        )
    return Certificate(
        pool=index.meta["pool"],
        suite=index.meta["suite"],
        rules=index.rules.digest,
        submission=submission.digest,
        rows=len(submission.ids),
        rewrites=len(submission.rewrites),
        passed=not rejected,
        counts=tuple(counts),
        rejected=tuple(
            Rejected(id=id_, kinds=tuple(sorted(kinds)), rewritten=id_ in submission.rewrites)
            for id_, kinds in sorted(rejected.items())
        ),
    )


def _audit_rewrite(id_: str, conversation: Conversation, index: AuditIndex) -> list[Finding]:
    """Findings of a rewritten row: what its picture shares with items still holds, its new text is compared afresh.

    Text that a selected row may hold (a template over another picture) a rewritten one may hold too.
    """

    def finding(item: int, kind: Kind, how: str) -> Finding:
        benchmark, number = index.items[item]
        return Finding(id_, benchmark, number, kind, how, index.rules.action(benchmark, kind))

    pieces = segments(conversation)
    found: dict[int, Finding] = {}
    for match in index.texts.match(pieces):
        how = "exact" if match.exact else "near"
        plain = finding(match.item, match.field, how)
        found[match.item] = finding(match.item, "rewrite", how) if plain.action == "block" else plain
    for item in index.image_items(id_):
        paired = index.texts.paired(item, pieces) is not None
        found[item] = finding(item, "rewrite" if paired else "image", "paired" if paired else "near")
    return list(found.values())
