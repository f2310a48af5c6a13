"""The pool side of the audit: every row compared with every item once, when a task is prepared."""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curation_env.audit.items import Item, read_items, suite_digest, suite_files
from curation_env.audit.rules import Action, AuditRules, Kind, as_rules
from curation_env.audit.text import ItemText, Segment, Surprise, TextIndex, TextMatch, segments, text_key, words
from curation_env.errors import MissingAssets
from curation_env.pool import Conversation, Pool

if TYPE_CHECKING:
    from curation_env.audit.image import ImageMatch

#: Raised when an index of an older version would answer differently.
FORMAT = 1
BATCH = 1000

Progress = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Finding:
    """One row shares one thing with one item. `benchmark` and `index` stay on the host."""

    id: str
    benchmark: str
    index: str
    kind: Kind
    how: str  # bytes, pixels or near for an image, exact or near for a text, both joined by +
    action: Action


class AuditIndex:
    """What is known of a pool against a suite; made by `build_index`.

    Attributes:
        blocked: Findings of the rows that the agent's view leaves out, by row id.
        noted: Findings that warn or are expected, by row id.
        rules: The rules it was built with.
        meta: Hashes of pool and suite, numbers of rows and items, library versions.
    """

    def __init__(self, path: Path, meta: dict[str, Any], findings: Iterable[Finding]) -> None:
        self.path = path
        self.meta = meta
        self.rules = AuditRules.model_validate(meta["rules"])
        self.blocked: dict[str, list[Finding]] = defaultdict(list)
        self.noted: dict[str, list[Finding]] = defaultdict(list)
        for finding in findings:
            (self.blocked if finding.action == "block" else self.noted)[finding.id].append(finding)
        self.blocked.default_factory = self.noted.default_factory = None

    @classmethod
    def open(cls, path: str | Path) -> AuditIndex:
        """Open the index in a folder.

        Raises:
            MissingAssets: There is none, or one of another version.
        """
        path = Path(path)
        try:
            meta = json.loads((path / "meta.json").read_text())
        except FileNotFoundError:
            raise MissingAssets(f"no audit index at {path}: make it with `curation-env prepare TASK`") from None
        if meta["format"] != FORMAT:
            raise MissingAssets(f"the audit index at {path} is of another version: delete it and prepare again")
        return cls(path, meta, [*_read(path / "blocked.parquet"), *_read(path / "noted.parquet")])

    @functools.cached_property
    def base_rates(self) -> dict[tuple[str, Kind], int]:
        """Rows of the whole pool with a finding, by benchmark and kind: what a random submission would show."""
        rows: dict[tuple[str, Kind], set[str]] = defaultdict(set)
        for found in (self.blocked, self.noted):
            for id_, findings in found.items():
                for finding in findings:
                    rows[finding.benchmark, finding.kind].add(id_)
        return {key: len(ids) for key, ids in sorted(rows.items())}

    @functools.cached_property
    def items(self) -> list[tuple[str, str]]:
        """(benchmark, index) of each item by number."""
        return [(row["benchmark"], row["index"]) for row in self._table("items.parquet")]

    @functools.cached_property
    def item_numbers(self) -> dict[tuple[str, str], int]:
        return {item: number for number, item in enumerate(self.items)}

    @functools.cached_property
    def texts(self) -> TextIndex:
        """The items' texts, for auditing rewritten rows; built when first asked for."""
        counts = {tuple(row["gram"].split()): row["count"] for row in self._table("language.parquet")}
        surprise = Surprise.restored(counts, self.meta["contexts"], self.rules.text.max_contexts)
        texts = [
            ItemText(number, *(tuple(row[name].split()) for name in ("question", "with_options", "answer")))
            for number, row in enumerate(self._table("items.parquet"))
        ]
        return TextIndex(texts, surprise, self.rules.text, stock=self.meta["stock"])

    def image_items(self, id_: str) -> list[int]:
        """Numbers of the items whose picture is the row's."""
        findings = [*self.blocked.get(id_, ()), *self.noted.get(id_, ())]
        return [self.item_numbers[f.benchmark, f.index] for f in findings if f.kind.startswith("image")]

    def _table(self, name: str) -> list[dict[str, Any]]:
        import pyarrow.parquet as pq

        return pq.read_table(self.path / name).to_pylist()


def build_index(
    pool: Pool,
    suite_dir: str | Path,
    suite: Mapping[str, Any],
    rules: AuditRules | dict[str, Any],
    out: str | Path,
    on_progress: Progress | None = None,
) -> AuditIndex:
    """Compare every row of a pool with every item of a suite and write what was found.

    Args:
        pool: The whole pool.
        suite_dir: Folder of the suite's TSV files.
        suite: The resolved suite; `suite["benchmarks"]` maps each benchmark to its settings (`file`).
        rules: The suite's rule file.
        out: Folder to make, replaced if it exists. Host-side: it names items and holds their texts.
        on_progress: Called with {"stage": "audit", "done", "total", "unit"} now and then.

    Returns:
        The index, as `AuditIndex.open(out)` would.

    Raises:
        MissingAssets: A benchmark's file is not there.
        CurationError: The rules say nothing about one of the benchmarks.
    """
    from curation_env.audit.image import ImageIndex

    rules, out = as_rules(rules), Path(out)
    files = suite_files(suite, Path(suite_dir))
    for benchmark in files:
        rules.action(benchmark, "image")
    items = read_items(suite, Path(suite_dir))
    progress = _reporter(on_progress, 2 * len(pool))
    surprise = _learn_language(pool, items, rules, progress)
    texts = TextIndex([item.text for item in items], surprise, rules.text)
    pictures = ImageIndex([(item.number, data) for item in items for data in item.images], rules.image)
    known_images: dict[bytes, list[ImageMatch]] = {}
    by_text: list[tuple[str, bytes, str, TextMatch]] = []  # row id, image digest, first answer, match
    by_image: list[tuple[str, int, Kind, str]] = []
    for start, rows, digests in _batches(pool):
        fresh = {
            digest: row["image"]["bytes"]
            for row, digest in zip(rows, digests, strict=True)
            if _has_image(row) and digest not in known_images
        }
        known_images.update(zip(fresh, pictures.match(list(fresh.values())), strict=True))
        pieces_of_rows = [segments(row["conversation"]) for row in rows]
        texts.prepare(pieces_of_rows)
        for row, digest, pieces in zip(rows, digests, pieces_of_rows, strict=True):
            matches = known_images.get(digest, []) if _has_image(row) else []
            seen = {match.item for match in matches}
            for match in matches:
                kind, how = _image_kind(texts, match.item, pieces, match.how)
                by_image.append((row["id"], match.item, kind, how))
            by_text.extend(
                (row["id"], digest, _dialogue(row["conversation"]), found)
                for found in texts.match(pieces)
                if found.item not in seen
            )
        progress(len(pool) + start + len(rows))
    stock = _stock_phrases(by_text, rules.text.max_contexts)
    findings = [_finding(items, rules, id_, item, kind, how) for id_, item, kind, how in by_image]
    for id_, _, _, found in by_text:
        if text_key(found.segment) not in stock:
            how = "exact" if found.exact else "near"
            findings.append(_finding(items, rules, id_, found.item, found.field, how))
    meta = {
        "format": FORMAT,
        "pool": pool.hash,
        "suite": suite_digest(files),
        "rules": rules.model_dump(),
        "rows": len(pool),
        "items": len(items),
        "contexts": surprise.contexts,
        "stock": sorted(stock),
        "libraries": _versions("faiss-cpu", "imagehash", "numpy", "pillow", "rensa"),
    }
    _write(out, meta, findings, items, surprise)
    return AuditIndex(out, meta, findings)


def _image_kind(texts: TextIndex, item: int, pieces: Sequence[Segment], how: str) -> tuple[Kind, str]:
    shared = texts.paired(item, pieces)
    if shared is None:
        return "image", how
    return ("image+question" if shared == "question" else "image+answer"), how


def _finding(items: Sequence[Item], rules: AuditRules, id_: str, item: int, kind: Kind, how: str) -> Finding:
    benchmark = items[item].benchmark
    return Finding(id_, benchmark, items[item].index, kind, how, rules.action(benchmark, kind))


def _has_image(row: Mapping[str, Any]) -> bool:
    return row["image"] is not None and row["image"]["bytes"] is not None


def _dialogue(conversation: Conversation) -> str:
    """What tells one text-only dialogue from another when it opens with the same question: its first answer."""
    return text_key(words(conversation[0]["assistant"])) if conversation else ""


def _batches(pool: Pool) -> Iterator[tuple[int, list[dict[str, Any]], list[bytes]]]:
    for start in range(0, len(pool), BATCH):
        rows = pool.table.data.slice(start, BATCH).to_pylist()
        digests = [digest.tobytes() for digest in pool.image_digests[start : start + BATCH]]
        yield start, rows, digests


def _learn_language(pool: Pool, items: Sequence[Item], rules: AuditRules, progress: Callable[[int], None]) -> Surprise:
    """Count the items' n-grams over the distinct (image, text) pairs of pool and suite: copies count once.

    The suite counts too, for the templates of skills that the pool hardly has.
    """
    surprise = Surprise((form for item in items for _, form, _ in item.text.forms()), discount=rules.text.max_contexts)
    seen: set[tuple[bytes, str]] = set()
    columns = pool.table.data.select(["conversation"])
    for start in range(0, len(pool), BATCH):
        rows = columns.slice(start, BATCH).to_pylist()
        digests = pool.image_digests[start : start + BATCH]
        for row, digest in zip(rows, digests, strict=True):
            turns = [words(text) for turn in row["conversation"] for text in (turn["user"], turn["assistant"])]
            context = (digest.tobytes(), text_key(tuple(word for turn in turns for word in turn)))
            if context not in seen:
                seen.add(context)
                surprise.add(turns)
        progress(start + len(rows))
    asked = {(item.images, item.text.question): item.text for item in items}  # a circular family counts once
    for text in asked.values():
        surprise.add((text.with_options, text.answer))
    return surprise


def _stock_phrases(found: Iterable[tuple[str, bytes, str, TextMatch]], max_contexts: int) -> set[str]:
    """Texts that match items but occur with many images or in many dialogues: nobody's in particular."""
    contexts: dict[str, set[tuple[bytes, str]]] = defaultdict(set)
    for _, digest, dialogue, match in found:
        contexts[text_key(match.segment)].add((digest, "" if any(digest) else dialogue))
    return {key for key, where in contexts.items() if len(where) > max_contexts}


def _reporter(on_progress: Progress | None, total: int) -> Callable[[int], None]:
    def report(done: int) -> None:
        if on_progress is not None:
            on_progress({"stage": "audit", "done": done, "total": total, "unit": "rows"})

    return report


def _versions(*names: str) -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in names}


def _read(path: Path) -> Iterator[Finding]:
    import pyarrow.parquet as pq

    return (Finding(**row) for row in pq.read_table(path).to_pylist())


def _write(
    out: Path, meta: dict[str, Any], findings: Sequence[Finding], items: Sequence[Item], surprise: Surprise
) -> None:
    """Write the index folder atomically."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    scratch = out.with_name(f".{out.name}.{os.getpid()}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    schema = pa.schema([(field.name, pa.string()) for field in fields(Finding)])
    blocked = [asdict(finding) for finding in findings if finding.action == "block"]
    noted = [asdict(finding) for finding in findings if finding.action != "block"]
    pq.write_table(pa.Table.from_pylist(blocked, schema=schema), scratch / "blocked.parquet")
    pq.write_table(pa.Table.from_pylist(noted, schema=schema), scratch / "noted.parquet")
    texts = [
        {
            "benchmark": item.benchmark,
            "index": item.index,
            "question": " ".join(item.text.question),
            "with_options": " ".join(item.text.with_options),
            "answer": " ".join(item.text.answer),
        }
        for item in items
    ]
    pq.write_table(pa.Table.from_pylist(texts), scratch / "items.parquet")
    counts = sorted(surprise.counts.items())
    table = {"gram": [" ".join(gram) for gram, _ in counts], "count": [count for _, count in counts]}
    pq.write_table(pa.table(table), scratch / "language.parquet")
    (scratch / "meta.json").write_text(json.dumps(meta, indent=1, sort_keys=True))
    shutil.rmtree(out, ignore_errors=True)
    scratch.rename(out)
