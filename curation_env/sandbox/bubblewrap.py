"""The engine for machines without Docker: namespaces made by bubblewrap (0.8 or newer), limits by a control group.

The root inside is the host's /usr, read-only, with a minimal /etc, /proc and /dev; the harness's Python at its own
path. No network, own process, IPC, host-name, cgroup and user namespaces, no capability, no way to gain one, a
system-call filter. As root on the host, commands are root on the host's files too, without capabilities: so /proc and
the device nodes are read-only as well, since the kernel lets a bare uid 0 write settings there.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import socket
import subprocess
from functools import cache
from pathlib import Path

from curation_env.errors import SandboxError
from curation_env.sandbox import agent, cgroup, seccomp
from curation_env.sandbox.base import SandboxConfig, SandboxUnavailable
from curation_env.sandbox.interpreter import harness_interpreter
from curation_env.sandbox.link import AgentLink
from curation_env.sandbox.rootfs import (
    AGENT,
    WORKSPACE,
    StateFolder,
    contents,
    make_mount_points,
    write_etc,
)
from curation_env.sandbox.supervised import SupervisedSandbox

_MB = 1 << 20
_HELP = "apt-get install bubblewrap (0.8 or newer), or build the Docker image: curation-env sandbox build"
_JOIN = 'set -e; n=$1; shift; while [ "$n" -gt 0 ]; do echo $$ >"$1"; shift; n=$((n-1)); done; exec "$@"'
_HOST_ETC = ("alternatives", "ld.so.cache", "ld.so.conf", "ld.so.conf.d")
_HIDDEN_PROC = ("kcore", "kmsg", "keys", "key-users", "timer_list", "kallsyms", "kpagecount", "kpageflags", "cmdline")
_HIDDEN_PROC_FOLDERS = ("acpi", "scsi", "fs", "driver", "sysvipc")
_SYSTEM = tuple(Path("/", name) for name in ("usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32"))
_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
_NVIDIA = ("nvidiactl", "nvidia-uvm", "nvidia-uvm-tools", "nvidia-modeset")


@cache
def bubblewrap_problem() -> str:
    """Why this engine can't be used here, with what to do; "" when it can. Tries it once."""
    program = shutil.which("bwrap")
    if program is None:
        return f"bubblewrap is not installed: {_HELP}"
    version = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout
    numbers = re.findall(r"\d+", version)
    if [int(n) for n in numbers[:2]] < [0, 8]:
        return f"bubblewrap is too old ({version.strip()}): {_HELP}"
    namespaces = ["--unshare-all", "--unshare-user", "--disable-userns", "--proc", "/proc"]
    tried = subprocess.run([program, *_base_system(), *namespaces, "true"], capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        return (
            f"bubblewrap can't make namespaces here ({tried.stderr.strip()}): allow unprivileged user namespaces "
            "(sysctl kernel.unprivileged_userns_clone=1, kernel.apparmor_restrict_unprivileged_userns=0), or use Docker"
        )
    return ""


class BubblewrapSandbox(SupervisedSandbox):
    """See `Sandbox` for the contract, docs/sandbox.md for what differs from Docker."""

    kind = "bubblewrap"

    def __init__(self, config: SandboxConfig) -> None:
        super().__init__(config)
        self._state: StateFolder | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._init_pid = 0
        self._cgroup: cgroup.Cgroup | None = None

    def _launch(self) -> tuple[AgentLink, dict[str, str]]:
        if problem := bubblewrap_problem():
            raise SandboxUnavailable(problem)
        StateFolder.reap()
        self._state = StateFolder()
        interpreter = harness_interpreter(host_usr=True)
        python = str(interpreter.executable)
        inside = contents(self.config, self._state.path, interpreter, python, _system_folders())
        make_mount_points(self.config.workspace, inside.mounts)
        self._cgroup = cgroup.Cgroup.create(self._state.name, self.config.limits)

        ours, theirs = socket.socketpair()
        info_read, info_write = os.pipe()
        empty = self._state.path / "empty"
        empty.touch()
        write_etc(self._state.path / "etc", *self._ids())
        arguments = [*self._namespaces(), "--info-fd", str(info_write)]
        arguments += ["--setenv", agent.FILTER, seccomp.program().hex()]
        arguments += [*_base_system(), *self._kernel_files(empty)]
        for mount in inside.python:
            arguments += ["--ro-bind", str(mount.source), mount.target]
        for path in inside.masked:
            if path.is_dir():
                arguments += ["--tmpfs", str(path), "--remount-ro", str(path)]
            else:
                arguments += ["--ro-bind", str(empty), str(path)]
        arguments += ["--bind", str(self.config.workspace), WORKSPACE]
        for mount in inside.mounts:
            arguments += ["--ro-bind" if mount.read_only else "--bind", str(mount.source), mount.target]
        arguments += ["--remount-ro", "/", "--chdir", WORKSPACE]
        command = ["bwrap", *arguments, "--", python, "-I", "-S", AGENT, str(theirs.fileno())]
        if self._cgroup is not None:
            entries = [str(path) for path in self._cgroup.entries]
            command = ["sh", "-c", _JOIN, "sh", str(len(entries)), *entries, *command]
        log = self._state.path / "log"
        try:
            with log.open("wb") as errors:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=errors,
                    stderr=errors,
                    pass_fds=(theirs.fileno(), info_write),
                    env={"PATH": os.environ.get("PATH", os.defpath)},
                    start_new_session=True,
                )
        finally:
            theirs.close()
            os.close(info_write)
        with open(info_read, "rb") as info:
            told = info.read()
        try:
            self._init_pid = int(json.loads(told)["child-pid"])
            return AgentLink(ours, start_seconds=20.0), inside.env
        except (ValueError, KeyError, SandboxError) as error:
            ours.close()
            details = log.read_text(errors="replace").strip()
            raise SandboxError(f"bubblewrap did not start: {details[-500:]}", details=details) from error

    def _teardown(self) -> None:
        if self._process is not None:
            try:  # the agent leaves when its connection closes, and all processes with it
                self._process.wait(2.0)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._init_pid or self._process.pid, signal.SIGKILL)
                self._process.wait()
            self._process = None
        self._init_pid = 0
        if self._cgroup is not None:
            self._cgroup.remove()
            self._cgroup = None
        if self._state is not None:
            self._state.remove()
            self._state = None

    def _memory_kills(self) -> int:
        return self._cgroup.memory_kills() if self._cgroup else 0

    def _refused_forks(self) -> int:
        return self._cgroup.refused_forks() if self._cgroup else 0

    def _pids(self) -> list[int]:
        if self._cgroup is not None:
            return self._cgroup.pids()
        return [self._init_pid, *agent.children_of(self._init_pid)] if self._init_pid else []

    def _over_limit(self) -> str:
        """Without a control group: count processes and memory by looking, about ten times a second."""
        if self._cgroup is not None or not self._init_pid:
            return super()._over_limit()
        pages = threads = 0
        for pid in self._pids():
            with contextlib.suppress(OSError, IndexError, ValueError):
                pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
                threads += len(os.listdir(f"/proc/{pid}/task"))
        if threads >= self.config.limits.pids:
            return "processes"
        return "memory" if pages * os.sysconf("SC_PAGE_SIZE") > self.config.limits.memory_mb * _MB else ""

    def _rlimits(self) -> dict[str, int]:
        limits = super()._rlimits()
        if self._cgroup is None:
            limits["DATA"] = self.config.limits.memory_mb * _MB
            limits["NPROC"] = self.config.limits.pids  # counted per user namespace; not enforced for the host's root
        return limits

    def _ids(self) -> tuple[int, int]:
        """User and group inside. The host's root is mapped to an ordinary number; files stay the host user's."""
        return os.getuid() or 1000, os.getgid() or 1000

    def _namespaces(self) -> list[str]:
        uid, gid = self._ids()
        return [
            "--unshare-all",
            "--unshare-user",
            "--disable-userns",
            *("--uid", str(uid), "--gid", str(gid)),
            *("--cap-drop", "ALL"),
            *("--hostname", "sandbox"),
            "--as-pid-1",
            "--new-session",
            "--clearenv",
        ]

    def _kernel_files(self, empty: Path) -> list[str]:
        """/proc, /dev, /tmp and /etc: nothing writable but memory of limited size."""
        found: list[str] = ["--proc", "/proc"]
        for name in _HIDDEN_PROC:
            if os.path.exists(f"/proc/{name}"):
                found += ["--ro-bind", str(empty), f"/proc/{name}"]
        for name in _HIDDEN_PROC_FOLDERS:
            if os.path.isdir(f"/proc/{name}"):
                found += ["--tmpfs", f"/proc/{name}", "--remount-ro", f"/proc/{name}"]
        found += ["--remount-ro", "/proc", "--dev", "/dev"]
        gpus = [*(f"nvidia{i}" for i in self.config.gpus), *_NVIDIA] if self.config.gpus else []
        for name in (*_DEVICES, *gpus):
            if os.path.exists(f"/dev/{name}"):
                found += ["--dev-bind", str(self._device(name)), f"/dev/{name}"]
        shared = str(self.config.limits.tmp_mb * _MB)
        found += ["--perms", "1777", "--size", shared, "--tmpfs", "/dev/shm", "--remount-ro", "/dev"]
        found += ["--perms", "1777", "--size", shared, "--tmpfs", "/tmp"]
        assert self._state is not None
        etc = self._state.path / "etc"
        found += ["--ro-bind", str(etc), "/etc"]
        for name in _HOST_ETC:
            host = Path("/etc", name)
            if host.exists():
                (etc / name).mkdir() if host.is_dir() else (etc / name).touch()
                found += ["--ro-bind", str(host), str(host)]
        return found

    def _device(self, name: str) -> Path:
        """A device node to show. Root's commands could change the modes of the host's own nodes: they get copies."""
        host = Path("/dev", name)
        if os.geteuid() != 0:
            return host
        assert self._state is not None
        copy = self._state.path / "dev" / name
        copy.parent.mkdir(exist_ok=True)
        try:
            os.mknod(copy, host.stat().st_mode, host.stat().st_rdev)
            copy.chmod(0o666)
            os.close(os.open(copy, os.O_RDWR | os.O_NONBLOCK | os.O_NOCTTY))
        except OSError as error:
            if error.errno != errno.ENXIO:  # /dev/tty, for a process without a terminal
                raise SandboxError(f"no device node can be made ({error}): set TMPDIR to another disk") from error
        return copy


def _base_system() -> list[str]:
    """The host's /usr, and /bin, /lib and the like as the host has them."""
    found = []
    for path in _system_folders():
        found += ["--ro-bind", str(path), str(path)]
    for path in _SYSTEM:
        if path.is_symlink():
            found += ["--symlink", os.readlink(path), str(path)]
    return found


def _system_folders() -> tuple[Path, ...]:
    return tuple(path for path in _SYSTEM if path.is_dir() and not path.is_symlink())
