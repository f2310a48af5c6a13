"""The index, the gate and the agent's view, over a pool and a suite in the real file formats."""

from __future__ import annotations

import base64
import time
from pathlib import Path

import pytest
from audit_support import BLOCK_ALL, SUITE, blank, chatter, encoded, make_pool, picture, row, turn, write_suite

from curation_env.audit.gate import Certificate, audit
from curation_env.audit.index import AuditIndex, build_index
from curation_env.audit.items import read_items, suite_digest, suite_files
from curation_env.audit.rules import AuditRules
from curation_env.audit.view import write_view
from curation_env.errors import CurationError, MissingAssets, TaskMismatch
from curation_env.evaluation import suite as evaluation
from curation_env.pool import Pool
from curation_env.submission import Submission

QUESTION = "Which of the two ferries will reach the northern island before the captain's dinner is served?"
ANSWER = "The ferry with the green funnel arrives first because it leaves the harbor an hour earlier."
ASKED = "Who repaired the broken compass of the glacier expedition in the final week of the journey?"
ITEMS = {
    "BenchOpen": [
        {"index": "7", "image": encoded(picture(1)), "question": QUESTION, "answer": ANSWER},
        {"index": "8", "image": "", "question": "Describe the image.", "answer": "yes"},
        {"index": "9", "image": blank(0), "question": "What is it?", "answer": "black"},
    ],
    "BenchChoice": [
        {
            "index": "0",
            "image": encoded(picture(2)),
            "question": ASKED,
            "A": "the cook",
            "B": "a pilot",
            "answer": "B",
        },
        {"index": "1000000", "image": "0", "question": ASKED, "A": "a pilot", "B": "the cook", "answer": "A"},
    ],
}
LEAKS = {
    "image+question": row(turn(QUESTION, "The green one."), image=encoded(picture(1), "JPEG", quality=85)),
    "image+answer": row(turn("What happens here?", ANSWER), image=encoded(picture(1))),
    "image": row(turn("Is it windy?", "Perhaps."), image=encoded(picture(2))),
    "question": row(turn(f"{ASKED}\nA. the cook\nB. a pilot\nAnswer with the letter.", "B")),
    "answer": row(turn("Tell me about the ferries.", ANSWER), image=encoded(picture(77))),
}


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    rows = chatter(300)
    rows.append(row(turn("What is it?", "black"), image=blank(0)))
    return make_pool(tmp_path_factory.mktemp("pools") / "p", [*rows, *LEAKS.values()])


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_suite(tmp_path_factory.mktemp("suites") / "s", ITEMS)


@pytest.fixture(scope="module")
def index(pool: Pool, suite: Path, tmp_path_factory: pytest.TempPathFactory) -> AuditIndex:
    return build_index(pool, suite, SUITE, BLOCK_ALL, tmp_path_factory.mktemp("views") / "v" / "audit")


@pytest.fixture(scope="module")
def leaks(pool: Pool) -> dict[str, str]:
    """Row id of each leak."""
    return dict(zip(LEAKS, pool.ids[-len(LEAKS) :], strict=True))


def test_every_kind_is_found_and_nothing_else(index: AuditIndex, leaks: dict[str, str]) -> None:
    kinds = {id_: {finding.kind for finding in findings} for id_, findings in index.blocked.items()}
    assert kinds == {id_: {kind} for kind, id_ in leaks.items()}


def test_a_finding_names_its_item(index: AuditIndex, leaks: dict[str, str]) -> None:
    named = {(finding.benchmark, finding.index, finding.how) for finding in index.blocked[leaks["image"]]}
    assert named == {("BenchChoice", "0", "bytes"), ("BenchChoice", "1000000", "bytes")}


def test_a_reopened_index_is_the_same(index: AuditIndex) -> None:
    again = AuditIndex.open(index.path)
    assert (again.blocked, again.noted, again.meta) == (index.blocked, index.noted, index.meta)
    assert again.base_rates == index.base_rates


def test_building_again_gives_the_same_files(pool: Pool, suite: Path, index: AuditIndex, tmp_path: Path) -> None:
    progress: list[dict] = []
    build_index(pool, suite, SUITE, BLOCK_ALL.model_dump(), tmp_path / "audit", progress.append)
    names = sorted(path.name for path in index.path.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "audit").iterdir())
    assert all((index.path / name).read_bytes() == (tmp_path / "audit" / name).read_bytes() for name in names)
    assert progress[-1]["done"] == progress[-1]["total"]


def test_a_clean_submission_passes(pool: Pool, index: AuditIndex) -> None:
    certificate = audit(Submission.of(pool.ids[:200]), index, pool)
    assert certificate.passed
    assert certificate.reason == ""
    assert not any(certificate.totals.values())


def test_a_rejection_names_rows_and_kinds_and_no_item(pool: Pool, index: AuditIndex, leaks: dict[str, str]) -> None:
    certificate = audit(Submission.of([*pool.ids[:50], *leaks.values()]), index, pool)
    assert not certificate.passed
    assert {row.id: row.kinds for row in certificate.rejected} == {id_: (kind,) for kind, id_ in leaks.items()}
    assert all(id_ in certificate.reason for id_ in leaks.values())
    said = (certificate.reason + certificate.canonical()).casefold()
    assert not any(text in said for text in ("ferr", "funnel", "compass", "pilot", "1000000"))


def test_counts_stand_beside_the_base_rate(pool: Pool, index: AuditIndex, leaks: dict[str, str]) -> None:
    certificate = audit(Submission.of([leaks["image"]]), index, pool)
    [count] = certificate.counts
    assert (count.benchmark, count.kind, count.rows, count.pool_rows) == ("BenchChoice", "image", 1, 1)
    assert count.expected == pytest.approx(1 / len(pool), abs=1e-3)


def test_certificates_depend_on_content_alone(pool: Pool, index: AuditIndex) -> None:
    one = audit(Submission.of(pool.ids[:20]), index, pool)
    other = audit(Submission.of(pool.ids[19::-1]), AuditIndex.open(index.path), pool)
    assert one.digest == other.digest
    assert one.digest != audit(Submission.of(pool.ids[:21]), index, pool).digest
    assert Certificate.model_validate_json(one.canonical()) == one


def test_rewrites_are_compared_afresh(pool: Pool, index: AuditIndex) -> None:
    ids = pool.ids[:3]
    rewrites = {ids[0]: [turn(ASKED + " Was it the cook or a pilot?", "A pilot.")], ids[1]: [turn("Hello!", "Hi.")]}
    certificate = audit(Submission.of(ids, rewrites), AuditIndex.open(index.path), pool)
    assert [(row.id, row.kinds, row.rewritten) for row in certificate.rejected] == [(ids[0], ("rewrite",), True)]
    assert certificate.totals["rewrite"] == 1


def test_a_rewrite_over_an_items_picture(pool: Pool, suite: Path, leaks: dict[str, str], tmp_path: Path) -> None:
    """Where shared pictures are expected, asking the item's own short question about one is still a leak."""
    actions = {name: {**kinds, "image": "expected"} for name, kinds in BLOCK_ALL.benchmarks.items()}
    rules = AuditRules.model_validate({**BLOCK_ALL.model_dump(), "benchmarks": actions})
    index = build_index(pool, suite, SUITE, rules, tmp_path / "audit")
    id_ = leaks["image"]
    assert audit(Submission.of([id_]), index, pool).passed
    assert audit(Submission.of([id_], {id_: [turn("Is it late?", "No.")]}), index, pool).passed
    assert not audit(Submission.of([id_], {id_: [turn(ASKED, "A pilot.")]}), index, pool).passed


def test_the_rule_file_decides(pool: Pool, suite: Path, leaks: dict[str, str], tmp_path: Path) -> None:
    actions = {**BLOCK_ALL.benchmarks, "BenchOpen": dict.fromkeys(BLOCK_ALL.benchmarks["BenchOpen"], "warn")}
    rules = AuditRules.model_validate({**BLOCK_ALL.model_dump(), "benchmarks": actions})
    index = build_index(pool, suite, SUITE, rules, tmp_path / "audit")
    assert set(index.blocked) == {leaks["image"], leaks["question"]}
    certificate = audit(Submission.of([leaks["answer"]]), index, pool)
    assert certificate.passed
    assert [(count.action, count.rows) for count in certificate.counts] == [("warn", 1)]
    with pytest.raises(TaskMismatch, match="other rules"):
        audit(Submission.of([leaks["answer"]]), index, pool, BLOCK_ALL)


def test_the_view_leaves_blocked_rows_out(pool: Pool, index: AuditIndex, leaks: dict[str, str], tmp_path: Path) -> None:
    assert write_view(pool, index, tmp_path / "view") == len(pool) - len(leaks)
    view = Pool.open(tmp_path / "view")
    assert view.ids == pool.ids[: -len(leaks)]
    assert view.table.features == pool.table.features
    assert [view.row(k) for k in (0, 1, 300)] == [pool.row(k) for k in (0, 1, 300)]
    assert (view.image_digests == pool.image_digests[: -len(leaks)]).all()
    assert audit(Submission.of(view.ids), index, view).passed
    assert sorted(path.name for path in (tmp_path / "view").iterdir()) == ["image_digests.npy", "meta.json", "rows"]
    assert not list(pool.path.rglob("cache*")), "nothing is written into the pool's folder"
    held = b"".join(path.read_bytes() for path in (tmp_path / "view").rglob("*") if path.is_file())
    assert not any(id_.encode() in held for id_ in leaks.values())


def test_an_index_of_another_pool_is_refused(index: AuditIndex, tmp_path: Path) -> None:
    other = make_pool(tmp_path / "other", chatter(3, seed=5))
    with pytest.raises(TaskMismatch, match="another pool"):
        audit(Submission.of(other.ids), index, other)


def test_an_index_of_another_suite_is_refused(pool: Pool, index: AuditIndex, suite: Path, tmp_path: Path) -> None:
    ids = pool.ids[:3]
    own = suite_digest(suite_files(SUITE, suite))
    assert audit(Submission.of(ids), index, pool, suite=own).passed
    other = write_suite(tmp_path / "other", {**ITEMS, "BenchOpen": ITEMS["BenchOpen"][:2]})
    with pytest.raises(TaskMismatch, match="another suite"):
        audit(Submission.of(ids), index, pool, suite=suite_digest(suite_files(SUITE, other)))


def test_items_are_what_the_evaluation_asks(tmp_path: Path) -> None:
    """One reader: an option behind H, or one that reads as missing there, is not another item here."""
    columns = "index\timage\tquestion\tA\tB\tI\tanswer"
    shown = base64.b64encode(encoded(picture(1))).decode()
    (tmp_path / "B.tsv").write_text(f"{columns}\n1\t{shown}\tWhich one?\tNone\ttwo\tnine\tI\n")
    [item] = read_items({"benchmarks": {"B": {"file": "B.tsv"}}}, tmp_path)
    [asked] = evaluation.read_items(tmp_path / "B.tsv", "B")
    assert item.images == asked.images
    assert item.text.with_options == ("which", "one", "two", "nine")
    assert item.text.answer == ("nine",)


def test_errors_say_what_to_do(pool: Pool, suite: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingAssets, match="prepare"):
        AuditIndex.open(tmp_path)
    with pytest.raises(MissingAssets, match=r"BenchOpen\.tsv"):
        build_index(pool, tmp_path, SUITE, BLOCK_ALL, tmp_path / "audit")
    unknown = {"benchmarks": {**SUITE["benchmarks"], "New": {"file": "BenchOpen.tsv"}}}
    with pytest.raises(CurationError, match="benchmark New"):
        build_index(pool, suite, unknown, BLOCK_ALL, tmp_path / "audit")
    (tmp_path / "rules.yaml").write_text("name: x\nversion: 1\nbenchmarks: {B: {image: block}}\n")
    with pytest.raises(CurationError, match="no action for question"):
        AuditRules.load(tmp_path / "rules.yaml")


def test_a_look_up_takes_no_time(index: AuditIndex, pool: Pool) -> None:
    submission = Submission.of(pool.ids)
    started = time.process_time()
    audit(submission, index, pool)
    assert time.process_time() - started < 0.015  # 305 rows; a thousand may take 50 ms
