"""The `curation-env` command as a user runs it: real processes on the nano task."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest
import typer

from curation_env.pool import Pool

DIGITS = resources.files("curation_env.mini") / "assets" / "digits.npz"


def run(*arguments: str | Path, expect: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "curation_env.cli", *map(str, arguments)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == expect, done.stdout[-2000:] + done.stderr[-2000:]
    return done


@pytest.fixture(scope="module")
def policy_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("policy") / "first.py"
    path.write_text("import curation\ncuration.select(curation.pool()['id'][:40])\n")
    return path


@pytest.fixture(scope="module")
def evaluated(policy_file, tmp_path_factory) -> dict:
    """One policy through the whole path; what `--json` printed, and nothing else."""
    folder = tmp_path_factory.mktemp("run")
    done = run("evaluate", "nano", policy_file, "--sandbox", "bubblewrap", "--run-dir", folder, "--json")
    return json.loads(done.stdout)


def test_tasks_lists_every_task():
    listed = json.loads(run("tasks", "--json").stdout)["tasks"]
    assert {"mini", "mini-worlds", "mini-mixture", "nano"} <= {task["name"] for task in listed}
    assert "CurationBench-MiniWorlds-v0" in run("tasks").stdout


def test_prepare_then_doctor_is_content(data_root):
    assert "blocked by the audit" in run("prepare", "nano").stdout
    answer = json.loads(run("doctor", "nano", "--json").stdout)
    findings = answer["findings"]
    assert (answer["task"], answer["ready"]) == ("nano", True)
    assert all(finding["ok"] for finding in findings if finding["what"] in ("pool", "suite", "view", "student", "git"))
    assert str(data_root) in run("doctor", "nano").stdout


def test_doctor_names_what_is_missing(tmp_path):
    findings = json.loads(run("doctor", "nano", "--data-root", tmp_path, "--json").stdout)["findings"]
    pool = next(finding for finding in findings if finding["what"] == "pool")
    assert not pool["ok"]
    assert str(tmp_path) in pool["text"]


def test_evaluate_prints_one_json_object(evaluated):
    assert evaluated["status"] == "scored", evaluated["message"]
    assert evaluated["n_rows"] == 40
    assert len(evaluated["scores"]) == 8
    assert evaluated["score"] == pytest.approx(sum(evaluated["scores"].values()) / 8, abs=1e-5)


def test_evaluate_says_what_is_wrong(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("raise SystemExit('nothing here')")
    done = run("evaluate", "nano", bad, "--sandbox", "bubblewrap", "--json", expect=1)
    assert json.loads(done.stdout)["error"] == "policy_failed"


def test_a_policy_is_evaluated_on_a_numeric_task_too(tmp_path, monkeypatch):
    """The miniature itself takes long here, so `nano` is made numeric."""
    from curation_env import cli, envs
    from curation_env.wrappers import MixtureAction, NumericObservation

    plain, said = envs.make, []
    monkeypatch.setattr(envs, "make", lambda task, **kwargs: NumericObservation(MixtureAction(plain(task, **kwargs))))
    monkeypatch.setattr(cli, "_print_json", said.append)
    bad = tmp_path / "bad.py"
    bad.write_text("raise SystemExit('nothing here')")
    with pytest.raises(typer.Exit):
        cli.evaluate("nano", bad, None, "bubblewrap", None, tmp_path, None, True)
    assert said[0]["error"] == "policy_failed"


def test_report_draws_the_run(evaluated):
    done = run("report", evaluated["run"])
    assert "gain recovered" in done.stdout
    assert "0 base" in done.stdout
    picture = Path(done.stdout.split("plot: ")[1].strip())
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_unseal_counts_every_opening(evaluated):
    first = json.loads(run("unseal", evaluated["run"], "--json").stdout)
    second = json.loads(run("unseal", evaluated["run"], "--json").stdout)
    assert (first["openings"], second["openings"]) == (1, 2)
    assert [row["iteration"] for row in second["iterations"]] == [0, 1]
    assert all(0 <= row["sealed"] <= 100 for row in second["iterations"])
    assert second["iterations"][1]["feedback"] == pytest.approx(evaluated["score"], abs=1e-4)
    assert "MiniLLaVABench" not in second["iterations"][0]["scores"]  # too small to split: feedback only
    assert "opened 3 times" in run("unseal", evaluated["run"]).stdout


def test_audit_of_a_file(data_root, tmp_path):
    run("prepare", "nano")
    pool_folder = next((data_root / "pools").glob("nano-*-w0"))
    view_folder = next((data_root / "views").glob("nano-*-w0--*"))
    pool, view = Pool.open(pool_folder), Pool.open(view_folder)
    good = tmp_path / "good.txt"
    good.write_text("\n".join(view.ids[:5]))
    assert "passed" in run("audit", "nano", good).stdout
    assert json.loads(run("audit", "nano", good, "--json").stdout)["passed"] is True
    leaking = tmp_path / "leaking.txt"
    leaking.write_text(next(id_ for id_ in pool.ids if id_ not in view.position))
    done = run("audit", "nano", leaking, expect=2)
    assert "not in the pool" in done.stderr
    answer = json.loads(run("audit", "nano", leaking, "--json", expect=2).stdout)
    assert answer["error"] == "invalid_submission"
    assert "not in the pool" in answer["message"]
    leaking.write_bytes(b"\xff\xfe")
    assert "is not UTF-8 (byte 0)" in run("audit", "nano", leaking, expect=2).stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("doctor", "minni"), "did you mean 'mini'"),
        (("report", "/nowhere"), "no run at /nowhere"),
        (("unseal", "/nowhere"), "no run at /nowhere"),
        (("audit", "nano", "/nowhere"), "/nowhere"),
        (("prepare", "mini-worlds"), "draws a world at every reset"),
        (("prepare", "mini-worlds", "--world", "-3"), "worlds are numbered from 0, not -3"),
        (("evaluate", "nano", __file__, "--sandbox", "foo"), "sandbox must be one of auto"),
        (("evaluate", "nano", __file__, "--world", "3"), "has one world"),
        (("evaluate", "nano", __file__, "--seeds", "99"), "ask for fewer"),
        (("evaluate", "nano", DIGITS), "is not UTF-8"),
        (("audit", "nano", "--json"), "Missing argument"),
    ],
)
def test_errors_are_one_line_that_says_what_to_do(arguments, words):
    done = run(*arguments, expect=2)
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1
    if "--json" in arguments:
        assert words in json.loads(done.stdout)["message"]
