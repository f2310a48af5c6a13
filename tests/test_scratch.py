"""Scratch folders and caches: nothing of a killed process stays, and a cache is never a reason to fail."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from curation_env.cache import Cache
from curation_env.scratch import Scratch


def holder(root: Path, then: str) -> subprocess.Popen[str]:
    """A process that has made a scratch folder with a file in it, and printed its path."""
    script = f"""
        import sys, time
        from pathlib import Path
        from curation_env.scratch import Scratch
        scratch = Scratch(Path(sys.argv[1]))
        (scratch.path / "checkpoint").write_text("large")
        print(scratch.path, flush=True)
        {then}
    """
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), str(root)], stdout=subprocess.PIPE, text=True
    )


def test_what_a_killed_process_left_is_cleared_and_what_lives_is_not(tmp_path: Path) -> None:
    dead, living = (holder(tmp_path, "time.sleep(60)") for _ in range(2))
    assert dead.stdout is not None
    assert living.stdout is not None
    left, used = Path(dead.stdout.readline().strip()), Path(living.stdout.readline().strip())
    try:
        dead.send_signal(signal.SIGKILL)
        dead.wait()
        assert (left / "checkpoint").exists()
        with Scratch(tmp_path) as scratch:
            assert not left.parent.exists()
            assert (used / "checkpoint").exists()
            assert scratch.path.is_dir()
        assert not scratch.path.parent.exists()
    finally:
        living.kill()
        living.wait()
        for process in (dead, living):
            process.stdout.close()


def test_an_entry_comes_back_and_the_first_one_stays(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    assert cache.read("a/b") == {}
    cache.write("a/b", {"x": b"1", "y": b""})
    cache.write("a/b", {"x": b"2"})
    assert cache.read("a/b") == {"x": b"1", "y": b""}
    cache.discard("a/b")
    cache.discard("a/b")
    assert cache.read("a/b") == {}
    (tmp_path / "a" / "b").mkdir()  # an empty folder is no entry
    cache.write("a/b", {"x": b"3"})
    assert cache.read("a/b") == {"x": b"3"}
    assert [path.name for path in (tmp_path / ".scratch").iterdir()] == ["lock"]


def test_what_is_unreadable_is_a_miss_and_made_again(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    (tmp_path / "a").write_text("not a folder")
    assert cache.read("a") == {}
    cache.write("a", {"x": b"1"})
    assert cache.read("a") == {"x": b"1"}


def test_what_cannot_be_written_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    cache = Cache(tmp_path / "file" / "cache")
    cache.write("a", {"x": b"1"})
    assert cache.read("a") == {}
    assert "nothing is kept in the cache" in caplog.text
