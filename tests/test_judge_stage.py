"""A judge of the user's, at an address or started by a command: a stage of its own after the student's."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from curation_env.assets import prepared
from curation_env.errors import JudgeUnavailable
from curation_env.executor import LocalExecutor
from curation_env.judge import COMMAND, Judge, configured
from curation_env.mini.judge import MODEL, serve
from curation_env.pipeline import Pipeline
from curation_env.task import Task, conf_dir

STARTS = f"{sys.executable} -m curation_env.mini.judge --port {{port}}"


@pytest.fixture(scope="module")
def executor() -> Iterator[LocalExecutor]:
    with LocalExecutor() as made:
        yield made


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Iterator[Judge]:
    for name in (COMMAND, "CURATION_JUDGE_URL", "CURATION_JUDGE_KEY"):
        monkeypatch.delenv(name, raising=False)
    made = Judge()
    yield made
    made.close()


@pytest.fixture
def pipeline(executor: LocalExecutor, judge: Judge, data_root: Path, tmp_path: Path) -> Pipeline:
    """The nano task, graded by an endpoint that serves the miniature's rubric."""
    suite = yaml.safe_load((conf_dir() / "suite" / "mini-v1.yaml").read_text())
    suite["judge"] = {"kind": "endpoint", "model": MODEL}
    (tmp_path / "graded.yaml").write_text(json.dumps(suite))  # JSON is YAML
    nano = Task.load("nano")
    task = nano.model_copy(update={"suite": str(tmp_path / "graded")})
    options = {"cache": False, "device": "cpu", "data_root": data_root}
    return Pipeline(task, prepared(nano, data_root), executor, judge, **options)


def test_a_local_judge_runs_for_its_stage_alone(
    pipeline: Pipeline, judge: Judge, executor: LocalExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = Pipeline(
        Task.load("nano"), pipeline.assets, executor, judge, cache=False, device="cpu", data_root=pipeline.data_root
    ).base()
    monkeypatch.setenv(COMMAND, STARTS)
    stages, pids = [], []

    def note(event: dict) -> None:
        stages.append(event["stage"])
        local = judge._local
        pids.append(local._process.pid if local is not None and local._process is not None else None)

    found = pipeline.base(note)
    assert found.scores == expected.scores
    assert {part for part in found.seconds if ": " not in part} == {"evaluate", "judge"}
    assert {pid for stage, pid in zip(stages, pids, strict=True) if stage != "judge"} == {None}
    [pid] = {pid for stage, pid in zip(stages, pids, strict=True) if stage == "judge"}
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    version = json.loads(found.files["judge.json"])
    assert (version["id"], version["suite"]) == (MODEL, "mini-v1")
    assert found.files["predictions.jsonl"] == expected.files["predictions.jsonl"]
    assert "judge.json" not in expected.files


def test_an_endpoint_is_probed_before_the_student_answers(
    pipeline: Pipeline, judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages: list[str] = []
    with pytest.raises(JudgeUnavailable, match=rf"set CURATION_JUDGE_URL .* or {COMMAND}"):
        pipeline.base(lambda event: stages.append(event["stage"]))
    server = serve()
    try:
        monkeypatch.setenv("CURATION_JUDGE_URL", server.url.replace("/v1", "/v2"))
        with pytest.raises(JudgeUnavailable, match="404"):
            pipeline.base(lambda event: stages.append(event["stage"]))
        assert not stages
        monkeypatch.setenv("CURATION_JUDGE_URL", server.url)
        monkeypatch.setenv(COMMAND, "never-started")  # the address goes before the command
        assert {part for part in pipeline.base().seconds if ": " not in part} == {"evaluate", "judge"}
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("no-such-program --port {port}", "can't be started: .*no-such-program"),
        (f"{sys.executable} -c \"raise SystemExit('no room on port {{port}}')\"", r"status 1: no room on port \d+"),
        (f"{sys.executable} -c ''", "status 0: it printed nothing"),
    ],
)  # fmt: skip
def test_a_local_judge_that_does_not_start_says_why(
    command: str, words: str, judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(COMMAND, command)
    with judge.serving(), pytest.raises(JudgeUnavailable, match=words):
        judge.endpoint({"judge": {"kind": "endpoint", "model": "m"}})


def test_what_is_configured_is_told_without_starting_it(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {"kind": "endpoint", "model": MODEL}
    for name in (COMMAND, "CURATION_JUDGE_URL", "CURATION_JUDGE_KEY"):
        monkeypatch.delenv(name, raising=False)
    assert configured(wanted) == (False, "")
    monkeypatch.setenv(COMMAND, STARTS)
    assert configured(wanted) == (True, f"{MODEL}, started by {COMMAND} when it is asked")
    monkeypatch.setenv(COMMAND, "no-such-program --port {port}")
    assert configured(wanted) == (False, f"{COMMAND} begins with 'no-such-program', which is no program here")
    server = serve()
    try:
        monkeypatch.setenv("CURATION_JUDGE_URL", server.url)  # an address goes before a command
        assert configured(wanted) == (True, f"{MODEL} at {server.url}")
        ready, said = configured({**wanted, "model": "another"})
        assert not ready
        assert f"does not serve 'another', only {MODEL}" in said
    finally:
        server.shutdown()
        server.server_close()
