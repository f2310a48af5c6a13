"""Reading, checking and hashing what an agent submits."""

from __future__ import annotations

import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation_env.errors import InvalidSubmission
from curation_env.pool import Pool, write_pool
from curation_env.submission import (
    FORBIDDEN_MARKS,
    MAX_REWRITE_BYTES,
    Budget,
    Submission,
    check_conversation,
    read_submission,
    validate,
)

TURN = {"user": "q", "assistant": "a"}


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pool") / "pool"
    rows = [
        {"source": "s", "image": None, "conversation": [{"user": f"q{k}", "assistant": "a"}], "n_tokens": k}
        for k in range(6)
    ]
    write_pool(folder, rows, key="six")
    return Pool.open(folder)


def write(workspace, ids: bytes | None = None, rewrites: bytes | None = None):
    folder = workspace / ".submission"
    folder.mkdir(exist_ok=True)
    if ids is not None:
        (folder / "ids.txt").write_bytes(ids)
    if rewrites is not None:
        (folder / "rewrites.jsonl").write_bytes(rewrites)


def test_order_does_not_matter_and_counts_do():
    assert Submission.of(["b", "a"]).digest == Submission.of(["a", "b"]).digest
    assert Submission.of(["a", "a", "b"]).digest != Submission.of(["a", "b"]).digest
    assert Submission.of(["a"], {"a": [TURN]}).digest != Submission.of(["a"]).digest


def test_files_come_back(tmp_path):
    submission = Submission.of(["b", "a", "a"], {"b": [TURN]})
    files = submission.to_files()
    write(tmp_path, files["ids.txt"], files["rewrites.jsonl"])
    assert read_submission(tmp_path) == submission


def test_nothing_written_is_no_submission(tmp_path):
    assert read_submission(tmp_path) is None


@pytest.mark.parametrize("kind", ["link", "folder", "fifo", "linked folder"])
def test_only_regular_files_are_read(tmp_path, kind):
    secret = tmp_path / "secret"
    secret.write_text("x\n")
    folder = tmp_path / "w" / ".submission"
    folder.mkdir(parents=True)
    place = folder / "ids.txt"
    if kind == "link":
        place.symlink_to(secret)
    elif kind == "folder":
        place.mkdir()
    elif kind == "fifo":
        os.mkfifo(place)
    else:
        folder.rmdir()
        folder.symlink_to(tmp_path)
    with pytest.raises(InvalidSubmission, match=r"regular file|must be a folder"):
        read_submission(tmp_path / "w")


def test_a_huge_sparse_file_is_refused_unread(tmp_path):
    write(tmp_path, b"")
    with (tmp_path / ".submission" / "ids.txt").open("r+b") as stream:
        stream.truncate(2**40)
    with pytest.raises(InvalidSubmission, match="at most"):
        read_submission(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"\xff\n", "JSON"),
        (b"[1]\n", "expected"),
        (b'{"id": "a"}\n', "expected"),
        (b'{"id": 3, "conversation": []}\n', "id must be"),
        (b'{"id": "a", "conversation": []}\n', "1 to 64 turns"),
        (b'{"id": "a", "conversation": [{"user": "q"}]}\n', "a turn is"),
        (b'{"id": "a", "conversation": [{"user": "q", "assistant": "", "system": "x"}]}\n', "a turn is"),
        (b'{"id": "a", "conversation": [{"user": "q", "assistant": " "}]}\n', "not be empty"),
        (b"[" * 100_000 + b"\n", "JSON"),
        (b'{"id": "a", "conversation": [{"user": "\\ud800", "assistant": "a"}]}\n', "surrogate"),
    ],
)
def test_malformed_rewrites_name_the_line(tmp_path, line, message):
    write(tmp_path, b"a\n", line)
    with pytest.raises(InvalidSubmission, match=message) as caught:
        read_submission(tmp_path)
    assert "line 1" in str(caught.value)


def test_rewrites_that_the_task_does_not_allow_are_refused_unread(tmp_path):
    write(tmp_path, b"a\n", b"")
    assert read_submission(tmp_path, Budget(1)) == Submission.of(["a"])
    with (tmp_path / ".submission" / "rewrites.jsonl").open("r+b") as stream:
        stream.truncate(2**40)
    with pytest.raises(InvalidSubmission, match="does not allow rewrites"):
        read_submission(tmp_path, Budget(1))


@pytest.mark.parametrize(
    ("rewrites", "message"),
    [
        (b"{}\n" * 3, "3 lines for 2 rows"),
        (b"[" * (MAX_REWRITE_BYTES + 1), "at most 262,144 are read"),
        (b"\n" * 2**18, "lines for 2 rows"),
    ],
)
def test_no_more_is_read_of_rewrites_than_rows_may_need(tmp_path, rewrites, message):
    write(tmp_path, b"a\nb\nb\nc\n", rewrites)
    with pytest.raises(InvalidSubmission, match=message):
        read_submission(tmp_path, Budget(2, rewrite=True))


@pytest.mark.parametrize("mark", FORBIDDEN_MARKS)
def test_text_that_is_more_than_text_is_refused(mark):
    with pytest.raises(InvalidSubmission, match="not plain text"):
        check_conversation([{"user": "q", "assistant": f"yes {mark}"}], "here")


@settings(max_examples=300)
@given(st.binary(max_size=400), st.binary(max_size=400))
def test_reading_raises_documented_errors_only(tmp_path_factory, ids, rewrites):
    workspace = tmp_path_factory.mktemp("w")
    write(workspace, ids, rewrites)
    try:
        submission = read_submission(workspace)
    except InvalidSubmission:
        return
    assert submission is not None
    assert list(submission.ids) == sorted(submission.ids)


def test_a_good_submission_is_measured(pool):
    valid = validate(Submission.of(pool.ids[1:4]), pool, Budget(rows=3, tokens=6))
    assert (valid.rows, valid.supervised_tokens) == (3, 6)


@pytest.mark.parametrize(
    ("pick", "budget", "message"),
    [
        (lambda ids: [], Budget(3), "empty"),
        (lambda ids: ids[1:5], Budget(3), "allows 3"),
        (lambda ids: ["nope"], Budget(3), "not in the pool"),
        (lambda ids: [ids[1], ids[1]], Budget(3), "repeated"),
        (lambda ids: [ids[0]], Budget(3), "no supervised token"),
        (lambda ids: ids[4:6], Budget(3, tokens=8), "9 supervised tokens"),
    ],
)
def test_what_breaks_the_rules_is_named(pool, pick, budget, message):
    with pytest.raises(InvalidSubmission, match=message):
        validate(Submission.of(pick(pool.ids)), pool, budget)


def test_repeats_and_rewrites_need_the_task_to_allow_them(pool):
    twice = Submission.of([pool.ids[1], pool.ids[1]])
    assert validate(twice, pool, Budget(3, repeats=True)).rows == 2
    rewritten = Submission.of([pool.ids[1]], {pool.ids[1]: [TURN]})
    with pytest.raises(InvalidSubmission, match="does not allow rewrites"):
        validate(rewritten, pool, Budget(3))
    with pytest.raises(InvalidSubmission, match="rewritten but not selected"):
        validate(Submission.of([pool.ids[2]], {pool.ids[1]: [TURN]}), pool, Budget(3, rewrite=True))
    assert json.loads(rewritten.to_files()["rewrites.jsonl"])["id"] == pool.ids[1]


def test_a_rewritten_row_counts_as_what_it_has_become(pool):
    id_, other = pool.ids[1], pool.ids[2]
    submission = Submission.of([id_, id_, other], {id_: [{"user": "q", "assistant": "a " * 40}]})
    budget = Budget(3, tokens=99, repeats=True, rewrite=True)

    def words(conversation, image):
        assert not image
        return sum(len(turn["assistant"].split()) for turn in conversation)

    assert validate(submission, pool, budget, words).supervised_tokens == 2 * 40 + 2
    with pytest.raises(InvalidSubmission, match="82 supervised tokens submitted, the task allows 81"):
        validate(submission, pool, Budget(3, tokens=81, repeats=True, rewrite=True), words)
    with pytest.raises(InvalidSubmission, match=r"1 rows have no supervised token .* or shorten what you wrote"):
        validate(submission, pool, budget, lambda conversation, image: 0)
    with pytest.raises(ValueError, match="needs a count"):
        validate(submission, pool, budget)
