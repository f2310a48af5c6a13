"""What every engine shows inside besides a base system: tools, Python, layers, the socket, the mounts."""

from __future__ import annotations

import compileall
import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

from curation_env.assets import data_root
from curation_env.locks import is_locked, locked
from curation_env.sandbox import cgroup, files
from curation_env.sandbox.base import LAYERS, SOCKET, TOOLS, WORKSPACE, Mount, SandboxConfig, SandboxUnavailable
from curation_env.sandbox.hosted import below_workspace
from curation_env.sandbox.interpreter import Interpreter, is_below, outermost

AGENT = f"{TOOLS}/agent.py"
_HERE = Path(__file__).resolve().parent
_WORKSPACE_MODULE = _HERE.parent / "workspace"


@dataclass(frozen=True)
class Contents:
    """Mounts and masks to apply in this order, and the environment of every command."""

    python: tuple[Mount, ...]
    masked: tuple[Path, ...]
    mounts: tuple[Mount, ...]
    env: dict[str, str]


class StateFolder:
    """A sandbox's own temporary folder on the host, locked while its owner lives, so that others can clean up after
    one that was killed."""

    def __init__(self) -> None:
        self.root = Path(tempfile.gettempdir()) / f"curation-sandbox-{os.getuid()}"
        self.root.mkdir(mode=0o700, exist_ok=True)
        info = self.root.lstat()
        if info.st_uid != os.getuid() or not stat.S_ISDIR(info.st_mode):
            raise PermissionError(f"{self.root} is not a folder of this user")
        with locked(self.root / "lock"):
            self.path = Path(tempfile.mkdtemp(dir=self.root))
            self._lock = os.open(self.path / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.name = f"curation-{os.getuid()}-{self.path.name}"

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.close(self._lock)

    @staticmethod
    def owned(path: Path) -> bool:
        """Whether the sandbox of this folder has a living owner."""
        return is_locked(path / "lock")

    @staticmethod
    def reap() -> int:
        """Remove the folders, and control groups, of owners that are dead. Returns how many."""
        root = Path(tempfile.gettempdir()) / f"curation-sandbox-{os.getuid()}"
        found = []
        if root.is_dir():
            with locked(root / "lock"):
                found = [path for path in root.iterdir() if path.is_dir() and not StateFolder.owned(path)]
        for path in found:
            cgroup.remove_by_name(f"curation-{os.getuid()}-{path.name}")
            shutil.rmtree(path, ignore_errors=True)
        return len(found)


def contents(
    config: SandboxConfig, state: Path, interpreter: Interpreter | None, python: str, system: tuple[Path, ...] = ()
) -> Contents:
    """What `config` asks for. `interpreter` is None where the base system has its own `python`; `system` are the
    folders of the host that the engine shows at their own paths besides.

    Raises:
        FileNotFoundError: A mount's source, a layer, the socket or a hidden folder is missing.
        SandboxUnavailable: A hidden folder can't be hidden.
    """
    write_launchers(state / "bin", python)
    with contextlib.suppress(OSError):  # so that the module starts fast; a read-only install has its bytecode already
        compileall.compile_dir(_WORKSPACE_MODULE, quiet=2)
    mounts = [
        Mount(_HERE / "agent.py", AGENT),
        Mount(state / "bin", f"{TOOLS}/bin"),
        Mount(_WORKSPACE_MODULE, f"{TOOLS}/lib/curation"),
    ]
    path = [f"{TOOLS}/bin"]
    for name in config.layers:
        layer = data_root() / "layers" / name
        if not layer.is_dir():
            raise FileNotFoundError(f"layer {name!r} is not there: make the folder {layer} (its bin/ goes on PATH)")
        mounts.append(Mount(layer, f"{LAYERS}/{name}"))
        path.append(f"{LAYERS}/{name}/bin")
    if config.socket is not None:
        if not config.socket.is_socket():
            raise FileNotFoundError(f"{config.socket} is not a Unix socket: start the session before the sandbox")
        mounts.append(Mount(config.socket, SOCKET))
    mounts += config.mounts
    for mount in mounts:
        if not mount.source.exists():
            raise FileNotFoundError(f"{mount.source}, to be mounted at {mount.target}, is not there")
    python_mounts: list[Mount] = []
    if interpreter is not None:
        python_mounts = [Mount(p, str(p)) for p in (*interpreter.folders, *interpreter.files)]
    threads = str(max(1, int(config.limits.cpus)))
    env = {
        "PATH": ":".join([*path, "/usr/local/bin", "/usr/bin", "/bin"]),
        "HOME": WORKSPACE,
        "USER": "curation",
        "LANG": "C.UTF-8",
        "TERM": "dumb",
        "TMPDIR": "/tmp",
        "PYTHONPATH": f"{TOOLS}/lib",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": threads,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "CURATION_WORKSPACE": WORKSPACE,
        **({"CURATION_SOCKET": SOCKET} if config.socket is not None else {}),
        **config.env,
    }
    masked = outermost([*(interpreter.masked if interpreter else ()), *_covers(config, interpreter, system)])
    return Contents(tuple(python_mounts), tuple(masked), tuple(mounts), env)


def _covers(config: SandboxConfig, interpreter: Interpreter | None, system: tuple[Path, ...]) -> list[Path]:
    """Where the hidden folders would be seen in what is shown of the host."""
    shown = [*system, *(interpreter.folders if interpreter else ())]
    needed = [interpreter.executable.parent, *interpreter.prefixes] if interpreter else []
    found = []
    for hidden in config.hidden:
        real = hidden.resolve(strict=True)
        for mount in (Mount(config.workspace, "/-"), *config.mounts):
            if is_below(real, mount.source.resolve()):
                raise SandboxUnavailable(
                    f"{hidden} must stay hidden, but lies in {mount.source}, which is shown inside"
                )
        for folder in shown:
            real_folder = folder.resolve()
            if not is_below(real, real_folder):
                continue
            if real == real_folder or any(is_below(path.resolve(), real) for path in needed):
                raise SandboxUnavailable(
                    f"{hidden} must stay hidden, but the harness's Python lies in it and is shown: put the data "
                    "root (CURATION_ENV_DATA) and the runs (run_dir) elsewhere"
                )
            found.append(folder / real.relative_to(real_folder))
    return found


def write_launchers(folder: Path, python: str) -> None:
    """`python`, `python3` and `curation`, for PATH."""
    # -P: a file of the agent's in the working folder must not stand in for a module that the command imports.
    folder.mkdir(exist_ok=True)
    for name, arguments in (("python", ""), ("python3", ""), ("curation", " -P -m curation")):
        launcher = folder / name
        launcher.write_text(f'#!/bin/sh\nexec "{python}"{arguments} "$@"\n')
        launcher.chmod(0o755)


def write_etc(folder: Path, uid: int, gid: int) -> None:
    """The few files of /etc that programs expect: who I am, and that localhost is all there is."""
    folder.mkdir(exist_ok=True)
    root = "root:x:0:0:root:/:/bin/sh\n" if uid != 0 else ""
    (folder / "passwd").write_text(f"{root}curation:x:{uid}:{gid}:curation:{WORKSPACE}:/bin/sh\n")
    (folder / "group").write_text(f"{'root:x:0:' + chr(10) if gid != 0 else ''}curation:x:{gid}:\n")
    (folder / "hosts").write_text("127.0.0.1 localhost sandbox\n::1 localhost\n")
    (folder / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")


def make_mount_points(workspace: Path, mounts: tuple[Mount, ...]) -> None:
    """Make the mount points that lie in the workspace from our side, so that no engine makes them as another user or
    through a link that the agent planted."""
    workspace.mkdir(parents=True, exist_ok=True)
    for mount in mounts:
        if parts := below_workspace(mount.target):
            files.make_mount_point(workspace, parts, folder=mount.source.is_dir())
