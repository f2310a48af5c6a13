"""The rubric over HTTP, as a judge client meets it."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import urllib3

from curation_env.mini.judge import MODEL, JudgeServer, serve


@pytest.fixture(scope="module")
def judge() -> Iterator[JudgeServer]:
    server = serve()
    yield server
    server.shutdown()


def ask(judge: JudgeServer, text: str) -> urllib3.BaseHTTPResponse:
    body = {"model": MODEL, "messages": [{"role": "system", "content": "grade"}, {"role": "user", "content": text}]}
    return urllib3.request("POST", f"{judge.url}/chat/completions", json=body)


def graded(judge: JudgeServer, **case: str) -> str:
    return ask(judge, "Some instructions.\n" + json.dumps(case)).json()["choices"][0]["message"]["content"]


def test_models_are_listed(judge: JudgeServer) -> None:
    assert urllib3.request("GET", f"{judge.url}/models").json()["data"][0]["id"] == MODEL


@pytest.mark.parametrize(
    ("reference", "prediction", "score"),
    [
        ("red<AND>circle", "the red circle", "1.0"),
        ("red<AND>circle", "a red square", "0.5"),
        ("red<AND>circle", "a blue square", "0.0"),
        ("E K<OR>K E", "K E", "1.0"),
        ("3", "0 1 2 3 4 5 6 7 8 9", "0.5"),
        ("a large red circle in the top left .", "a red circle .", "0.4"),
    ],
)
def test_mmvet_is_a_share_of_content_words(judge: JudgeServer, reference: str, prediction: str, score: str) -> None:
    assert graded(judge, question="?", reference=reference, prediction=prediction, rule="mmvet") == score


def test_llavabench_gives_two_scores(judge: JudgeServer) -> None:
    text = "there is a red circle ."
    pairs = [
        graded(judge, question="?", reference=text, prediction=p, rule="llavabench").splitlines()[0]
        for p in (text, "no")
    ]
    assert pairs == ["9 9", "9 1"]


@pytest.mark.parametrize(
    ("question", "prediction", "found"),
    [
        ("how many ?", "there are 3 bars", "3"),
        ("which ?\nA. red\nB. blue", "B", "B"),
        ("which ?\nA. red\nB. blue", "it is blue", "B"),
        ("which ?\n(A) red\n(B) blue", "it is green", "it is green"),
    ],
)
def test_mathvista_extracts(judge: JudgeServer, question: str, prediction: str, found: str) -> None:
    assert graded(judge, question=question, reference="", prediction=prediction, rule="mathvista") == found


def test_the_process_asks_for_its_key_and_ends_with_its_parent(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    command = [sys.executable, "-m", "curation_env.mini.judge", "--ready-file", str(ready)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, env={**os.environ, "CURATION_JUDGE_KEY": "k"})
    try:
        while not ready.is_file():
            assert process.poll() is None
            time.sleep(0.02)
        url = ready.read_text()
        assert urllib3.request("GET", f"{url}/models").status == 401
        assert urllib3.request("GET", f"{url}/models", headers={"Authorization": "Bearer k"}).status == 200
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(10) == 0
    finally:
        process.kill()


def test_malformed_requests_are_answered(judge: JudgeServer) -> None:
    assert ask(judge, "no json").status == 400
    assert (
        "no rule"
        in ask(judge, json.dumps(dict(question="", reference="", prediction="", rule="x"))).json()["error"]["message"]
    )
    assert urllib3.request("POST", f"{judge.url}/chat/completions", body=b"{").status == 400
    assert urllib3.request("GET", f"{judge.url}/nothing").status == 404
