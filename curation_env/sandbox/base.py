"""The contract of a sandbox: what every engine promises, with its sizes and its errors.

A sandbox is one long-lived, isolated set of processes over one host folder, `/workspace` inside. The folder outlives
the engine: a sandbox that died is started again over the same files.

Two kinds of error, told apart on purpose:

- `SandboxError` (infrastructure: retried, never charged): the engine failed or the sandbox is dead.
- `OSError` (the agent's doing): a missing file, a symbolic link in place of one, a file over its limit.

What a command inside does (exit codes, time-outs, a killed memory hog) is never an exception: it is an `ExecResult`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Self

from curation_env.errors import SandboxError

WORKSPACE = "/workspace"
SOCKET = "/run/curation/socket"
LAYERS = "/opt/layers"
TOOLS = "/opt/curation"

Command = str | Sequence[str]
"""A string is run by `bash -c` (or `sh -c`); a sequence is an argument vector, run as it is."""

KILLED = 137
"""Exit code of a command that was killed: time-out, limit or `kill_all` (128 + SIGKILL)."""


class SandboxDied(SandboxError):
    """The sandbox is gone (its first process was killed, its engine died). `stop()` and `start()` bring it back."""

    code = "sandbox_died"


class SandboxUnavailable(SandboxError):
    """The engine can't be used on this machine; the message says how to get one."""

    code = "sandbox_unavailable"
    retry = False


@dataclass(frozen=True)
class Mount:
    """A host file or folder that is shown inside at the absolute path `target`; read-only unless said otherwise."""

    source: Path
    target: str
    read_only: bool = True

    def __post_init__(self) -> None:
        parts = self.target.split("/")
        if not self.target.startswith("/") or ".." in parts or self.target.rstrip("/") in ("", WORKSPACE):
            raise ValueError(f"mount target {self.target!r} must be absolute, and neither / nor {WORKSPACE}")


@dataclass(frozen=True)
class SandboxLimits:
    """What one sandbox may use, all its processes together unless said otherwise.

    Attributes:
        memory_mb: Resident memory, `/tmp` and `/dev/shm` included; the largest process over it is killed.
        cpus: Cores' worth of processor time.
        pids: Processes and threads. A fork over it fails, and everything in the sandbox is killed.
        disk_mb: Blocks used in `/workspace`, by deleted files too while a process has them open or mapped. It is
            watched, not reserved: a command that passes it is killed within about half a second, and until the
            workspace is below it again commands can delete files but not write any. Where no look can find what is
            used (descriptors under way between sockets), about as much again and 64 MB can be used before the kill.
        files: Files and folders in `/workspace`, watched like `disk_mb`. Folders nested more than 100 deep break this
            limit too, and what lies deeper is deleted.
        file_mb: Size of a single file.
        tmp_mb: Size of `/tmp`, which lives in memory.
        output_bytes: Bytes that `exec` returns of each of stdout and stderr: beyond it the middle is left out.
    """

    memory_mb: int = 2048
    cpus: float = 1.0
    pids: int = 128
    disk_mb: int = 1024
    output_bytes: int = 1_000_000
    file_mb: int = 512
    tmp_mb: int = 256
    files: int = 200_000


@dataclass(frozen=True)
class SandboxConfig:
    """What a sandbox is made of.

    Attributes:
        workspace: Host folder that is `/workspace` inside; made if missing.
        mounts: Further files and folders, applied in order.
        socket: Host path of a listening Unix socket, shown as `/run/curation/socket`; must exist at `start`.
        env: Added to the few variables that every sandbox has; nothing of the host's environment is passed.
        label: The run, for people and for clean-up of what a killed run left behind.
        layers: Names of tool folders `<data root>/layers/<name>`, shown read-only at `/opt/layers/<name>`, their `bin`
            first on PATH.
        gpus: Indices of NVIDIA devices to pass through.
        hidden: Host folders that nothing inside may see, such as the data root and the runs: they are covered by empty
            ones where they lie in what an engine shows of the host (its /usr, the harness's Python). Mounts from
            within them are shown all the same.
    """

    workspace: Path
    mounts: tuple[Mount, ...] = ()
    socket: Path | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    limits: SandboxLimits = SandboxLimits()
    label: str = ""
    layers: tuple[str, ...] = ()
    gpus: tuple[int, ...] = ()
    hidden: tuple[Path, ...] = ()


@dataclass(frozen=True)
class ExecResult:
    """How a command ended.

    Attributes:
        exit_code: As a shell gives it: 128 + signal when killed, 126 or 127 when it could not be run.
        stdout, stderr: At most `limits.output_bytes` each; whatever bytes the command wrote.
        truncated: Output was left out, in the middle.
        timed_out: The command and all its descendants were killed at its time-out.
        seconds: Wall clock.
        limit: Which limit was hit: "memory", "disk", "files", "processes" or "".
    """

    exit_code: int
    stdout: bytes
    stderr: bytes
    truncated: bool
    timed_out: bool
    seconds: float
    limit: str = ""


class SandboxProcess(ABC):
    """A command under way, with streamed input and output. Not for use by several threads at once."""

    @abstractmethod
    def write(self, data: bytes, timeout: float = 60.0) -> None:
        """Send to its stdin, in full.

        Raises:
            BrokenPipeError: It has closed its stdin, or ended.
            TimeoutError: It did not take everything in time.
        """

    @abstractmethod
    def close_stdin(self) -> None:
        """End its stdin; harmless when done twice."""

    @abstractmethod
    def read(self, timeout: float) -> bytes:
        """What it wrote to stdout since the last call, up to 64 KiB; b"" when nothing came in `timeout` seconds or
        nothing will come any more (then `eof` is true)."""

    @property
    @abstractmethod
    def eof(self) -> bool:
        """Its stdout has been read to the end."""

    @property
    @abstractmethod
    def stderr(self) -> bytes:
        """What it wrote to stderr up to the last `read` or `wait`, bounded by `limits.output_bytes`."""

    @abstractmethod
    def poll(self) -> int | None:
        """Its exit code, or None while it runs. Raises `SandboxDied`."""

    @abstractmethod
    def wait(self, timeout: float | None = None) -> int:
        """Its exit code once it ends; output that comes meanwhile is kept for `read`, up to `limits.output_bytes`.

        Raises:
            TimeoutError: It still runs (and goes on running).
            SandboxDied: The sandbox ended under it.
        """

    @abstractmethod
    def kill(self) -> None:
        """Kill it and every descendant, also those that left its session; returns when they are gone."""


class Sandbox(ABC):
    """One sandbox. A context manager: `start` on entering, `stop` on leaving.

    ```python
    with make_sandbox("auto", SandboxConfig(workspace=folder)) as sandbox:
        result = sandbox.exec("ls pool && python policy.py", timeout=60)
    ```
    """

    kind: ClassVar[str]
    """Which engine this is: "docker", "bubblewrap", "none" or "dummy"; never "auto"."""

    def __init__(self, config: SandboxConfig) -> None:
        self.config = config

    @abstractmethod
    def start(self) -> None:
        """Bring it up over the workspace; a no-op when it is alive, a fresh start when it died.

        Raises:
            SandboxUnavailable: This engine isn't on this machine, or would have to show a folder that is to be hidden.
            SandboxError: It did not come up; `details` has the engine's words.
            FileNotFoundError: A mount's source, a layer, the socket or a hidden folder isn't there.
        """

    @abstractmethod
    def exec(
        self,
        command: Command,
        *,
        timeout: float,
        stdin: bytes = b"",
        env: Mapping[str, str] | None = None,
        cwd: str = WORKSPACE,
    ) -> ExecResult:
        """Run a command to its end, or kill it with all its descendants after `timeout` seconds.

        Processes that a finished command leaves in the background go on, until `kill_all` or `stop`. Arguments and
        environment together are at most 1 MB, a single argument 128 KiB (a command string may be longer).

        Raises:
            SandboxDied: It is dead, before or after.
        """

    @abstractmethod
    def popen(self, command: Command, *, env: Mapping[str, str] | None = None, cwd: str = WORKSPACE) -> SandboxProcess:
        """Start a command without waiting for it. Raises `SandboxDied`."""

    @abstractmethod
    def read(self, path: str, max_bytes: int) -> bytes:
        """A regular file under `/workspace` or a mount, read from the host's side. Works on a stopped sandbox too.

        Relative paths are under `/workspace`. No symbolic link is followed, in any component.

        Raises:
            FileNotFoundError, NotADirectoryError, IsADirectoryError: As their names say.
            PermissionError: A symbolic link, FIFO, socket or device; a path outside.
            OSError: (EFBIG) the file is larger than `max_bytes`.
        """

    @abstractmethod
    def write(self, path: str, data: bytes) -> None:
        """Put a file under `/workspace` (or a writable mount), making folders; replaces whatever file or link is there.

        Raises:
            IsADirectoryError, NotADirectoryError: A folder is in the place of the file, or the reverse.
            PermissionError: A symbolic link in the path, a read-only mount, a path outside.
            OSError: (EFBIG) `data` is larger than `limits.file_mb`.
        """

    @abstractmethod
    def snapshot(self, dest: Path, max_mb: int) -> str:
        """Copy `/workspace`, without its mounts, to the new folder `dest`; returns a digest of names, modes and bytes.

        Links are copied as links; FIFOs, sockets and devices are left out. For a consistent copy `freeze` first.

        Raises:
            FileExistsError: `dest` is there.
            OSError: (EFBIG) more than `max_mb` of files, holes counted, or more files than `limits.files`; nothing is
                left at `dest`.
        """

    @abstractmethod
    def restore(self, source: Path) -> None:
        """Kill every process and make `/workspace` equal to a folder that `snapshot` wrote."""

    @abstractmethod
    def freeze(self) -> None:
        """Stop every process where it is. `exec` and `popen` raise `SandboxError` until `thaw`; `kill_all` works."""

    @abstractmethod
    def thaw(self) -> None:
        """Let frozen processes go on; harmless when nothing is frozen."""

    @abstractmethod
    def kill_all(self) -> None:
        """Kill every process but the supervisor, and thaw. Returns when they are gone. Raises `SandboxDied`."""

    @abstractmethod
    def alive(self) -> bool:
        """Whether it can take a command."""

    @abstractmethod
    def stop(self) -> None:
        """End it and everything in it. Leaves no process, mount, container or temporary file; the workspace stays.
        Harmless when it never started or died."""

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
