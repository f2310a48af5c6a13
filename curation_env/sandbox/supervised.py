"""Everything that the real engines have in common: they differ only in how the first process is brought up.

An engine starts `agent.py` as the first process of an isolated set of processes and connects to it; commands,
time-outs, kills, freezing, files and the watch over the workspace's size are the same code for all of them.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path

from curation_env.errors import SandboxError
from curation_env.sandbox import files
from curation_env.sandbox.base import WORKSPACE, Command, ExecResult, SandboxConfig, SandboxDied
from curation_env.sandbox.hosted import HostedFiles
from curation_env.sandbox.link import MAX_ARGUMENT, AgentLink, AgentProcess, Capture, Pending, Sink
from curation_env.sandbox.watch import Watch

_MB = 1 << 20


class SupervisedSandbox(HostedFiles):
    """A sandbox whose first process is the agent. Engines implement `_launch`, `_teardown` and, as far as they can
    tell, the counters that name the limit which ended a command."""

    def __init__(self, config: SandboxConfig) -> None:
        super().__init__(config)
        self._link: AgentLink | None = None
        self._watch: Watch | None = None
        self._env: dict[str, str] = {}
        self._forks_seen = 0
        self._frozen = False

    # -- what an engine does

    @abstractmethod
    def _launch(self) -> tuple[AgentLink, dict[str, str]]:
        """Bring the agent up; returns the connection and the environment of commands."""

    @abstractmethod
    def _teardown(self) -> None:
        """End whatever `_launch` made, also after it failed half-way. Never raises."""

    def _memory_kills(self) -> int:
        """How many processes were killed for memory so far."""
        return 0

    def _refused_forks(self) -> int:
        """How often the limit of processes was hit so far."""
        return 0

    def _over_limit(self) -> str:
        """The limit that is found broken at this moment, or "". A refused fork counts: what made a fork bomb's limit
        bite must not go on in the background."""
        refused = self._refused_forks()
        if refused > self._forks_seen:
            self._forks_seen = refused
            return "processes"
        return ""

    def _pids(self) -> list[int]:
        """The processes inside as the host numbers them, as far as the engine can tell."""
        return []

    def _rlimits(self) -> dict[str, int]:
        """Resource limits of every command, by their names without RLIMIT_."""
        return {"CORE": 0, "NOFILE": 4096, "FSIZE": self.config.limits.file_mb * _MB}

    # -- the contract

    def start(self) -> None:
        if self.alive():
            return
        self.stop()
        self.config.workspace.mkdir(parents=True, exist_ok=True)
        try:
            self._link, self._env = self._launch()
            self._frozen = False
            self._forks_seen = 0
            self._watch = Watch(
                self.config,
                other=self._over_limit,
                enforce=self._enforce,
                pids=self._pids,
                give_up=self._link.break_off,
            )
        except BaseException:
            self.stop()
            raise

    def exec(
        self,
        command: Command,
        *,
        timeout: float,
        stdin: bytes = b"",
        env: Mapping[str, str] | None = None,
        cwd: str = WORKSPACE,
    ) -> ExecResult:
        begin = time.monotonic()
        self._living()
        watch = self._watch
        assert watch is not None
        out = Capture(self.config.limits.output_bytes)
        timed_out = refused = False
        while True:
            with watch.lock:
                self._settle()
                if refused:
                    self.kill_all()
                full, seen = watch.full, watch.hits
                memory, forks = self._memory_kills(), self._refused_forks()
                process = self._start_command(command, env, cwd, out)
            process.feed(stdin)
            try:
                process.wait(max(0.0, begin + timeout - time.monotonic()))
            except TimeoutError:
                timed_out = True
                process.kill()
            # Where earlier commands' background processes use up the process limit, they go, and the command is tried
            # once more: they must not be able to lock the agent out.
            if refused or not process.refused:
                break
            refused = True
        code = process.wait()
        limit = ""
        if watch.hits > seen:
            limit = watch.last_limit
        elif self._memory_kills() > memory:
            limit = "memory"
        elif process.refused or self._refused_forks() > forks:
            limit = "processes"
        stderr = process.stderr
        if process.refused:
            stderr += f"sandbox: no process could be started: {process.refused}\n".encode()
        if full:
            limits = self.config.limits
            stderr += (
                f"sandbox: the workspace is over its limit ({limits.disk_mb} MB, {limits.files} files): "
                "nothing can be written until files are deleted\n"
            ).encode()
        truncated = out.truncated or process.errors_truncated
        return ExecResult(code, out.value(), stderr, truncated, timed_out, time.monotonic() - begin, limit)

    def popen(self, command: Command, *, env: Mapping[str, str] | None = None, cwd: str = WORKSPACE) -> AgentProcess:
        self._living()
        assert self._watch is not None
        with self._watch.lock:
            self._settle()
            process = self._start_command(command, env, cwd, Pending(self.config.limits.output_bytes))
        if process.poll() is not None and process.refused:
            raise SandboxError(f"no process could be started: {process.refused}")
        return process

    def restore(self, source: Path) -> None:
        if self.alive():
            self.kill_all()
        super().restore(source)

    def freeze(self) -> None:
        if not self._living().request("freeze"):
            raise SandboxError("the sandbox could not be frozen")
        self._frozen = True

    def thaw(self) -> None:
        if self._frozen:
            self._frozen = False
            self._living().request("thaw")

    def kill_all(self) -> None:
        self._frozen = False
        if not self._living().request("kill_all"):
            raise SandboxError("a process in the sandbox could not be killed")

    def alive(self) -> bool:
        return self._link is not None and self._link.alive()

    def stop(self) -> None:
        if self._watch is not None:
            self._watch.stop()
            self._watch = None
        if self._link is not None:
            self._link.close()
            self._link = None
        self._frozen = False
        self._teardown()

    # -- parts

    def _settle(self) -> None:
        """What an earlier command left behind must not be held against the next one."""
        files.keep_own(self.config.workspace)
        if self._over_limit():
            self.kill_all()

    def _start_command(self, command: Command, env: Mapping[str, str] | None, cwd: str, sink: Sink) -> AgentProcess:
        if self._frozen:
            raise SandboxError("the sandbox is frozen: thaw it first")
        script = None
        if isinstance(command, str):
            text = command.encode()
            if len(text) > MAX_ARGUMENT:
                script, argv = text, [self._shell(), "/dev/fd/3"]
            else:
                argv = [self._shell(), "-c", command]
        else:
            argv = list(command)
        if not argv or any("\0" in part for part in (*argv, cwd)):
            raise ValueError("a command is not empty and has no NUL characters")
        rlimits = self._rlimits()
        if self._watch is not None and self._watch.full:
            rlimits["FSIZE"] = 0
        return self._living().spawn(
            argv,
            script=script,
            env={**self._env, **(env or {})},
            cwd=cwd,
            rlimits=rlimits,
            sink=sink,
            limit=self.config.limits.output_bytes,
        )

    def _shell(self) -> str:
        return "bash"

    def _living(self) -> AgentLink:
        if self._link is None:
            raise SandboxDied("the sandbox is not running: start it")
        return self._link

    def _enforce(self) -> None:
        """The watch found a limit broken."""
        if self.alive():
            self.kill_all()
