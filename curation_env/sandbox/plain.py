"""No isolation at all: commands run as ordinary processes of this user. For a machine that is itself a sandbox, by
explicit choice only (`sandbox=none`). Time-outs, kills, output and file limits hold; nothing is hidden or protected.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Mapping

from curation_env.sandbox import agent
from curation_env.sandbox.base import TOOLS, WORKSPACE, Command, SandboxConfig
from curation_env.sandbox.hosted import below_workspace
from curation_env.sandbox.link import AgentLink, AgentProcess, Sink
from curation_env.sandbox.rootfs import StateFolder, contents
from curation_env.sandbox.supervised import SupervisedSandbox

_MB = 1 << 20


class PlainSandbox(SupervisedSandbox):
    """`/workspace` is the host folder under its own name (also in `cwd`); mounts below it are symbolic links, others
    are not shown. Commands find both by relative paths and by CURATION_WORKSPACE."""

    kind = "none"

    def __init__(self, config: SandboxConfig) -> None:
        super().__init__(config)
        self._state: StateFolder | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def _launch(self) -> tuple[AgentLink, dict[str, str]]:
        self._state = StateFolder()
        inside = contents(self.config, self._state.path, None, sys.executable)
        library = self._state.path / "lib"
        library.mkdir()
        for mount in inside.mounts:
            if mount.target == f"{TOOLS}/lib/curation":
                (library / "curation").symlink_to(mount.source)
            if parts := below_workspace(mount.target):
                link = self.config.workspace.joinpath(*parts)
                link.parent.mkdir(parents=True, exist_ok=True)
                if link.is_symlink():
                    link.unlink()
                link.symlink_to(mount.source.absolute())
        workspace = str(self.config.workspace.absolute())
        env = {
            **inside.env,
            "PATH": f"{self._state.path / 'bin'}:{os.environ.get('PATH', os.defpath)}",
            "PYTHONPATH": str(library),
            "HOME": workspace,
            "CURATION_WORKSPACE": workspace,
            **({"CURATION_SOCKET": str(self.config.socket.absolute())} if self.config.socket else {}),
            **self.config.env,
        }
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", agent.__file__, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={},
                start_new_session=True,
            )
        return AgentLink(ours, start_seconds=20.0), env

    def _teardown(self) -> None:
        if self._process is not None:
            try:
                self._process.wait(6.0)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        for mount in self.config.mounts:
            if parts := below_workspace(mount.target):
                with contextlib.suppress(OSError):
                    self.config.workspace.joinpath(*parts).unlink()
        if self._state is not None:
            self._state.remove()
            self._state = None

    def _start_command(self, command: Command, env: Mapping[str, str] | None, cwd: str, sink: Sink) -> AgentProcess:
        if cwd == WORKSPACE or cwd.startswith(WORKSPACE + "/"):
            cwd = str(self.config.workspace.absolute()) + cwd[len(WORKSPACE) :]
        return super()._start_command(command, env, cwd, sink)

    def _pids(self) -> list[int]:
        return [self._process.pid, *agent.children_of(self._process.pid)] if self._process is not None else []
