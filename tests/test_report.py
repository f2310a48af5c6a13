"""What is reported of a run, and against which reference."""

from __future__ import annotations

import json
import math
import shutil

import pytest
from rich.console import Console

from curation_env import task as task_module
from curation_env.errors import InvalidSetting
from curation_env.feedback import feedback_table, gain_recovered, judge_free_mean
from curation_env.report.sealed import sealed_table
from curation_env.report.table import run_table, save_plot
from curation_env.runs import Run
from curation_env.state import Iteration, State
from curation_env.task import Task, put_reference


def part(base: float, random: float, full: float) -> dict:
    return {
        "base": {"mean": base, "sd": None, "n": 1, "source": "a test"},
        "random": {"mean": random, "sd": 1.5, "n": 12, "source": "a test"},
        "full": {"mean": full, "sd": 0.5, "n": 3, "source": "a test"},
        "seed_sd": 0.4,
    }


REFERENCE = {"feedback": part(40.0, 50.0, 80.0), "sealed": part(1.0, 2.0, 3.0), "all": part(30.0, 45.0, 70.0)}


@pytest.fixture
def referenced(tmp_path, monkeypatch):
    """The configuration with a reference for `nano`, world 0, written as `calibrate --out` writes it."""
    shutil.copytree(task_module.conf_dir(), tmp_path / "conf")
    (tmp_path / "conf" / "reference").mkdir(exist_ok=True)
    put_reference(tmp_path / "conf" / "reference" / "tiny.json", 0, REFERENCE)
    with (tmp_path / "conf" / "task" / "nano.yaml").open("a") as file:
        file.write("reference: tiny\n")
    monkeypatch.setattr(task_module, "conf_dir", lambda: tmp_path / "conf")


def run_of(task: Task, tmp_path) -> Run:
    names = task.benchmarks
    history = [
        Iteration(0, dict.fromkeys(names, 40.0), 40.0, 1.0),
        Iteration(1, dict.fromkeys(names, 50.0), 50.0, 1.0, n_rows=96),
        Iteration(2, None, None, error="policy_failed"),
    ]
    return Run(tmp_path, task, State(0, iteration=2, history=history, best=1), [])


def printed(table) -> str:
    console = Console(width=240)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_references_are_written_in_the_form_that_is_read(tmp_path):
    path = tmp_path / "mine.json"
    put_reference(path, 0, {"all": 1})
    put_reference(path, 7, {"all": 2})
    put_reference(path, 0, {"all": 3})
    assert json.loads(path.read_text()) == {"worlds": {"0": {"all": 3}, "7": {"all": 2}}}
    path.write_text('{"all": 1}')
    with pytest.raises(InvalidSetting, match="not a file of references"):
        put_reference(path, 0, {})


def test_gain_recovered_is_the_way_from_base_to_full_on_the_items_shown(referenced):
    task = Task.load("nano")
    assert gain_recovered(task, 50.0, 40.0) == pytest.approx((50 - 40) / (80 - 40))
    assert gain_recovered(task, 30.0, 40.0) == pytest.approx(-0.25)
    published = Task.load("nano", feedback="all")
    assert gain_recovered(published, 50.0, 30.0) == pytest.approx((50 - 30) / (70 - 30))


@pytest.mark.parametrize("overrides", [{"rows": 50}, {"tokens": 900}, {"seeds": 2}, {"feedback": "all", "rows": 50}])
def test_what_moves_scores_has_no_reference(referenced, overrides):
    assert Task.load("nano", **overrides).reference_scores is None
    assert gain_recovered(Task.load("nano", **overrides), 50.0, 40.0) is None


def test_other_worlds_and_what_moves_no_score(referenced):
    assert Task.load("nano").in_world(5).reference_scores is None
    assert Task.load("nano", iterations=9, detail="items").reference_scores == REFERENCE


def test_the_table_shows_random_and_full_where_they_are_known(referenced, tmp_path):
    run = run_of(Task.load("nano"), tmp_path)
    rows = {line.split("│")[1].strip(): line for line in printed(run_table(run)).splitlines() if line.count("│") > 3}
    assert list(rows) == ["0 base", "random", "full pool", "1* nominee", "2"]
    for name, words in (
        ("0 base", ("40.00", "0%")),
        ("random", ("50.00", "1.50", "25%")),
        ("full pool", ("80.00", "0.50", "100%")),
        ("1* nominee", ("50.00", "1.00", "25%", "96")),
        ("2", ("policy_failed",)),
    ):
        assert all(word in rows[name] for word in words), rows[name]
    assert "gain recovered 25%" in feedback_table(run.task, run.state.history, 1)
    assert save_plot(run, tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    unknown = printed(run_table(run_of(Task.load("nano", rows=50), tmp_path)))
    assert "random" not in unknown.partition("*")[0]
    assert "%" not in unknown


def test_the_mean_of_what_no_judge_grades_stands_beside_the_mean(tmp_path):
    task = Task.load("nano")
    judged = {"MiniLLaVABench", "MiniMMVet", "MiniMathVista"}
    assert set(task.benchmarks) - set(task.judge_free) == judged
    scores = {name: 7.0 if name in judged else 47.0 for name in task.benchmarks}
    history = [Iteration(0, scores, 32.0, 1.0)]
    table = printed(run_table(Run(tmp_path, task, State(0, history=history), [])))
    assert "judge-free" in table
    assert "Suite: mini-v1." in " ".join(table.split())
    [base] = [line for line in table.splitlines() if "0 base" in line]
    assert "32.00 │      47.00 │ 1.00" in base
    assert feedback_table(task, history, 0).splitlines()[2].split()[-2:] == ["32.00", "47.00"]
    row = {"iteration": 0, "feedback": 32.0, "sealed": 12.0, "judge_free": 13.5, "scores": {"MiniOCR": 12.0}}
    opened = {"task": "nano", "openings": 1, "nominee": 0, "iterations": [row]}
    assert "12.00 │      13.50 │         32.00" in printed(sealed_table(opened))
    assert math.isnan(judge_free_mean(task, {"MiniMMVet": 7.0}))
