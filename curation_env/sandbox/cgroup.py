"""A control group for one sandbox: memory, processes and processor time, hard-limited by the kernel.

Both versions of the interface are served, since machines have either; where neither can be written (an unprivileged
user without delegation, a container with a read-only /sys) `Cgroup.create` gives None and the engine falls back.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path

from curation_env.sandbox.base import SandboxLimits

ROOT = Path("/sys/fs/cgroup")
_PERIOD = 100_000


@dataclass(frozen=True)
class Cgroup:
    """The folders of one group: a single one in version 2, one per controller in version 1."""

    folders: dict[str, Path]
    version: int

    @classmethod
    def create(cls, name: str, limits: SandboxLimits) -> Cgroup | None:
        """A new group with the limits set, or None where that can't be done."""
        for make in (_create_v2, _create_v1):
            group = make(name, limits)
            if group is not None:
                return group
        return None

    @property
    def entries(self) -> list[Path]:
        """Files that a process writes its id to, to join."""
        return [folder / "cgroup.procs" for folder in dict.fromkeys(self.folders.values())]

    def pids(self) -> list[int]:
        with contextlib.suppress(OSError):
            return [int(line) for line in self.entries[0].read_text().split()]
        return []

    def memory_kills(self) -> int:
        """How many processes the kernel has killed for memory so far."""
        return _counter(self.folders["memory"] / _MEMORY_EVENTS[self.version], "oom_kill")

    def refused_forks(self) -> int:
        """How often the limit of processes was hit so far."""
        return _counter(self.folders["pids"] / "pids.events", "max")

    def remove(self) -> None:
        """Once its processes are gone; waits a moment for the last to leave."""
        for folder in dict.fromkeys(self.folders.values()):
            for _ in range(100):
                try:
                    folder.rmdir()
                except FileNotFoundError:
                    break
                except OSError:
                    time.sleep(0.02)
                else:
                    break


_MEMORY_EVENTS = {1: "memory.oom_control", 2: "memory.events"}


def of_process(pid: int) -> Cgroup | None:
    """The group that a running process is in (a container's), for reading its counters; None where it can't be told."""
    paths = _paths(pid)
    if "" in paths and (ROOT / "cgroup.controllers").exists():
        folder = ROOT / paths[""].lstrip("/")
        return Cgroup({"memory": folder, "pids": folder}, 2) if (folder / "memory.events").exists() else None
    folders: dict[str, Path] = {c: ROOT / c / paths[c].lstrip("/") for c in ("memory", "pids") if c in paths}
    if len(folders) == 2 and all(folder.is_dir() for folder in folders.values()):
        return Cgroup(folders, 1)
    return None


def remove_by_name(name: str) -> None:
    """Remove the group `name` wherever this process could have made it (its owner was killed)."""
    paths = _paths(os.getpid())
    candidates = [parent / name for parent in _parents_v2(paths)]
    candidates += [ROOT / c / paths.get(c, "").lstrip("/") / name for c in ("memory", "pids", "cpu")]
    for folder in candidates:
        if folder.is_dir():
            Cgroup({"memory": folder}, 1).remove()


def _paths(pid: int) -> dict[str, str]:
    """Controller -> path ("" for version 2) from /proc/<pid>/cgroup."""
    found: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            found.update(dict.fromkeys(controllers.split(","), path))
    return found


def _parents_v2(paths: dict[str, str]) -> list[Path]:
    """Groups, innermost first, that hand memory and pids on to their children."""
    if "" not in paths or not (ROOT / "cgroup.controllers").exists():
        return []
    own = ROOT / paths[""].lstrip("/")
    found = []
    for folder in (own, *own.parents):
        if not str(folder).startswith(str(ROOT)):
            break
        with contextlib.suppress(OSError):
            if {"memory", "pids"} <= set((folder / "cgroup.subtree_control").read_text().split()):
                found.append(folder)
    return found


def _create_v2(name: str, limits: SandboxLimits) -> Cgroup | None:
    for parent in _parents_v2(_paths(os.getpid())):
        folder = parent / name
        group = Cgroup({"memory": folder, "pids": folder}, 2)
        try:
            folder.mkdir()
            (folder / "memory.max").write_text(str(limits.memory_mb << 20))
            (folder / "pids.max").write_text(str(limits.pids))
        except OSError:
            group.remove()
            continue
        with contextlib.suppress(OSError):  # neither is everywhere, nor needed for the others
            (folder / "memory.swap.max").write_text("0")
        with contextlib.suppress(OSError):
            (folder / "cpu.max").write_text(f"{int(limits.cpus * _PERIOD)} {_PERIOD}")
        return group
    return None


def _create_v1(name: str, limits: SandboxLimits) -> Cgroup | None:
    paths = _paths(os.getpid())
    if not {"memory", "pids", "cpu"} <= set(paths):
        return None
    folders: dict[str, Path] = {c: ROOT / c / paths[c].lstrip("/") / name for c in ("memory", "pids", "cpu")}
    group = Cgroup(folders, 1)
    try:
        for folder in group.folders.values():
            folder.mkdir()
        (group.folders["memory"] / "memory.limit_in_bytes").write_text(str(limits.memory_mb << 20))
        (group.folders["pids"] / "pids.max").write_text(str(limits.pids))
        (group.folders["cpu"] / "cpu.cfs_period_us").write_text(str(_PERIOD))
        (group.folders["cpu"] / "cpu.cfs_quota_us").write_text(str(int(limits.cpus * _PERIOD)))
    except OSError:
        group.remove()
        return None
    with contextlib.suppress(OSError):  # only where the kernel accounts for swap
        (group.folders["memory"] / "memory.memsw.limit_in_bytes").write_text(str(limits.memory_mb << 20))
    return group


def _counter(file: Path, name: str) -> int:
    """Of a small file of the kernel's; read without Python's file objects, since every command asks several times."""
    with contextlib.suppress(OSError):
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            text = os.read(descriptor, 4096).decode()
        finally:
            os.close(descriptor)
        for line in text.splitlines():
            key, _, value = line.partition(" ")
            if key == name:
                return int(value)
    return 0
