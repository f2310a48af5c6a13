"""The session over real sockets: what is asked is answered, whatever is sent is survived, and stop leaves nothing."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from workspace_support import Host

from curation_env.errors import InfrastructureError, InvalidAction, LimitExceeded, StageFailed
from curation_env.session import MAX_CONNECTIONS, Session
from curation_env.tickets import MAX_WAITING, Tickets, ticket_name
from curation_env.workspace.client import CHECK_BYTES, HEADER_BYTES, POLICY_BYTES


@pytest.fixture
def session() -> Iterator[Session]:
    with Session(None, Host()) as running:
        yield running


def send(session: Session, data: bytes, *, half_close: bool = True) -> dict[str, Any] | None:
    """Send raw bytes; the answer's first line, None when there is none."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(20)
        connection.connect(str(session.path))
        try:
            connection.sendall(data)
            if half_close:
                connection.shutdown(socket.SHUT_WR)
        except OSError:
            pass
        line = connection.makefile("rb").readline()
    return json.loads(line) if line else None


def ask(session: Session, kind: Any, body: tuple[bytes, ...] = (), **fields: Any) -> dict[str, Any]:
    header = {"v": 1, "type": kind, **fields}
    if body:
        header["body"] = [len(part) for part in body]
    answer = send(session, json.dumps(header).encode() + b"\n" + b"".join(body), half_close=False)
    assert answer is not None
    return answer


def test_requests_are_answered(session: Session) -> None:
    assert ask(session, "task")["result"]["rows"] == 4
    assert [entry["iteration"] for entry in ask(session, "history")["result"]] == [0, 1]
    assert ask(session, "signal", name="loss") == {
        "ok": True,
        "result": {"dtype": "<f4", "shape": [12]},
        "body": [48],
    }
    ids = "".join(f"{index:032x}\n" for index in range(3)).encode()
    assert ask(session, "check", (ids, b""))["result"]["rows"] == 3
    assert ask(session, "card", name="el2n")["result"].startswith("# EL2N")


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"\n", "invalid_action"),
        (b"{]\n", "invalid_action"),
        (b"\xff\xfe\n", "invalid_action"),
        (b"[]\n", "invalid_action"),
        (b"[" * 60_000 + b"\n", "invalid_action"),
        (b'{"v": 1, "type": "task"', "invalid_action"),
        (b'{"v": 2, "type": "task"}\n', "invalid_action"),
        (b'{"v": 1, "type": ["task"]}\n', "invalid_action"),
        (b'{"v": 1, "type": "signal"}\n', "invalid_action"),
        (b'{"v": 1, "type": "signal", "name": "a\\nb"}\n', "invalid_action"),
        (b'{"v": 1, "type": "signal", "name": "\\ud800"}\n', "invalid_action"),
        (b'{"v": 1, "type": "signal", "name": "other"}\n', "invalid_action"),
        (b'{"v": 1, "type": "signal", "name": "broken"}\n', "infrastructure"),
        (b'{"v": 1, "type": "card", "name": "none"}\n', "limit_exceeded"),
        (b'{"v": 1, "type": "wait", "ticket": "t-0", "seconds": -1}\n', "invalid_action"),
        (b'{"v": 1, "type": "wait", "ticket": "t-0", "seconds": NaN}\n', "invalid_action"),
        (b'{"v": 1, "type": "wait", "ticket": "t-0"}\n', "invalid_action"),
        (b'{"v": 1, "type": "submit"}\n', "invalid_action"),
        (b'{"v": 1, "type": "submit", "body": [5]}\nab', "invalid_action"),
        (b'{"v": 1, "type": "submit", "body": [true]}\na', "invalid_action"),
        (b'{"v": 1, "type": "submit", "body": [-1]}\n', "invalid_action"),
        (b'{"v": 1, "type": "submit", "body": [3]}\n   ', "invalid_action"),
        (b'{"v": 1, "type": "submit", "body": [2]}\n\xff\xfe', "invalid_action"),
        (b'{"v": 1, "type": "submit", "body": [1000001]}\n', "invalid_action"),
        (b'{"v": 1, "type": "check", "body": [2]}\na\n', "invalid_action"),
        (b"x" * (HEADER_BYTES + 2), "invalid_action"),
    ],
)
def test_malformed_requests_are_answered(session: Session, data: bytes, code: str) -> None:
    answer = send(session, data)
    assert answer is not None
    assert answer["ok"] is False
    assert answer["code"] == code
    assert "secret" not in answer["error"]
    assert ask(session, "task")["ok"]


def test_a_failure_of_the_host_is_told_to_it_and_not_to_the_client(session: Session) -> None:
    for name, cause in (("down", StageFailed), ("full", InfrastructureError)):
        answer = ask(session, "signal", name=name)
        assert (answer["ok"], answer["code"]) == (False, "infrastructure")
        assert "secret" not in answer["error"]
        assert "not your doing" in answer["error"]
        assert ask(session, "task")["ok"]
        assert isinstance(session.take_failure(), cause)
        assert session.take_failure() is None
    ask(session, "signal", name="nothing")
    assert session.take_failure() is None


@pytest.mark.parametrize(
    "data",
    [
        b'{"v": 1, "type": "check", "body": [2, 3]}\n\xff\n{}\n',
        b'{"v": 1, "type": "check", "body": [2, 3]}\na\n{}\n',
        b'{"v": 1, "type": "check", "body": [2000001, 0]}\n' + b"\n" * 2_000_001,
        b'{"v": 1, "type": "check", "body": [2, 2000001]}\na\n' + b"\n" * 2_000_001,
        b'{"v": 1, "type": "check", "body": [2, 9000000]}\na\n' + b"[" * 9_000_000,
    ],
)
def test_a_malformed_submission_does_not_pass_the_check(session: Session, data: bytes) -> None:
    answer = send(session, data)
    assert answer is not None
    assert (answer["result"]["passed"], answer["result"]["error"]) == (False, "invalid_submission")


def test_huge_requests_are_refused_without_being_read(session: Session) -> None:
    assert send(session, b"x" * 8_000_000)["code"] == "invalid_action"  # type: ignore[index]
    answer = send(session, json.dumps({"v": 1, "type": "check", "body": [CHECK_BYTES + 1, 0]}).encode() + b"\n")
    assert answer is not None
    assert "at most" in answer["error"]


def test_a_large_check_is_served(session: Session) -> None:
    ids = b"".join(b"%032x\n" % (index % 12) for index in range(200_000))
    assert ask(session, "check", (ids, b""))["result"]["rows"] == 200_000


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.one_of(
        st.binary(max_size=300),
        st.dictionaries(
            st.sampled_from(["v", "type", "name", "body", "ticket", "seconds", "again", "x"]),
            st.one_of(
                st.sampled_from([1, "task", "signal", "check", "card", "submit", "wait", [0], [1, 1], [2**70]]),
                st.recursive(
                    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
                    max_leaves=5,
                ),
            ),
        ).map(lambda header: json.dumps(header).encode() + b"\nxy"),
    )
)
def test_any_bytes_get_an_answer(session: Session, data: bytes) -> None:
    answer = send(session, data)
    assert answer is not None
    assert answer["ok"] or answer["code"] not in ("internal", "busy")


def test_requests_at_the_same_time_and_replayed(session: Session) -> None:
    answers: list[Any] = []

    def many() -> None:
        for _ in range(10):
            answers.append(ask(session, "submit", (b"print(1)",))["result"]["ticket"])

    threads = [threading.Thread(target=many) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [ticket_name(b"print(1)")] * 80
    ticket = session.next_ticket()
    assert ticket is not None
    assert ticket.policy == "print(1)"
    assert session.next_ticket() is None


def test_more_connections_than_are_served_are_told_so(session: Session) -> None:
    idle = []
    for _ in range(MAX_CONNECTIONS):
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(session.path))
        idle.append(connection)
    assert ask(session, "task")["code"] == "busy"
    for connection in idle:
        connection.close()
    deadline = time.monotonic() + 10
    while not ask(session, "task")["ok"]:
        assert time.monotonic() < deadline


def test_a_slow_request_is_cut_off(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("curation_env.session.READ_SECONDS", 0.2)
    answer = send(session, b'{"v": 1,', half_close=False)
    assert answer is not None
    assert answer["code"] == "timeout"


def test_a_client_that_goes_away_does_no_harm(session: Session) -> None:
    session.deferred = False
    ask(session, "submit", (b"print(2)",))
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(session.path))
        name = ticket_name(b"print(2)")
        connection.sendall(json.dumps({"v": 1, "type": "wait", "ticket": name, "seconds": 30}).encode() + b"\n")
    session.resolve(name, {"status": "scored"})
    assert ask(session, "wait", ticket=name)["result"]["result"] == {"status": "scored"}


def test_wait_holds_until_the_ticket_is_done(session: Session) -> None:
    session.deferred = False
    name = ask(session, "submit", (b"print(3)",))["result"]["ticket"]
    assert ask(session, "wait", ticket=name, seconds=0)["result"]["position"] == 1
    states: list[Any] = []
    waiter = threading.Thread(target=lambda: states.append(ask(session, "wait", ticket=name, seconds=10)["result"]))
    waiter.start()
    taken = session.next_ticket(timeout=5)
    assert taken is not None
    session.update(taken.name, {"stage": "train", "done": 1, "total": 2})
    assert ask(session, "wait", ticket=name)["result"]["progress"]["stage"] == "train"
    session.resolve(taken.name, {"status": "scored", "score": 50.0})
    waiter.join(10)
    assert states[0]["state"] == "done"
    assert states[0]["result"]["score"] == 50.0


def test_a_check_that_takes_long_holds_nothing_else_up() -> None:
    class Slow(Host):
        going = threading.Event()
        over = threading.Event()

        def check(self, ids: Any, rewrites: Any) -> dict[str, Any]:
            self.going.set()
            self.over.wait(10)
            return super().check(ids, rewrites)

    with Session(None, host := Slow()) as session:
        answers: list[Any] = []
        checking = threading.Thread(target=lambda: answers.append(ask(session, "check", (b"", b""))))
        checking.start()
        assert host.going.wait(5)
        assert ask(session, "task")["ok"]
        assert ask(session, "submit", (b"print(5)",))["ok"]
        host.over.set()
        checking.join(5)
    assert answers[0]["result"]["passed"]


def test_a_session_of_a_policy_run_takes_no_policy() -> None:
    with Session(None, Host(), read_only=True) as session:
        assert ask(session, "task")["ok"]
        assert ask(session, "submit", (b"print(1)",))["code"] == "limit_exceeded"


def test_stop_leaves_nothing() -> None:
    before = set(threading.enumerate())
    descriptors = len(os.listdir("/proc/self/fd"))
    session = Session(None, Host()).start()
    session.deferred = False
    name = ask(session, "submit", (b"print(4)",))["result"]["ticket"]
    waiting = threading.Thread(target=lambda: send(session, json.dumps(
        {"v": 1, "type": "wait", "ticket": name, "seconds": 10}).encode() + b"\n", half_close=False))  # fmt: skip
    waiting.start()
    idle = socket.socket(socket.AF_UNIX)
    idle.connect(str(session.path))
    time.sleep(0.1)
    started = time.monotonic()
    session.stop()
    session.stop()
    waiting.join(5)
    idle.close()
    assert time.monotonic() - started < 3
    assert set(threading.enumerate()) == before
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert not session.path.parent.exists()


def test_where_it_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="107 bytes"):
        Session(tmp_path / ("x" * 120), Host())
    deep = tmp_path / ("y" * 100)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    with Session(None, Host()) as session:
        assert len(str(session.path)) < 108
        assert session.path.parent.stat().st_mode & 0o777 == 0o700


def test_a_socket_left_by_a_killed_host_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    with Session(path, Host()) as session:
        assert ask(session, "task")["ok"]
        with pytest.raises(OSError, match="in use"):
            Session(path, Host()).start()
        assert ask(session, "task")["ok"]
    assert not path.exists()


def test_folders_of_killed_hosts_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code = (
        "import os, signal, sys, tempfile; tempfile.tempdir = sys.argv[1]\n"
        "from curation_env.session import Session\n"
        "session = Session(None, None).start(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    (left,) = tmp_path.iterdir()
    assert (left / "socket").is_socket()
    with Session(None, Host()) as first, Session(None, Host()) as second:
        assert sorted(tmp_path.iterdir()) == sorted([first.path.parent, second.path.parent])
        assert ask(first, "task")["ok"]
        assert ask(second, "task")["ok"]
    assert not list(tmp_path.iterdir())


def test_tickets_name_their_bytes() -> None:
    tickets = Tickets()
    first = tickets.submit(b"a = 1")
    assert tickets.submit(b"a = 1") == first
    assert first["note"].startswith("it becomes the next POLICY action")
    assert tickets.submit(b"a = 1", again=True)["ticket"] == first["ticket"]
    assert tickets.submit(b"a = 2")["position"] == 2
    assert tickets.next_ticket() == (first["ticket"], "a = 1")
    tickets.resolve(first["ticket"], {"status": "invalid"})
    assert tickets.submit(b"a = 1")["state"] == "done"
    second = tickets.submit(b"a = 1", again=True)
    assert second["ticket"] == first["ticket"] + "-2"
    assert second["state"] == "waiting"
    assert tickets.submit(b"a = 1", again=True) == second


def test_tickets_are_bounded() -> None:
    tickets = Tickets()
    for number in range(MAX_WAITING):
        tickets.submit(b"%d" % number)
    with pytest.raises(LimitExceeded, match="wait already"):
        tickets.submit(b"one more")
    with pytest.raises(InvalidAction, match="1 to"):
        tickets.submit(b"x" * (POLICY_BYTES + 1))
    for number in range(1_100):
        tickets.resolve(f"t-{number}", {})
    assert tickets.wait("t-1099")["state"] == "done"
    with pytest.raises(InvalidAction, match="same ticket"):
        tickets.wait("t-0")
    assert tickets.wait(ticket_name(b"0"))["state"] == "waiting"


def test_a_resumed_episode_answers_for_earlier_tickets() -> None:
    tickets = Tickets()
    tickets.resolve(ticket_name(b"old"), {"status": "scored"})
    assert tickets.submit(b"old")["result"] == {"status": "scored"}
