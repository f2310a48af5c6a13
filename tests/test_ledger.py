"""The ledger with a real git and real kills: nothing finished is lost, and the same run gives the same commits."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from curation_env.errors import RunLocked
from curation_env.journal import plain
from curation_env.ledger import SEALED_DIGEST, Ledger, LedgerError, read_events

FILES = {
    "policy.py": b"print(1)\n",
    "submission/ids.txt": b"a\nb\n",
    "predictions.jsonl": b'{"score": 1}\n',
    "empty": b"",
}

# Records iterations 0..9 in the order that the ledger asks for, continuing what is there.
WRITER = """
import sys
from curation_env.ledger import Ledger
with Ledger(sys.argv[1]) as ledger:
    print("open", flush=True)
    for k in range(len(ledger.commits()), 10):
        ledger.seal(k, {"A": k})
        ledger.commit(k, {"policy.py": b"x = %d" % k, "predictions.jsonl": b"%d\\n" % k * 20_000}, f"iteration {k}")
        ledger.event("step", step=k)
"""


def start_writer(run: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", WRITER, str(run)], stdout=subprocess.PIPE, text=True)


def test_events_are_lines_with_times(tmp_path: Path) -> None:
    with Ledger(tmp_path / "run") as ledger:
        ledger.event("start", text="ä\u2028\ud800", loss=float("nan"), scores={"A": [1.5, float("inf")]})
        ledger.event("stop")
        assert [event["seq"] for event in ledger.events()] == [0, 1]
        assert [event["kind"] for event in ledger.events("stop")] == ["stop"]
    first = read_events(tmp_path / "run")[0]
    assert (first["text"], first["loss"], first["scores"]) == ("ä\u2028?", None, {"A": [1.5, None]})
    assert first["time"].endswith("+00:00")
    with Ledger(tmp_path / "run") as ledger:
        assert ledger.event("again")["seq"] == 2
    with pytest.raises(LedgerError, match="closed"):
        ledger.event("late")


def test_threads_write_whole_lines_in_order(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:

        def write() -> None:
            for _ in range(20):
                ledger.event("line", text="x" * 3_000)

        threads = [threading.Thread(target=write) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [event["seq"] for event in ledger.events()] == list(range(80))


def test_commits_depend_on_content_and_history_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shas = []
    for name in ("a", "b"):
        with Ledger(tmp_path / name) as ledger:
            shas.append([ledger.commit(k, {**FILES, "k": b"%d" % k}, f"iteration {k}") for k in (0, 1, 3)])
        monkeypatch.setenv("GIT_AUTHOR_NAME", "Somebody")
        monkeypatch.setenv("GIT_COMMITTER_DATE", "2020-01-01T00:00:00")
        monkeypatch.setenv("GIT_INDEX_FILE", "/nonexistent/index")
        monkeypatch.setenv("HOME", str(tmp_path))
        (tmp_path / ".gitconfig").write_text("[user]\nname = Else\n[core]\nautocrlf = true\n[commit]\ngpgsign = true\n")
        time.sleep(0.01)
    assert shas[0] == shas[1]
    assert shas[0][0] == "65a3451b7fa8891de976787cd20bb9788a27d873"
    with Ledger(tmp_path / "a") as ledger:
        assert [(commit.iteration, commit.message) for commit in ledger.commits()] == [
            (0, "iteration 0"),
            (1, "iteration 1"),
            (3, "iteration 3"),
        ]
        assert ledger.files(shas[0][1]) == {**FILES, "k": b"1"}
    check = subprocess.run(["git", "--git-dir", tmp_path / "a/trajectory.git", "fsck", "--strict"], check=False)
    assert check.returncode == 0


def test_the_same_iteration_again(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        base = ledger.commit(0, {}, "base")
        first = ledger.commit(1, FILES, "one")
        assert ledger.commit(1, FILES, "one") == first
        with pytest.raises(ValueError, match="recorded already"):
            ledger.commit(1, {"policy.py": b"other"}, "one")
        with pytest.raises(ValueError, match="can't follow"):
            ledger.commit(0, {}, "base")
        assert len(ledger.events("commit")) == 2
    # In a later process the step may have gone another way: the commit was made, but its step was never over.
    with Ledger(tmp_path) as ledger:
        assert ledger.commit(1, FILES, "one") == first
        other = ledger.commit(1, {"policy.py": b"other"}, "one")
        assert [commit.sha for commit in ledger.commits()] == [base, other]
        assert [event["commit"] for event in ledger.events("commit")] == [base, first, other]
    with Ledger(tmp_path) as ledger:
        assert ledger.files(other) == {"policy.py": b"other"}
        assert len(ledger.events("commit")) == 3


@pytest.mark.parametrize(
    "name", ["", "/a", "../a", "a/../b", "a//b", ".git/config", "a/.git", 'a"b', "a b", "a\nb", "é"]
)
def test_paths_of_the_tree_are_plain(tmp_path: Path, name: str) -> None:
    with Ledger(tmp_path) as ledger, pytest.raises(ValueError, match="not a path"):
        ledger.commit(0, {name: b""}, "base")


def test_messages_may_quote_anything(tmp_path: Path) -> None:
    hostile = "one\x00\x01\x1b[2J\n\nIteration: 9\ndata 3\n\ud800é"
    with Ledger(tmp_path) as ledger:
        ledger.commit(0, {}, hostile)
        ledger.commit(1, {}, "two")
        assert [commit.iteration for commit in ledger.commits()] == [0, 1]
        assert ledger.commits()[0].message == "one[2J\n\nIteration: 9\ndata 3\né"
        with pytest.raises(ValueError, match="message"):
            ledger.commit(2, {}, " \x00")


def test_sealed_scores_are_counted_when_opened(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        ledger.seal(0, {"A": 1.0})
        ledger.seal(1, {"A": 2.0})
        ledger.seal(1, {"A": 3.0})  # sealed again after a crash between seal and commit
        assert ledger.openings() == 0
        assert [(record["iteration"], record["scores"]) for record in ledger.unseal()] == [
            (0, {"A": 1.0}),
            (1, {"A": 3.0}),
        ]
    with Ledger(tmp_path) as ledger:
        ledger.unseal()
        assert ledger.openings() == 2
        assert [event["opening"] for event in ledger.events("unseal")] == [1, 2]


def test_a_commit_is_bound_to_its_sealed_scores(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        digest = ledger.seal(0, {"A": float("nan")}, {"predictions.jsonl": '{"score": 0.5}\n'})
        ledger.commit(0, {SEALED_DIGEST: f"{digest}\n".encode()}, "base")
        ledger.seal(0, {"A": 9.0})  # by a process that was killed before it committed
        assert ledger.unseal() == [
            {"iteration": 0, "scores": {"A": None}, "predictions": {"predictions.jsonl": '{"score": 0.5}\n'}}
        ]
    sealed = tmp_path / "sealed.jsonl"
    sealed.write_text(sealed.read_text().replace("0.5", "0.6"))
    with Ledger(tmp_path) as ledger:
        with pytest.raises(LedgerError, match="lacks the scores that iteration 0 was committed with"):
            ledger.unseal()
        assert ledger.openings() == 2


def test_a_step_that_failed_may_commit_another_content(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        ledger.commit(0, {}, "base")
        ledger.commit(1, FILES, "one")
        ledger.failed()
        other = ledger.commit(1, {"policy.py": b"other"}, "one")
        assert [commit.iteration for commit in ledger.commits()] == [0, 1]
        assert ledger.files(other) == {"policy.py": b"other"}


def test_anything_can_be_journaled(tmp_path: Path) -> None:
    endless: list[object] = []
    endless += [endless, endless]
    action = {
        "tool": float("inf"),
        7: np.float32("nan"),
        "text": "x" * 5_000_000,
        "surrogate": "a\ud800",
        "number": 10**6000,
        "array": np.arange(4).reshape(2, 2),
        "bytes": b"\xff" * 9999,
        "object": object(),
        "endless": endless,
    }
    kept = plain(action)
    with Ledger(tmp_path) as ledger:
        ledger.event("step", action=kept)
        assert ledger.events("step")[0]["action"] == kept == plain(action)
    assert kept.pop("number").startswith("0x")
    assert len(kept.pop("bytes")) < 5000
    kept.pop("endless")
    assert kept == {
        "tool": None,
        "7": None,
        "text": "x" * 1000 + "... (5,000,000 characters)",
        "surrogate": "a\\ud800",
        "array": [[0, 1], [2, 3]],
        "object": "<builtins.object>",
    }
    assert (tmp_path / "journal.jsonl").stat().st_size < 2_000_000


def test_a_torn_last_line_is_put_aside(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        ledger.event("one")
        ledger.event("two")
    journal = tmp_path / "journal.jsonl"
    whole = journal.read_bytes()
    for torn in (b'{"seq": 2, "kin', b"\0" * 50, b"{}"):
        journal.write_bytes(whole + torn)
        assert len(read_events(tmp_path)) == 2
        with Ledger(tmp_path) as ledger:
            assert journal.read_bytes() == whole
            assert len(ledger.events()) == 2
        assert (tmp_path / "journal.torn").read_bytes().endswith(torn + b"\n")


def test_damage_elsewhere_is_an_error(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        ledger.commit(0, {}, "base")
        ledger.event("two")
    journal = tmp_path / "journal.jsonl"
    whole = journal.read_bytes()
    journal.write_bytes(b"x" + whole)
    with pytest.raises(LedgerError, match="line 1 is damaged"):
        Ledger(tmp_path)
    journal.write_bytes(whole)
    shutil.rmtree(tmp_path / "trajectory.git")
    with pytest.raises(LedgerError, match="lacks iterations"):
        Ledger(tmp_path)


def test_a_commit_without_its_line_is_finished_work(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        sha = ledger.commit(0, FILES, "base")
    (tmp_path / "journal.jsonl").write_bytes(b"")
    with Ledger(tmp_path) as ledger:
        assert [(event["iteration"], event["commit"]) for event in ledger.events("commit")] == [(0, sha)]


def test_what_a_killed_git_leaves_is_removed(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        ledger.commit(0, FILES, "base")
    git = tmp_path / "trajectory.git"
    (git / "refs/heads/trajectory.lock").touch()
    (git / "fast_import_crash_123").touch()
    (git / "objects/pack").mkdir(exist_ok=True)
    (git / "objects/pack/tmp_pack_abc").touch()
    (tmp_path / ".trajectory.partial").mkdir()
    with Ledger(tmp_path) as ledger:
        ledger.commit(1, FILES, "one")
    assert not [path for path in git.rglob("*") if "lock" in path.name or "tmp_" in path.name or "crash" in path.name]


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER + "    sys.stdin.read()", str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert writer.stdout is not None
    writer.stdout.readline()
    with pytest.raises(RunLocked, match="another process"):
        Ledger(tmp_path)
    writer.kill()  # the lock dies with its holder
    writer.communicate()
    with Ledger(tmp_path) as ledger:
        ledger.event("mine")


def test_kills_at_any_moment_lose_nothing(tmp_path: Path) -> None:
    straight = tmp_path / "straight"
    assert start_writer(straight).wait(60) == 0
    with Ledger(straight) as ledger:
        expected = [commit.sha for commit in ledger.commits()]
    assert len(expected) == 10
    rng = random.Random(0)
    run = tmp_path / "killed"
    finished: list[str] = []
    for _ in range(12):
        writer = start_writer(run)
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(rng.uniform(0.0, 0.08))
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
        with Ledger(run) as ledger:
            shas = [commit.sha for commit in ledger.commits()]
            assert shas[: len(finished)] == finished
            assert shas == expected[: len(shas)]
            assert [event["commit"] for event in ledger.events("commit")] == shas
            finished = shas
    assert start_writer(run).wait(60) == 0
    with Ledger(run) as ledger:
        assert [commit.sha for commit in ledger.commits()] == expected
        assert [(record["iteration"], record["scores"]) for record in ledger.unseal()] == [
            (k, {"A": k}) for k in range(10)
        ]


def test_a_full_disk_is_an_error_and_loses_nothing(tmp_path: Path) -> None:
    # A limit on the size of files stands for the full disk: the write that passes it is cut short, then fails.
    code = """
import os, resource, sys
from curation_env.ledger import Ledger, LedgerError
ledger = Ledger(sys.argv[1])
ledger.commit(0, {"a": b"1"}, "base")
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
for work in (lambda: ledger.event("big", text="x" * 5000), lambda: ledger.commit(1, {"a": os.urandom(9000)}, "one")):
    try:
        work()
    except LedgerError as error:
        print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
ledger.event("after")
ledger.commit(1, {"a": b"2"}, "one")
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert "journal.jsonl can't be written" in first
    assert "git fast-import failed" in second
    assert [event["kind"] for event in read_events(tmp_path)] == ["commit", "after", "commit"]
    assert not (tmp_path / "journal.torn").exists()


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LedgerError, match="can't be written"):
        Ledger(tmp_path / "file")


def test_a_commit_is_quick(tmp_path: Path) -> None:
    predictions = b"".join(b'{"item": %d, "score": 1}\n' % k for k in range(10_000))
    ids = b"".join(b"%032x\n" % k for k in range(10_000))
    with Ledger(tmp_path) as ledger:
        seconds = []
        for k in range(5):
            started = time.perf_counter()
            ledger.commit(k, {"ids.txt": ids + b"%d" % k, "predictions.jsonl": predictions}, f"iteration {k}")
            seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.25, seconds  # 0.02 where nothing else runs
    assert json.loads((tmp_path / "journal.jsonl").read_text().splitlines()[-1])["iteration"] == 4
    assert os.listdir(tmp_path).count("lock") == 1
