"""The host's end of a sandbox: the connection to its first process (`agent.py`) and the commands started through it."""

from __future__ import annotations

import array
import contextlib
import fcntl
import json
import os
import select
import socket
import struct
import termios
import threading
import time
from collections.abc import Mapping
from typing import Protocol

from curation_env.sandbox.base import KILLED, SandboxDied, SandboxProcess

CHUNK = 65536
MAX_ARGUMENT = 131_072 - 1
MAX_REQUEST = 1_000_000
ANSWER_SECONDS = 10.0


class AgentLink:
    """The one connection to a sandbox's first process. Its answers are untrusted: bounded, and only about commands."""

    def __init__(self, sock: socket.socket, start_seconds: float) -> None:
        self._sock = sock
        self._lock = threading.Lock()
        self._dead = False
        self.processes: set[AgentProcess] = set()
        """Those that have not ended."""
        self._line(start_seconds)

    def alive(self) -> bool:
        if self._dead:
            return False
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        try:
            return not poll.poll(0) or self._sock.recv(1, socket.MSG_PEEK) != b""
        except OSError:
            return False

    def request(self, op: str) -> bool:
        """`ping`, `kill_all`, `freeze` or `thaw`: whether it worked. Raises `SandboxDied`."""
        with self._lock:
            self._send({"op": op}, [])
            return self._line(ANSWER_SECONDS).get("ok") is True

    def spawn(
        self,
        argv: list[str],
        *,
        script: bytes | None,
        env: Mapping[str, str],
        cwd: str,
        rlimits: Mapping[str, int],
        sink: Sink,
        limit: int,
    ) -> AgentProcess:
        """Start a command. `script` is what descriptor 3 reads. Raises `SandboxDied`, `ValueError` (too long)."""
        request: dict[str, object] = {
            "op": "spawn",
            "argv": argv,
            "env": dict(env),
            "cwd": cwd,
            "rlimits": dict(rlimits),
        }
        host_control, control = socket.socketpair()
        stdin, host_stdin = os.pipe()
        host_stdout, stdout = os.pipe()
        host_stderr, stderr = os.pipe()
        given = [control.fileno(), stdin, stdout, stderr]
        if script is not None:
            given.append(os.memfd_create("command"))
            with open(given[-1], "wb", closefd=False) as file:
                file.write(script)
            os.lseek(given[-1], 0, os.SEEK_SET)
        try:
            with self._lock:
                self._send(request, given)
        except BaseException:
            for fd in (host_stdin, host_stdout, host_stderr):
                os.close(fd)
            host_control.close()
            raise
        finally:
            control.close()
            for fd in given[1:]:
                os.close(fd)
        process = AgentProcess(self, host_control, host_stdin, host_stdout, host_stderr, sink, limit)
        self.processes.add(process)
        return process

    def break_off(self) -> None:
        """Ends the sandbox under whoever uses it, from any thread: they are told that it died."""
        self._dead = True
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Ends the sandbox: its first process leaves when this connection goes."""
        self._dead = True
        for process in list(self.processes):
            process.close()
        self._sock.close()

    def _send(self, request: dict[str, object], fds: list[int]) -> None:
        body = json.dumps(request).encode()
        if len(body) > MAX_REQUEST:
            raise ValueError(f"a command's arguments and environment are limited to {MAX_REQUEST} bytes")
        if self._dead:
            raise SandboxDied("the sandbox is not running: start it again")
        try:
            self._sock.settimeout(ANSWER_SECONDS)
            message = struct.pack("!I", len(body)) + body
            sent = socket.send_fds(self._sock, [message], fds)
            if sent < len(message):
                self._sock.sendall(message[sent:])
        except OSError as error:
            self._dead = True
            raise SandboxDied(f"the sandbox died ({error}): start it again") from error

    def _line(self, timeout: float) -> dict[str, object]:
        end = time.monotonic() + timeout
        line = b""
        try:
            while not line.endswith(b"\n") and len(line) < 4096:
                self._sock.settimeout(max(0.001, end - time.monotonic()))
                piece = self._sock.recv(4096)  # an answer a request: nothing follows this one
                if not piece:
                    raise ConnectionError("its first process ended")
                line += piece
            answer = json.loads(line)
        except (OSError, ValueError) as error:
            self._dead = True
            raise SandboxDied(f"the sandbox died ({error or 'no answer'}): start it again") from error
        return answer if isinstance(answer, dict) else {}


class Sink(Protocol):
    """Where a command's stdout goes."""

    def add(self, data: bytes) -> None: ...


class Capture:
    """Keeps the first and the last part of a stream, `limit` bytes in all."""

    def __init__(self, limit: int) -> None:
        self._half = max(limit - 64, 0) // 2
        self._head = bytearray()
        self._tail = bytearray()
        self.seen = 0
        self.limit = limit

    def add(self, data: bytes) -> None:
        self.seen += len(data)
        room = self._half - len(self._head)
        if room > 0:
            self._head += data[:room]
            data = data[room:]
        self._tail += data
        if len(self._tail) > 2 * self._half + 128 + CHUNK:
            del self._tail[: len(self._tail) - (self._half + 64)]

    @property
    def truncated(self) -> bool:
        return self.seen > self.limit

    def value(self) -> bytes:
        if not self.truncated:
            return bytes(self._head + self._tail)
        left_out = self.seen - 2 * self._half
        note = b"\n[... %d bytes left out ...]\n" % left_out
        return (bytes(self._head) + note + bytes(self._tail[len(self._tail) - self._half :]))[: self.limit]


class Pending:
    """What waits for `SandboxProcess.read`; beyond `limit` the newest is dropped."""

    def __init__(self, limit: int) -> None:
        self.data = bytearray()
        self._limit = limit

    def add(self, data: bytes) -> None:
        self.data += data[: max(self._limit - len(self.data), 0)]


class AgentProcess(SandboxProcess):
    """A command behind a runner: three pipes that the host holds, and the control socket that tells how it ended."""

    def __init__(
        self,
        link: AgentLink,
        control: socket.socket,
        stdin: int,
        stdout: int,
        stderr: int,
        sink: Sink,
        limit: int,
    ) -> None:
        self._link = link
        self._control = control
        self._control.setblocking(False)
        self._answer = b""
        self._stdin: int | None = stdin
        self._outputs: dict[int, Sink] = {stdout: sink, stderr: Capture(limit)}
        self._sink = sink
        self._errors: Capture = self._outputs[stderr]  # type: ignore[assignment]
        self._code: int | None = None
        self.refused = ""
        self._to_write = bytearray()
        for fd in (stdin, stdout, stderr):
            os.set_blocking(fd, False)

    # -- the streams

    def feed(self, data: bytes) -> None:
        """Queue bytes for stdin and close it after them; they leave while output is pumped."""
        self._to_write += data
        if not data:
            self.close_stdin()

    def write(self, data: bytes, timeout: float = 60.0) -> None:
        end = time.monotonic() + timeout
        todo = memoryview(data)
        while todo:
            if self._stdin is None:
                raise BrokenPipeError("the command's stdin is closed")
            try:
                todo = todo[os.write(self._stdin, todo) :]
            except BlockingIOError:
                if time.monotonic() > end:
                    raise TimeoutError(f"the command took only part of its input in {timeout:g} s") from None
                if self.poll() is not None:
                    raise BrokenPipeError("the command has ended") from None
                self._pump(0.05, also_writable=self._stdin)

    def close_stdin(self) -> None:
        if self._stdin is not None:
            os.close(self._stdin)
            self._stdin = None

    def read(self, timeout: float) -> bytes:
        pending = self._sink
        assert isinstance(pending, Pending)
        end = time.monotonic() + timeout
        while not pending.data and not self.eof:
            left = end - time.monotonic()
            if left < 0:
                break
            self._pump(left)
        piece = bytes(pending.data[:CHUNK])
        del pending.data[:CHUNK]
        return piece

    @property
    def eof(self) -> bool:
        if isinstance(self._sink, Pending) and self._sink.data:
            return False
        return self._sink not in self._outputs.values()

    @property
    def stderr(self) -> bytes:
        return self._errors.value()

    @property
    def errors_truncated(self) -> bool:
        return self._errors.truncated

    # -- its end

    def poll(self) -> int | None:
        if self._code is None:
            self._pump(0.0)
        return self._code

    def wait(self, timeout: float | None = None) -> int:
        end = None if timeout is None else time.monotonic() + timeout
        while self._code is None:
            left = 3600.0 if end is None else end - time.monotonic()
            if left < 0:
                raise TimeoutError(f"the command still runs after {timeout:g} s")
            self._pump(left)
        return self._code

    def kill(self) -> None:
        if self._code is not None:
            return
        try:
            self._control.send(b"k")
            self.wait(5.0)
        except (TimeoutError, OSError):
            self._link.request("kill_all")  # its runner is stopped or gone
            self._ended(KILLED)

    def close(self) -> None:
        """Let go of the pipes; a command that still runs is killed by its runner."""
        self._link.processes.discard(self)
        self.close_stdin()
        for fd in list(self._outputs):
            os.close(fd)
        self._outputs.clear()
        self._control.close()

    def _pump(self, timeout: float, also_writable: int | None = None) -> None:
        """Wait for something to happen, once, and take what came."""
        if self._code is None and self._control.fileno() < 0:
            raise SandboxDied("the sandbox was stopped while a command ran")
        poll = select.poll()
        for fd in self._outputs:
            poll.register(fd, select.POLLIN)
        if self._code is None:
            poll.register(self._control, select.POLLIN)
        writing = self._stdin if self._to_write else also_writable
        if writing is not None:
            poll.register(writing, select.POLLOUT)
        ended = False
        for fd, _ in poll.poll(max(0.0, timeout) * 1000):
            if fd in self._outputs:
                self._take(fd, CHUNK)
            elif fd == self._stdin:
                self._give()
            else:
                ended = True
        if ended:
            self._hear()

    def _take(self, fd: int, size: int) -> None:
        try:
            data = os.read(fd, size)
        except BlockingIOError:
            return
        if data:
            self._outputs[fd].add(data)
        else:
            del self._outputs[fd]
            os.close(fd)

    def _give(self) -> None:
        if not self._to_write or self._stdin is None:
            return
        try:
            del self._to_write[: os.write(self._stdin, self._to_write[:CHUNK])]
        except BlockingIOError:
            return
        except BrokenPipeError:
            self._to_write.clear()
        if not self._to_write:
            self.close_stdin()

    def _hear(self) -> None:
        """The runner's one line: how the command ended."""
        try:
            piece = self._control.recv(1024)
        except BlockingIOError:
            return
        except OSError:
            piece = b""
        self._answer += piece
        if piece and not self._answer.endswith(b"\n") and len(self._answer) < 4096:
            return
        try:
            answer = json.loads(self._answer)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            # The command killed its own runner. Nothing that it started may outlive that.
            if not self._link.alive():
                self._ended(KILLED)
                raise SandboxDied("the sandbox died while a command ran: start it again")
            self._link.request("kill_all")
            self._ended(KILLED)
        elif "refused" in answer:
            self.refused = str(answer["refused"])
            self._ended(126)
        elif "killed" in answer:
            if answer["killed"] is not True:
                self._link.request("kill_all")
            self._ended(KILLED)
        else:
            code = answer.get("exit")
            self._ended(code if isinstance(code, int) and 0 <= code <= 255 else KILLED)

    def _ended(self, code: int) -> None:
        """Take what lies in the pipes now. A background process may hold them open for ever: don't wait for its end."""
        self._code = code
        for fd in list(self._outputs):
            waiting = array.array("i", [0])
            fcntl.ioctl(fd, termios.FIONREAD, waiting)
            while waiting[0] > 0 and fd in self._outputs:
                self._take(fd, min(waiting[0], CHUNK))
                waiting[0] -= CHUNK
        self.close()
