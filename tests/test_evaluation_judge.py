"""The judge client against a real server that misbehaves in every way it can."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from curation_env.errors import JudgeUnavailable
from curation_env.evaluation.judge import Endpoint, JudgeClient
from curation_env.evaluation.scorers import JudgeRequest

Reply = tuple[int, str, dict[str, str]]


class Server(ThreadingHTTPServer):
    """Answers by `script(number of the request, message)`; counts what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: Callable[[int, str], Reply] = lambda number, message: chat("0.5")
        self.models = json.dumps({"data": [{"id": "judge-1"}]})
        self.seen: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        self.reply((200, self.server.models, {}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.seen.append(body)
            number = len(self.server.seen)
            self.server.keys.add(self.headers.get("Authorization", ""))
        self.reply(self.server.script(number, body["messages"][-1]["content"]))

    def reply(self, answer: Reply) -> None:
        status, text, headers = answer
        if status == 0:  # hang up without an answer
            self.close_connection = True
            return
        data = text.encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


def chat(text: str) -> Reply:
    return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}), {}


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def client(server: Server) -> Iterator[JudgeClient]:
    with JudgeClient(Endpoint(server.url, "judge-1", "secret"), first_wait=0.001) as client:
        yield client


def request(text: str) -> JudgeRequest:
    return JudgeRequest(text, lambda answer: answer in ("0.5", "1.0"))


def test_equal_requests_are_asked_once_and_kept(server: Server, client: JudgeClient) -> None:
    server.script = lambda number, message: chat("1.0" if "good" in message else "0.5")
    client.probe(request("probe"))
    seen: list[tuple[int, int]] = []
    answers = client.ask([request("good"), request("bad"), request("good")], lambda *event: seen.append(event))
    assert answers == ["1.0", "0.5", "1.0"]
    assert len(server.seen) == 3
    assert seen[-1] == (2, 2)
    assert client.log == {"good": "1.0", "bad": "0.5"}
    assert client.ask([request("good")]) == ["1.0"]
    assert len(server.seen) == 3
    assert server.keys == {"Bearer secret"}
    assert server.seen[0]["model"] == "judge-1"
    assert server.seen[0]["temperature"] == 0


@pytest.mark.parametrize(
    "trouble",
    [
        (429, "slow down", {"Retry-After": "0"}),
        (500, "oops", {}),
        (503, "", {}),
        (200, "<html>not json", {}),
        (0, "", {}),
        chat("I would say half"),
        (200, json.dumps({"choices": []}), {}),
        (200, json.dumps({"choices": [{"message": {"content": None}}]}), {}),
        (200, "[]", {}),
    ],
)
def test_trouble_that_passes_is_survived(server: Server, client: JudgeClient, trouble: Reply) -> None:
    server.script = lambda number, message: trouble if number <= 2 else chat("0.5")
    assert client.ask([request("case")]) == ["0.5"]
    assert len(server.seen) == 3


@pytest.mark.parametrize(
    ("trouble", "cause"),
    [
        ((500, "oops", {}), "500: oops"),
        ((0, "", {}), "disconnected"),
        (chat("no grade"), "no grade"),
        ((200, "garbage", {}), "no JSON"),
    ],
)
def test_trouble_that_stays_is_no_score(server: Server, client: JudgeClient, trouble: Reply, cause: str) -> None:
    server.script = lambda number, message: trouble
    with pytest.raises(JudgeUnavailable, match=cause):
        client.ask([request(f"case {k}") for k in range(30)])


def test_a_refusal_is_not_repeated(server: Server, client: JudgeClient) -> None:
    server.script = lambda number, message: (401, "wrong key", {})
    with pytest.raises(JudgeUnavailable, match="401: wrong key"):
        client.ask([request("case")])
    assert len(server.seen) == 1


@pytest.mark.parametrize(
    ("models", "cause"),
    [
        (json.dumps({"data": [{"id": "other"}]}), "only other"),
        (json.dumps({"data": None}), "malformed"),
        ("[1]", "malformed"),
    ],
)
def test_the_probe_wants_the_model(server: Server, client: JudgeClient, models: str, cause: str) -> None:
    server.models = models
    with pytest.raises(JudgeUnavailable, match=cause):
        client.probe(request("probe"))


def test_nobody_there_is_named() -> None:
    with JudgeClient(Endpoint("http://127.0.0.1:9/v1", "judge-1", ""), first_wait=0.001) as client:
        with pytest.raises(JudgeUnavailable, match=r"judge-1 at http://127\.0\.0\.1:9/v1"):
            client.probe(request("probe"))
