"""The host side of `curation`: one request protocol over a Unix socket, for one sandbox.

The environment makes a `Session` for each sandbox and has its socket mounted there. Whoever owns the episode takes
tickets (`next_ticket`), plays each as a POLICY action and reports what came of it (`resolve`); the environment itself
never listens.

Messages (`curation_env/workspace/client.py` has the framing):

| type | fields | result |
|---|---|---|
| task | | `SessionBackend.task()` |
| history | | `SessionBackend.history()` |
| signal | name | {dtype, shape}, and the numbers as bytes |
| check | body: ids (one a line), rewrites (JSON lines) | `SessionBackend.check(...)` |
| card | name | `SessionBackend.card(name)` |
| submit | again (optional); body: the policy | the ticket's state |
| wait | ticket, seconds | the ticket's state, once it is done or the seconds are over |

A ticket's state is {ticket, state: waiting | running | done} with position, progress, result and note where there are
any. Everything that comes in is bounded: a request has `READ_SECONDS` to arrive, `MAX_CONNECTIONS` are served at a
time, one large body is held at a time. What is malformed is answered; nothing that a client sends ends the session.

Where the host itself fails, the client gets a fixed text, and `take_failure` tells whoever owns the episode: what the
agent made of such an answer is not its doing.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import numpy as np

from curation_env.errors import AgentError, CurationError, InfrastructureError, InvalidAction, LimitExceeded
from curation_env.submission import IDS_FILE, REWRITES_FILE, Budget, read_submission
from curation_env.tickets import Tickets
from curation_env.workspace.client import CHECK_BYTES, HEADER_BYTES, POLICY_BYTES, PROTOCOL

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 32
BUSY_SECONDS = 1.0
READ_SECONDS = 15.0
SEND_SECONDS = 60.0
WAIT_SECONDS = 10.0
STOP_SECONDS = 10.0
SMALL_BODY = 65_536
FOLDER_PREFIX = "curation-session-"
HOST_FAILED = "the host could not answer this request; it is not your doing, and nothing is charged for it"
PATH_BYTES = 107  # sun_path of a Unix socket, less its final NUL


class SessionBackend(Protocol):
    """What the environment answers. Results are plain JSON; an `AgentError` or `LimitExceeded` is answered with its
    message and code, any other error is the host's.

    The methods are called from the session's threads while the environment may be in `step`; each of them by one
    thread at a time, so that `task` is answered while a `check` waits for its turn.
    """

    def task(self) -> Mapping[str, Any]:
        """Budgets, sources, benchmarks, signals, cards, iteration, iterations, seed, ..."""

    def history(self) -> Sequence[Mapping[str, Any]]:
        """One entry an iteration: iteration, status, score, scores {benchmark: x}, ..."""

    def signal(self, name: str) -> np.ndarray:
        """One float32 per row of the agent's view of the pool; charges the signal's price."""

    def check(self, ids: Sequence[str], rewrites: Mapping[str, list[dict[str, str]]]) -> Mapping[str, Any]:
        """What the gate would say: {passed: bool, message: text, ...}, or an `AgentError`; charges nothing."""

    def card(self, name: str) -> str:
        """The text of a method card; records that it was opened."""


class _Message(NamedTuple):
    answer: Callable[[dict[str, Any], list[bytes]], tuple[Any, bytes]]
    parts: tuple[int, ...] = ()  # the largest size of each part of its body


class Session(Tickets):
    """A server thread on a Unix socket, with the tickets submitted over it; a context manager.

    Args:
        socket_path: Where to listen, at most 107 bytes; None makes a short private folder for it.
        backend: What answers.
        read_only: Refuse `submit`: a policy's own run may look, not submit.

    Attributes:
        path: The socket; its folder is open to this user alone, so only who is given a mount of it can connect.
    """

    def __init__(self, socket_path: Path | None, backend: SessionBackend, *, read_only: bool = False) -> None:
        super().__init__()
        if socket_path is not None and len(os.fsencode(socket_path)) > PATH_BYTES:
            raise ValueError(f"a Unix socket's path has at most {PATH_BYTES} bytes, give None instead of {socket_path}")
        self._own_folder = _short_folder() if socket_path is None else None
        self.path = self._own_folder / "socket" if self._own_folder else Path(str(socket_path))
        self._backend = backend
        self._messages = {
            "task": _Message(self._task),
            "history": _Message(self._history),
            "signal": _Message(self._signal),
            "check": _Message(self._check, (CHECK_BYTES, CHECK_BYTES)),
            "card": _Message(self._card),
            "submit": _Message(self._read_only if read_only else self._submit, (POLICY_BYTES,)),
            "wait": _Message(self._wait),
        }
        self._listener: socket.socket | None = None
        self._acceptor: threading.Thread | None = None
        self._serving: dict[threading.Thread, socket.socket] = {}
        self._lock = threading.Lock()
        self._slots = threading.Semaphore(MAX_CONNECTIONS)
        self._large_body = threading.Lock()
        self._failure: CurationError | None = None
        self._calls = {name: threading.Lock() for name in ("task", "history", "signal", "check", "card")}

    def start(self) -> Session:
        """Listen. Returns itself.

        Raises:
            OSError: The socket cannot be made (its path is taken, its folder is not there).
        """
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            if self.path.is_socket() and _nobody_listens(self.path):
                self.path.unlink()  # of a killed process
            # Under its own name from the moment that it listens: so a socket that does not is a dead one's.
            place = self.path if self._own_folder is None else self._own_folder / "new"
            listener.bind(str(place))
            os.chmod(place, 0o666)  # the sandbox may run as another user; the folder keeps others of this host out
            listener.listen(64)
            place.rename(self.path)
        except OSError:
            listener.close()
            raise
        self._listener = listener
        self._acceptor = threading.Thread(target=self._accept, args=(listener,), name="session", daemon=True)
        self._acceptor.start()
        return self

    def stop(self) -> None:
        """Stop listening, let every thread end, remove the socket. Does nothing when it is not running."""
        self.close()
        listener, self._listener = self._listener, None
        if listener is not None and self._acceptor is not None:
            listener.shutdown(socket.SHUT_RDWR)  # wakes the acceptor
            self._acceptor.join()
            listener.close()
            self.path.unlink(missing_ok=True)
            with self._lock:
                serving = dict(self._serving)
            for connection in serving.values():
                _hang_up(connection)
            give_up = time.monotonic() + STOP_SECONDS
            for thread in serving:
                thread.join(max(0.0, give_up - time.monotonic()))
                if thread.is_alive():
                    log.warning("a request was still being answered %g s after the session ended", STOP_SECONDS)
        if self._own_folder is not None:
            shutil.rmtree(self._own_folder, ignore_errors=True)

    def take_failure(self) -> CurationError | None:
        """The first error of the host's since the last call, None if every request could be answered."""
        with self._lock:
            failure, self._failure = self._failure, None
            return failure

    def __enter__(self) -> Session:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # The server

    def _accept(self, listener: socket.socket) -> None:
        while self._listener is not None:
            try:
                connection, _ = listener.accept()
            except OSError:
                if self._listener is None:
                    return
                time.sleep(0.05)  # out of file descriptors, most likely: they come back as requests end
                continue
            if not self._slots.acquire(timeout=BUSY_SECONDS):
                connection.settimeout(0.2)
                _send(connection, _failure("busy", "too many requests at a time"))
                connection.close()
                continue
            with self._lock:
                thread = threading.Thread(target=self._serve, args=(connection,), name="session-request", daemon=True)
                self._serving[thread] = connection
                thread.start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection:
                answer = self._handle(connection)
                connection.settimeout(SEND_SECONDS)
                _send(connection, answer)
        finally:
            with self._lock:
                self._serving.pop(threading.current_thread(), None)
            self._slots.release()

    def _handle(self, connection: socket.socket) -> bytes:
        try:
            return self._answer(_Reader(connection))
        except (AgentError, LimitExceeded) as error:
            return _failure(error.code, str(error))
        except TimeoutError:
            return _failure("timeout", f"the request took over {READ_SECONDS:g} s to arrive")
        except CurationError as error:
            # The agent gets no inner detail; the host's log has it.
            log.exception("a request could not be answered")
            with self._lock:
                self._failure = self._failure or error
            return _failure(InfrastructureError.code, HOST_FAILED)
        except Exception:
            log.exception("a request could not be answered")
            return _failure("internal", "the host could not answer this request")

    def _answer(self, reader: _Reader) -> bytes:
        header = _parse_header(reader.line(HEADER_BYTES))
        kind = header.get("type")
        message = self._messages.get(kind) if isinstance(kind, str) else None
        if message is None:
            raise InvalidAction(f"unknown request type; known are {', '.join(self._messages)}")
        sizes = _body_sizes(header, message.parts)
        with ExitStack() as held:
            if sum(sizes) > SMALL_BODY:
                if not self._large_body.acquire(timeout=READ_SECONDS):
                    return _failure("busy", "another large request is being read")
                held.callback(self._large_body.release)
            body = [reader.exactly(size) for size in sizes]
            try:
                result, payload = message.answer(header, body)
            except CurationError:
                raise
            except Exception as error:  # a full disk, say
                raise InfrastructureError(f"a request of type {kind} could not be answered: {error!r}") from error
        answer = {"ok": True, "result": result}
        if payload:
            answer["body"] = [len(payload)]
        return json.dumps(answer).encode() + b"\n" + payload

    # The messages: (header, body) -> (result, bytes)

    def _task(self, header: dict[str, Any], body: list[bytes]) -> tuple[Any, bytes]:
        with self._calls["task"]:
            return dict(self._backend.task()), b""

    def _history(self, header: dict[str, Any], body: list[bytes]) -> tuple[Any, bytes]:
        with self._calls["history"]:
            return [dict(entry) for entry in self._backend.history()], b""

    def _card(self, header: dict[str, Any], body: list[bytes]) -> tuple[Any, bytes]:
        name = _text(header, "name")
        with self._calls["card"]:
            return self._backend.card(name), b""

    def _signal(self, header: dict[str, Any], body: list[bytes]) -> tuple[Any, bytes]:
        name = _text(header, "name")
        with self._calls["signal"]:
            values = np.ascontiguousarray(self._backend.signal(name), dtype="<f4")
        return {"dtype": "<f4", "shape": list(values.shape)}, values.tobytes()

    def _check(self, header: dict[str, Any], body: list[bytes]) -> tuple[Any, bytes]:
        try:
            with tempfile.TemporaryDirectory(prefix="check-", dir=self._own_folder) as folder:
                for name, data in zip((IDS_FILE, REWRITES_FILE), body, strict=True):
                    (Path(folder) / name).parent.mkdir(exist_ok=True)
                    (Path(folder) / name).write_bytes(data)
                with self._calls["task"]:
                    task = self._backend.task()
                budget = Budget(task["rows"], rewrite=task.get("rewrite", True))
                submission = read_submission(Path(folder), budget)
            assert submission is not None
            with self._calls["check"]:
                return dict(self._backend.check(submission.ids, dict(submission.rewrites))), b""
        except AgentError as error:  # that it would be refused is the answer
            return {"passed": False, "error": error.code, "message": str(error)}, b""

    def _submit(self, header: dict[str, Any], body: list[bytes]) -> tuple[Any, bytes]:
        return self.submit(body[0], again=header.get("again") is True), b""

    def _read_only(self, header: dict[str, Any], body: list[bytes]) -> tuple[Any, bytes]:
        raise LimitExceeded("a policy's own run can't submit: it selects rows with curation.select")

    def _wait(self, header: dict[str, Any], body: list[bytes]) -> tuple[Any, bytes]:
        seconds = header.get("seconds", 0)
        if not isinstance(seconds, (int, float)) or not 0 <= seconds < 1e9:
            raise InvalidAction("seconds must be a number from 0")
        return self.wait(_text(header, "ticket"), min(seconds, WAIT_SECONDS)), b""


class _Reader:
    """Reads a request that must be complete `READ_SECONDS` after its connection was taken."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._deadline = time.monotonic() + READ_SECONDS
        self._data = bytearray()

    def line(self, limit: int) -> bytes:
        while (end := self._data.find(b"\n")) < 0:
            if len(self._data) > limit:
                raise InvalidAction(f"a request's first line has at most {limit:,} bytes")
            self._more()
        line = bytes(self._data[:end])
        del self._data[: end + 1]
        if len(line) > limit:
            raise InvalidAction(f"a request's first line has at most {limit:,} bytes")
        return line

    def exactly(self, size: int) -> bytes:
        while len(self._data) < size:
            self._more()
        part = bytes(self._data[:size])
        del self._data[:size]
        return part

    def _more(self) -> None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._connection.settimeout(left)
        try:
            chunk = self._connection.recv(1 << 16)
        except ConnectionError:
            chunk = b""
        if not chunk:
            raise InvalidAction("the request ended in the middle")
        self._data += chunk


def _parse_header(line: bytes) -> dict[str, Any]:
    try:
        header = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidAction("a request's first line is one JSON object in UTF-8") from error
    if not isinstance(header, dict):
        raise InvalidAction("a request's first line is one JSON object in UTF-8")
    if header.get("v") != PROTOCOL:
        raise InvalidAction(f"this host speaks version {PROTOCOL} of the protocol")
    return header


def _body_sizes(header: dict[str, Any], limits: Sequence[int]) -> list[int]:
    sizes = header.get("body", [])
    if not isinstance(sizes, list) or len(sizes) != len(limits) or not all(type(size) is int for size in sizes):
        raise InvalidAction(f"body must list the sizes of {len(limits)} parts")
    for size, limit in zip(sizes, limits, strict=True):
        if not 0 <= size <= limit:
            raise InvalidAction(f"a part of {size:,} bytes: at most {limit:,} are read")
    return sizes


def _text(header: dict[str, Any], key: str) -> str:
    value = header.get(key)
    if not isinstance(value, str) or not 0 < len(value) <= 200 or not value.isprintable():
        raise InvalidAction(f"{key} must be a text of 1 to 200 printable characters")
    return value


def _failure(code: str, error: str) -> bytes:
    return json.dumps({"ok": False, "code": code, "error": error}).encode() + b"\n"


def _send(connection: socket.socket, answer: bytes) -> None:
    with suppress(OSError):  # the client went away or does not read: its loss
        connection.sendall(answer)


def _hang_up(connection: socket.socket) -> None:
    with suppress(OSError):  # it was closed already
        connection.shutdown(socket.SHUT_RDWR)


def _nobody_listens(path: Path) -> bool:
    """Whether a socket's process is gone."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return True
        except BlockingIOError:  # its backlog is full
            return False
        return False


def _short_folder() -> Path:
    """A private folder whose path leaves room for a socket's name, wherever TMPDIR points."""
    for parent in (tempfile.gettempdir(), "/tmp"):
        if len(os.fsencode(parent)) <= PATH_BYTES - len(f"/{FOLDER_PREFIX}xxxxxxxx/socket"):
            _reap(Path(parent))
            return Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=parent))
    raise ValueError(f"no temporary folder with a path under {PATH_BYTES} bytes")


def _reap(parent: Path) -> None:
    """Remove the folders that this user's killed sessions left. A living one has a socket that listens, or is new."""
    for folder in parent.glob(f"{FOLDER_PREFIX}*"):
        with suppress(OSError):
            status = folder.lstat()
            if status.st_uid != os.geteuid() or not stat.S_ISDIR(status.st_mode):
                continue
            left = folder / "socket"
            if _nobody_listens(left) if left.exists() else time.time() - status.st_mtime > 60:
                shutil.rmtree(folder, ignore_errors=True)
