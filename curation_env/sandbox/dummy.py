"""The engine for tests of everything above a sandbox: real files, scripted commands, no process.

```python
sandbox = DummySandbox(config, script={"curation task": "rows: 960", r"python .*": write_submission})
```
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

from curation_env.errors import SandboxError
from curation_env.sandbox.base import (
    KILLED,
    WORKSPACE,
    Command,
    ExecResult,
    SandboxConfig,
    SandboxDied,
    SandboxProcess,
)
from curation_env.sandbox.hosted import HostedFiles
from curation_env.sandbox.link import CHUNK, Capture

Answer = str | bytes | ExecResult | Exception | Callable[["DummySandbox", str, bytes], "Answer"]
"""What a command gives: stdout, a whole result, an error to raise, or a function of (sandbox, command, stdin)."""


class DummySandbox(HostedFiles):
    """Answers the first pattern of `script` that matches the whole command; one that matches none exits with 127.

    Files, snapshots and limits of their sizes are as in the real engines. A result whose `seconds` exceed the time-out
    is given as timed out, at once.
    """

    kind = "dummy"

    def __init__(self, config: SandboxConfig, script: Mapping[str, Answer] | None = None) -> None:
        super().__init__(config)
        self.script: dict[str, Answer] = dict(script or {})
        self.commands: list[str] = []
        self._running = False
        self._frozen = False

    def start(self) -> None:
        self.config.workspace.mkdir(parents=True, exist_ok=True)
        self._running = True

    def exec(
        self,
        command: Command,
        *,
        timeout: float,
        stdin: bytes = b"",
        env: Mapping[str, str] | None = None,
        cwd: str = WORKSPACE,
    ) -> ExecResult:
        text = self._record(command)
        answer: Answer = ExecResult(127, b"", f"sandbox: {text}: not in the script\n".encode(), False, False, 0.0)
        for pattern, scripted in self.script.items():
            if re.fullmatch(pattern, text, re.DOTALL):
                answer = scripted
                break
        while callable(answer):
            answer = answer(self, text, stdin)
        if isinstance(answer, Exception):
            if isinstance(answer, SandboxDied):
                self._running = False
            raise answer
        if isinstance(answer, str | bytes):
            data = answer.encode() if isinstance(answer, str) else answer
            answer = ExecResult(0, data, b"", False, False, 0.0)
        if answer.seconds > timeout:
            return ExecResult(KILLED, b"", b"", False, True, timeout)
        out, err = (Capture(self.config.limits.output_bytes) for _ in range(2))
        out.add(answer.stdout)
        err.add(answer.stderr)
        cut = answer.truncated or out.truncated or err.truncated
        return replace(answer, stdout=out.value(), stderr=err.value(), truncated=cut)

    def popen(self, command: Command, *, env: Mapping[str, str] | None = None, cwd: str = WORKSPACE) -> SandboxProcess:
        return DummyProcess(self, self._record(command))

    def freeze(self) -> None:
        self._must_run()
        self._frozen = True

    def thaw(self) -> None:
        self._frozen = False

    def kill_all(self) -> None:
        self._must_run()
        self._frozen = False

    def alive(self) -> bool:
        return self._running

    def stop(self) -> None:
        self._running = self._frozen = False

    def _record(self, command: Command) -> str:
        self._must_run()
        if self._frozen:
            raise SandboxError("the sandbox is frozen: thaw it first")
        text = command if isinstance(command, str) else " ".join(command)
        if not text:
            raise ValueError("a command is not empty")
        self.commands.append(text)
        return text

    def _must_run(self) -> None:
        if not self._running:
            raise SandboxDied("the sandbox is not running: start it")


class DummyProcess(SandboxProcess):
    """Runs its script when its stdin is closed (or it is waited for), with all that was written to it."""

    def __init__(self, sandbox: DummySandbox, command: str) -> None:
        self._sandbox = sandbox
        self._command = command
        self._input = bytearray()
        self._open = True
        self._result: ExecResult | None = None
        self._given = 0

    def write(self, data: bytes, timeout: float = 60.0) -> None:
        if not self._open:
            raise BrokenPipeError("the command's stdin is closed")
        self._input += data

    def close_stdin(self) -> None:
        if self._open:
            self._open = False
            self._sandbox.commands.pop()  # `exec` records it again
            self._result = self._sandbox.exec(self._command, timeout=float("inf"), stdin=bytes(self._input))

    def read(self, timeout: float) -> bytes:
        if self._result is None:
            time.sleep(min(timeout, 0.01))
            return b""
        piece = self._result.stdout[self._given : self._given + CHUNK]
        self._given += len(piece)
        return piece

    @property
    def eof(self) -> bool:
        return self._result is not None and self._given == len(self._result.stdout)

    @property
    def stderr(self) -> bytes:
        return self._result.stderr if self._result else b""

    def poll(self) -> int | None:
        return self._result.exit_code if self._result else None

    def wait(self, timeout: float | None = None) -> int:
        self.close_stdin()
        assert self._result is not None
        return self._result.exit_code

    def kill(self) -> None:
        self._open = False
        if self._result is None:
            self._result = ExecResult(KILLED, b"", b"", False, False, 0.0)
