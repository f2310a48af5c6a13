"""What the sandbox tests share: every real engine, started over a fresh workspace."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from curation_env.sandbox import Sandbox, SandboxConfig, SandboxLimits, make_sandbox
from curation_env.sandbox.bubblewrap import bubblewrap_problem
from curation_env.sandbox.docker import docker_problem

ENGINES = ("bubblewrap", "docker")

# Small, so that hogs hit them soon.
LIMITS = SandboxLimits(
    memory_mb=256, cpus=1.0, pids=64, disk_mb=32, output_bytes=100_000, file_mb=16, tmp_mb=32, files=3000
)


_naps = itertools.count(1000)


def new_nap() -> str:
    """A number of seconds that no other test sleeps, by which its processes are found."""
    return f"{next(_naps)}.{os.getpid()}"


def engine(kind: str, workspace: Path, **config: object) -> Sandbox:
    """A sandbox of one real engine; a failure with the instruction where the engine isn't there."""
    problem = docker_problem() if kind == "docker" else bubblewrap_problem()
    assert not problem, f"{problem} (for the tests: bash .ci/docker.sh)"
    return make_sandbox(kind, SandboxConfig(workspace=workspace, **{"limits": LIMITS, "label": "tests", **config}))  # type: ignore[arg-type]


def text(sandbox: Sandbox, command: str, timeout: float = 20.0) -> str:
    """stdout of a command that must succeed."""
    result = sandbox.exec(command, timeout=timeout)
    assert result.exit_code == 0, (command, result)
    return result.stdout.decode()


def host_processes(marker: str) -> list[int]:
    """Processes of this machine with `marker` among their arguments."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            try:
                arguments = Path(f"/proc/{name}/cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if marker.encode() in arguments:
                found.append(int(name))
    return found


def as_ordinary_user(function: Callable[[Path], None]) -> None:
    """Call a function with an empty folder, in a process that has no privileges: as `nobody` where this one is root."""
    folder = Path(tempfile.mkdtemp(dir="/tmp", prefix="unprivileged-"))  # not below a folder that only root may enter
    try:
        if os.getuid() == 0:
            os.chown(folder, 65534, 65534)
        child = os.fork()
        if child == 0:
            try:
                if os.getuid() == 0:
                    os.setgroups([])
                    os.setresgid(65534, 65534, 65534)
                    os.setresuid(65534, 65534, 65534)
                function(folder)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        assert os.waitpid(child, 0)[1] == 0, "see its standard error"
    finally:
        subprocess.run(["chmod", "-R", "u+rwx", str(folder)], check=True)
        shutil.rmtree(folder)


def until(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True
