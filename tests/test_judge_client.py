"""The judge client against the miniature's real server and against a loopback server that misbehaves."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import urllib3

from curation_env.errors import JudgeUnavailable
from curation_env.evaluation import judge as client_module
from curation_env.evaluation.judge import ATTEMPTS, CONCURRENCY, Endpoint, JudgeClient
from curation_env.evaluation.scorers import JudgeRequest, make_scorer
from curation_env.evaluation.suite import Item
from curation_env.judge import Judge
from curation_env.mini.judge import MODEL

WAIT = 0.001  # seconds before the first repetition


def number(text: str) -> bool:
    return text.replace(".", "", 1).isdigit()


def question(text: str, accept: Callable[[str], bool] = number) -> JudgeRequest:
    return JudgeRequest(text, accept)


# The miniature's server, a process of its own with a key


@pytest.fixture(scope="module")
def real() -> Iterator[Endpoint]:
    judge = Judge()
    try:
        endpoint = judge.endpoint({"judge": {"kind": "builtin", "model": MODEL}})
        assert endpoint is not None
        yield Endpoint(**endpoint)
    finally:
        judge.close()


def asked(rule: str, prediction: str, **columns: str) -> JudgeRequest:
    item = Item("Test", "1", "how many red bars ?", "red<AND>bar", "", (), {}, columns)
    request = make_scorer(rule).ask(item, prediction)
    assert request is not None
    return request


def test_every_rule_is_answered_by_the_miniatures_judge(real: Endpoint) -> None:
    requests = [
        asked("mmvet", "a red bar"),
        asked("mmvet", "a blue bar"),
        asked("llavabench", "a red bar", gpt4_ans="a red bar", caption="bars"),
        asked("mathvista", "there are 3", question_type="free_form", answer_type="integer"),
    ]
    seen: list[tuple[int, int]] = []
    with JudgeClient(real, WAIT) as client:
        client.probe(requests[0])
        answers = client.ask([*requests, requests[1]], lambda done, total: seen.append((done, total)))
    assert [answer.splitlines()[0] for answer in answers] == ["1.0", "0.5", "9 9", "3", "0.5"]
    assert seen == [(k, 4) for k in range(1, 5)]
    assert client.log == {request.message: answer for request, answer in zip(requests, answers, strict=False)}
    assert client.version == {"id": MODEL, "owned_by": "curation-env", "answers_as": MODEL}


def test_a_wrong_key_is_no_reason_to_ask_again(real: Endpoint) -> None:
    with (
        JudgeClient(real._replace(key="other"), first_wait=60) as client,
        pytest.raises(JudgeUnavailable, match=r"401.*wrong key"),
    ):
        client.probe(asked("mmvet", "a red bar"))


def test_a_judge_that_does_not_serve_the_model_is_refused(real: Endpoint) -> None:
    with (
        JudgeClient(real._replace(model="other"), WAIT) as client,
        pytest.raises(JudgeUnavailable, match=f"does not serve 'other', only {MODEL}"),
    ):
        client.probe(asked("mmvet", "a red bar"))


def test_a_message_that_the_judge_cannot_read_is_an_error_with_its_reason(real: Endpoint) -> None:
    with JudgeClient(real, first_wait=60) as client, pytest.raises(JudgeUnavailable, match=r"400.*last line"):
        client.ask([question("no case at the end")])


def test_the_proxy_of_the_machine_is_not_asked(real: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with JudgeClient(real, WAIT) as client:
        assert client.ask([asked("mmvet", "red bar")]) == ["1.0"]


# A server that misbehaves

Reply = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Misbehaving

    def do_GET(self) -> None:
        self.server.listing(self)

    def do_POST(self) -> None:
        self.body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            turn = len(self.server.bodies)
            self.server.bodies.append(self.body)
        script = self.server.script
        script[min(turn, len(script) - 1)](self)

    def send(self, status: int, data: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


class Misbehaving(ThreadingHTTPServer):
    """Plays `script`, one entry a request and then the last one for ever; keeps the bodies that it was sent."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock = threading.Lock()
        self.bodies: list[dict[str, Any]] = []
        self.script: Sequence[Reply] = [says("1")]
        self.listing: Reply = sends(200, {"data": [{"id": "m"}]})

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(f"http://127.0.0.1:{self.server_address[1]}/v1", "m", "")

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that gave up breaks the pipe; that is the point."""


def sends(status: int, value: Any, **headers: str) -> Reply:
    return lambda handler: handler.send(status, json.dumps(value).encode(), **headers)


def says(text: Any) -> Reply:
    return sends(200, {"choices": [{"message": {"role": "assistant", "content": text}}]})


def raw(data: bytes) -> Reply:
    return lambda handler: handler.send(200, data)


def hangs_up(handler: Handler) -> None:
    handler.close_connection = True


def breaks_off(handler: Handler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.close_connection = True


def sleeps(handler: Handler) -> None:
    time.sleep(1)
    says("0")(handler)


@pytest.fixture
def server() -> Iterator[Misbehaving]:
    server = Misbehaving()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def client(server: Misbehaving) -> Iterator[JudgeClient]:
    with JudgeClient(server.endpoint, WAIT) as client:
        yield client


TROUBLE = {
    "too many requests": sends(429, {"error": "slow down"}),
    "too many, come back at once": sends(429, {"error": "slow down"}, Retry_After="0"),
    "a time-out of its own": sends(408, {}),
    "an inner error": sends(500, {"error": "boom"}),
    "a bad gateway": lambda handler: handler.send(502, b"<html>bad gateway</html>"),
    "no JSON": raw(b"<html>hello</html>"),
    "no text": raw(b"\xff\xfe\x00"),
    "an empty body": raw(b""),
    "hanging up": hangs_up,
    "breaking off": breaks_off,
    "a list": sends(200, ["1"]),
    "a text": sends(200, "1"),
    "nothing": sends(200, None),
    "no choices": sends(200, {"choices": []}),
    "no message": sends(200, {"choices": [{"text": "1"}]}),
    "no content": says(None),
    "content in parts": says([{"type": "text", "text": "1"}]),
    "an answer that is no grade": says("a good answer, I would say 1"),
    "an empty answer": says(""),
}


@pytest.mark.parametrize("trouble", TROUBLE.values(), ids=TROUBLE)
def test_trouble_that_passes_is_lived_through(trouble: Reply, server: Misbehaving, client: JudgeClient) -> None:
    server.script = [trouble, trouble, says(" 0.5\n")]
    assert client.ask([question("q")]) == ["0.5"]
    assert client.log == {"q": "0.5"}
    assert len(server.bodies) == 3


@pytest.mark.parametrize("trouble", TROUBLE.values(), ids=TROUBLE)
def test_trouble_that_stays_is_an_error_and_never_a_grade(
    trouble: Reply, server: Misbehaving, client: JudgeClient
) -> None:
    server.script = [trouble]
    with pytest.raises(JudgeUnavailable, match=f"the judge m at {server.endpoint.url} is of no use: {ATTEMPTS} a"):
        client.ask([question("q")])
    assert len(server.bodies) == ATTEMPTS
    assert client.log == {}


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413])
def test_a_refusal_is_final(status: int, server: Misbehaving, client: JudgeClient) -> None:
    server.script = [sends(status, {"error": "not you"})]
    with pytest.raises(JudgeUnavailable, match=f"answered {status}: .*not you"):
        client.ask([question("q")])
    assert len(server.bodies) == 1


def test_a_slow_judge_is_asked_again_and_then_given_up(server: Misbehaving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "TIMEOUT", urllib3.Timeout(0.1))
    server.script = [sleeps, says("1")]
    with JudgeClient(server.endpoint, WAIT) as client:
        assert client.ask([question("q")]) == ["1"]
        server.script = [sleeps]
        with pytest.raises(JudgeUnavailable, match="ReadTimeoutError"):
            client.ask([question("r")])


def test_a_dead_judge_is_named_with_the_cause() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        with (
            JudgeClient(Endpoint(url, "m", ""), WAIT) as client,
            pytest.raises(JudgeUnavailable, match=f"{url} .*NewConnectionError"),
        ):
            client.probe(question("q"))


def test_a_judge_that_dies_between_probe_and_questions_is_an_error() -> None:
    server = Misbehaving()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    with JudgeClient(server.endpoint, WAIT) as client:
        client.probe(question("q"))
        server.shutdown()
        server.server_close()
        with pytest.raises(JudgeUnavailable, match="is of no use"):
            client.ask([question(str(k)) for k in range(20)])


@pytest.mark.parametrize(("url", "cause"), [("localhost/v1", "begin with http"), ("http://[::1/v1", "its address")])
def test_an_address_that_is_none_is_an_error(url: str, cause: str) -> None:
    with pytest.raises(JudgeUnavailable, match=cause), JudgeClient(Endpoint(url, "m", ""), WAIT) as client:
        client.probe(question("q"))


@pytest.mark.parametrize(
    "listing", [{"models": []}, {"data": ["m"]}, {"data": None}, [], None, {"data": [{"name": "m"}]}]
)
def test_a_malformed_list_of_models_is_refused(listing: Any, server: Misbehaving, client: JudgeClient) -> None:
    server.listing = sends(200, listing)
    with pytest.raises(JudgeUnavailable, match="list of models is malformed"):
        client.probe(question("q"))
    assert server.bodies == []


def test_the_probe_wants_a_grade_as_well(server: Misbehaving, client: JudgeClient) -> None:
    server.script = [says("as you wish")]
    with pytest.raises(JudgeUnavailable, match="were no grade, the last was 'as you wish'"):
        client.probe(question("q"))


def test_what_is_sent(server: Misbehaving) -> None:
    headers: list[str | None] = []

    def listens(handler: Handler) -> None:
        headers.append(handler.headers["Authorization"])
        says("no" if len(headers) < 3 else "1")(handler)

    server.script = [listens]
    with JudgeClient(server.endpoint._replace(key="secret"), WAIT) as client:
        client.ask([question("grüße\n{}")])
    assert headers == ["Bearer secret"] * 3
    assert [body["messages"] for body in server.bodies] == [[{"role": "user", "content": "grüße\n{}"}]] * 3
    assert [body["model"] for body in server.bodies] == ["m"] * 3
    assert [body["temperature"] for body in server.bodies] == [0, 0.5, 1]  # the first answer is the greedy one


def test_system_message_limits_and_the_suites_own_fields_are_sent(server: Misbehaving) -> None:
    endpoint = server.endpoint._replace(body={"chat_template_kwargs": {"enable_thinking": False}})
    server.script = [says("no"), says("1")]
    with JudgeClient(endpoint, WAIT) as client:
        client.ask([question("q")._replace(system="be fair", temperature=0.2, max_tokens=128)])
    assert [body["messages"][0] for body in server.bodies] == [{"role": "system", "content": "be fair"}] * 2
    assert [body["temperature"] for body in server.bodies] == [0.2, 0.7]
    assert {body["max_tokens"] for body in server.bodies} == {128}
    assert all(body["chat_template_kwargs"] == {"enable_thinking": False} for body in server.bodies)


def reply(model: str, fingerprint: str) -> Reply:
    choices = [{"message": {"role": "assistant", "content": "1"}}]
    return sends(200, {"model": model, "system_fingerprint": fingerprint, "choices": choices})


def test_the_version_of_the_judge_is_kept(server: Misbehaving, client: JudgeClient) -> None:
    entry = {"id": "m", "owned_by": "vllm", "max_model_len": 4096, "created": 1_700_000_000, "root": "/models/m"}
    server.listing = sends(200, {"data": [{"id": "other"}, entry]})
    server.script = [reply("m-2026", "fp_2"), reply("m-2026", "fp_1")]
    client.probe(question("p"))
    client.ask([question("q")])
    assert client.version == {"id": "m", "owned_by": "vllm", "max_model_len": 4096, "answers_as": "m-2026"}
    assert client.fingerprints == ["fp_1", "fp_2"]


def test_a_judge_that_becomes_another_is_no_judge(server: Misbehaving, client: JudgeClient) -> None:
    server.script = [reply("m-1", ""), reply("m-2", "")]
    client.probe(question("p"))
    with pytest.raises(JudgeUnavailable, match="answers as 'm-2' now, and as 'm-1' before"):
        client.ask([question("q")])


def test_what_was_answered_before_a_failure_is_not_asked_again(server: Misbehaving, tmp_path: Path) -> None:
    journal = tmp_path / "journal.jsonl"

    def gives_out(handler: Handler) -> None:
        text = handler.body["messages"][0]["content"]
        (says(text) if text < "5" else sends(403, {"error": "no more"}))(handler)

    server.script = [gives_out]
    texts = [str(k) for k in range(10)]
    for text in texts[:5]:
        with JudgeClient(server.endpoint, WAIT, journal) as client:
            client.ask([question(text)])
    with JudgeClient(server.endpoint, WAIT, journal) as client, pytest.raises(JudgeUnavailable, match="no more"):
        client.ask([question(text) for text in texts])
    with journal.open("a") as file:
        file.write('{"request": "9", "ans')  # killed while it wrote
    server.bodies.clear()
    server.script = [lambda handler: says(handler.body["messages"][0]["content"])(handler)]
    with JudgeClient(server.endpoint, WAIT, journal) as client:
        assert client.ask([question(text) for text in texts]) == texts
    assert sorted(body["messages"][0]["content"] for body in server.bodies) == texts[5:]
    with JudgeClient(server.endpoint, WAIT, journal) as client:
        assert client.log == dict(zip(texts, texts, strict=True))


def test_equal_messages_are_asked_once_and_answers_keep_their_order(server: Misbehaving, client: JudgeClient) -> None:
    def echoes(handler: Handler) -> None:
        text = handler.body["messages"][0]["content"]
        time.sleep(0.002 * (9 - int(text)))  # the first to be asked are the last to be answered
        says(text)(handler)

    server.script = [echoes]
    texts = [str(k % 10) for k in range(40)]
    assert client.ask([question(text) for text in texts]) == texts
    assert sorted(body["messages"][0]["content"] for body in server.bodies) == [str(k) for k in range(10)]
    assert client.ask([question(text) for text in reversed(texts)]) == texts[::-1]
    assert len(server.bodies) == 10
    assert client.ask([]) == []


def test_questions_go_out_side_by_side(server: Misbehaving, client: JudgeClient) -> None:
    together = threading.Barrier(CONCURRENCY, timeout=10)

    def waits(handler: Handler) -> None:
        together.wait()
        says("1")(handler)

    server.script = [waits]
    assert client.ask([question(str(k)) for k in range(2 * CONCURRENCY)]) == ["1"] * 2 * CONCURRENCY


def test_one_failure_ends_the_round(server: Misbehaving, client: JudgeClient) -> None:
    server.script = [sends(403, {"error": "no more"})]
    with pytest.raises(JudgeUnavailable, match="no more"):
        client.ask([question(str(k)) for k in range(500)])
    assert len(server.bodies) < 500
