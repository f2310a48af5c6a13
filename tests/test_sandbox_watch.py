"""When the watch over a workspace kills: what is counted, what only free space tells, and what is nobody's fault."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest

from curation_env.sandbox import SandboxConfig, SandboxLimits, files
from curation_env.sandbox.watch import Watch

_MB = 1 << 20


class Machine:
    """A disk and what the sandbox has written to it, as the watch would read them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free = 100_000
        self.written = 0
        monkeypatch.setattr(files, "free_bytes", lambda root: self.free * _MB)
        monkeypatch.setattr(files, "written_bytes", lambda pids: self.written * _MB)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


@pytest.fixture
def watch(machine: Machine, tmp_path: Path) -> Watch:
    """Over an empty workspace of at most 100 MB; it looks when a test says so."""
    config = SandboxConfig(tmp_path, limits=SandboxLimits(disk_mb=100))
    watch = Watch(config, other=lambda: "", enforce=lambda: None, pids=lambda: [], give_up=lambda: None)
    watch.stop()
    return watch


@pytest.mark.parametrize(
    ("free", "gone", "written", "killed"),
    [
        (100_000, 90_000, 0, False),  # others fill the disk
        (100_000, 90_000, 150, False),  # and it works in its workspace meanwhile
        (100_000, 0, 90_000, False),  # it writes and deletes, again and again
        (100_000, 150, 90_000, False),
        (100_000, 200, 200, True),
        (1_300, 200, 150, False),  # what others do is not its fault as long as the disk is not almost full
        (1_000, 60, 90_000, False),
        (1_000, 80, 80, True),
    ],
)
def test_only_what_it_may_have_used_is_held_against_it(
    machine: Machine, watch: Watch, free: int, gone: int, written: int, killed: bool
) -> None:
    machine.free = free
    watch._most = 0
    watch._check()
    machine.free -= gone
    machine.written += written
    watch._check()
    assert (watch.hits, watch.last_limit) == ((1, "disk") if killed else (0, ""))
    watch._check()  # one kill, then all is even
    assert watch.hits == killed


def test_what_others_free_is_not_its_credit(machine: Machine, watch: Watch) -> None:
    machine.free += 1000
    watch._check()
    machine.free -= 200
    machine.written += 200
    watch._check()
    assert watch.hits == 1


def test_deleted_files_count_once_however_they_are_kept(tmp_path: Path) -> None:
    def used() -> int:
        return files.deleted_bytes([os.getpid()], tmp_path)

    path = tmp_path / "file"
    before = used()
    with open(path, "w+b") as file:
        file.write(bytes(_MB))
        file.flush()
        with mmap.mmap(file.fileno(), 4096):
            assert used() == before
            path.unlink()
            assert used() - before == _MB
    assert used() == before


def test_what_a_dead_child_wrote_is_told_before_and_after_it_is_waited_for(tmp_path: Path) -> None:
    before = files.written_bytes([os.getpid()])
    child = os.fork()
    if child == 0:
        (tmp_path / "file").write_bytes(bytes(_MB))
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert files.written_bytes([os.getpid()]) - before >= _MB
    os.waitpid(child, 0)
    assert files.written_bytes([os.getpid()]) - before >= _MB


def test_free_and_written_bytes_are_told(tmp_path: Path) -> None:
    before = files.written_bytes([os.getpid()])
    (tmp_path / "file").write_bytes(bytes(_MB))
    assert files.written_bytes([os.getpid(), 2**30]) - before >= _MB
    assert files.free_bytes(tmp_path) > 0
    assert files.free_bytes(tmp_path / "absent") == 0
