"""The client's half of the protocol: one request and one answer per connection to the session's Unix socket.

A request is one line of JSON, `{"v": 1, "type": ..., ...}`, at most `HEADER_BYTES` long. Where it carries bytes, `body`
in it lists their lengths and they follow the line. The answer is framed the same way: `{"ok": true, "result": ...}` or
`{"ok": false, "error": text, "code": name}`, and bytes after it where it has a `body`.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from socket import socket

PROTOCOL = 1
HEADER_BYTES = 65_536
POLICY_BYTES = 1_000_000
#: The ids and the rewrites of one `check`: at most this many bytes each.
CHECK_BYTES = 32_000_000
DEFAULT_SOCKET = "/run/curation/socket"


class CurationError(RuntimeError):
    """The host refused or could not be reached; `code` is a short stable name ("unreachable", "invalid_submission")."""

    def __init__(self, message: str, code: str = "error") -> None:
        super().__init__(message)
        self.code = code


def request(
    kind: str,
    fields: Mapping[str, Any] | None = None,
    body: Sequence[bytes] = (),
    timeout: float | None = 60.0,
) -> tuple[Any, bytes]:
    """Send one request and return its result and the bytes that came with it.

    Args:
        kind: The message type.
        fields: Its other fields, plain JSON.
        body: Byte strings that follow the header.
        timeout: Seconds without a byte from the host before giving up; None waits as long as the host lives.

    Raises:
        CurationError: The host is not there (`unreachable`), too slow (`timeout`), or answered with an error.
    """
    header: dict[str, Any] = {"v": PROTOCOL, "type": kind, **(fields or {})}
    if body:
        header["body"] = [len(part) for part in body]
    message = json.dumps(header).encode() + b"\n" + b"".join(body)
    give_up = time.monotonic() + 30
    while True:
        answer, payload = _exchange(message, timeout)
        if answer.get("ok"):
            return answer.get("result"), payload
        code = str(answer.get("code", "error"))
        if code != "busy" or time.monotonic() > give_up:
            raise CurationError(str(answer.get("error", "the host gave no reason")), code)
        time.sleep(0.1)  # the host serves a bounded number of connections at a time


def _exchange(message: bytes, timeout: float | None) -> tuple[dict[str, Any], bytes]:
    import socket

    path = os.environ.get("CURATION_SOCKET", DEFAULT_SOCKET)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout)
        try:
            connection.connect(path)
        except OSError as error:
            raise CurationError(
                f"no session at {path} ({error.strerror or error}): `curation` works inside a running episode, where"
                " the host listens there (the environment variable CURATION_SOCKET names another path)",
                "unreachable",
            ) from error
        try:
            # Refused before all of it was read: the reason is waiting to be received.
            with suppress(BrokenPipeError, ConnectionResetError):
                connection.sendall(message)
            return _receive(connection)
        except TimeoutError as error:
            raise CurationError(f"the host did not answer within {timeout:g} s", "timeout") from error
        except OSError as error:
            raise CurationError(f"the connection to the host broke: {error}", "unreachable") from error


def _receive(connection: socket) -> tuple[dict[str, Any], bytes]:
    data = bytearray()
    while (end := data.find(b"\n")) < 0:
        chunk = connection.recv(1 << 16)
        if not chunk:
            raise CurationError(
                "the host closed the connection without an answer: the episode may have ended", "closed"
            )
        data += chunk
    answer: dict[str, Any] = json.loads(data[:end])
    payload = data[end + 1 :]
    expected = sum(answer.get("body", ()))
    while len(payload) < expected:
        chunk = connection.recv(1 << 20)
        if not chunk:
            raise CurationError("the host closed the connection in the middle of its answer", "closed")
        payload += chunk
    return answer, bytes(payload)
