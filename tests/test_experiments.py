"""`experiments/run.py` as a user runs it: a run, a sweep, skipping, resuming, tracking, mistakes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from curation_env.ledger import read_events
from curation_env.runs import locate, read_run
from curation_env.task import conf_dir, task_names

SCRIPT = Path(__file__).parent.parent / "experiments" / "run.py"
COMMON = ("task=nano", "sandbox=bubblewrap", "executor.device=cpu")


def command(*arguments):
    # Hydra's own flags come before the overrides.
    return [sys.executable, str(SCRIPT), *sorted((*COMMON, *arguments), key=lambda text: not text.startswith("-"))]


@pytest.fixture
def run(tmp_path):
    """Runs the script in an empty folder; returns its stdout."""

    def call(*arguments, fails=False):
        done = subprocess.run(command(*arguments), cwd=tmp_path, capture_output=True, text=True)
        assert (done.returncode != 0) == fails, done.stderr
        return done.stderr if fails else done.stdout

    return call


def folders(tmp_path):
    return sorted(folder for folder in (tmp_path / "runs").iterdir() if not folder.name.startswith("."))


def test_a_run_leaves_its_folder_and_nothing_else(run, tmp_path):
    output = run("agent=search", "iterations=2")
    (folder,) = folders(tmp_path)
    assert re.fullmatch(r"nano-search-[0-9a-f]{12}", folder.name)
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}
    assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", "episode-0000", "scores.png"]
    assert (folder / "scores.png").read_bytes().startswith(b"\x89PNG")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert (config["task"]["name"], config["iterations"], config["scaffold"]["name"]) == ("nano", 2, "open_prompt")
    assert output.splitlines()[-1] == f"run folder: {folder}"
    assert "policy: iteration 2: feedback average" in output
    assert "gain recovered" in output
    assert "\x1b" not in output
    assert "is finished already" in run("agent=search", "iterations=2")
    assert len(read_run(folder).state.history) == 3
    assert run("agent=search", "iterations=2", "--cfg=job").startswith("task:")


def test_a_sweep_makes_every_run_once(run, tmp_path):
    run("-m", "agent=search,baseline", "iterations=1")
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}
    names = [folder.name for folder in folders(tmp_path)]
    assert [name.rpartition("-")[0] for name in names] == ["nano-baseline", "nano-search"]
    again = run("-m", "iterations=1", "agent=baseline,search")
    assert again.count("is finished already, so it is not made again") == 2
    assert [folder.name for folder in folders(tmp_path)] == names


def test_a_killed_run_goes_on(run, tmp_path):
    arguments = ("agent=baseline", "iterations=3")
    process = subprocess.Popen(command(*arguments), cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for text in process.stdout:
        if text.startswith("policy: iteration 1"):
            break
    process.kill()
    process.wait()
    process.stdout.close()
    wait_until_unlocked(folders(tmp_path)[0])
    output = run(*arguments)
    assert "iteration 1:" not in output
    assert "iteration 3:" in output
    (folder,) = folders(tmp_path)
    events = read_events(locate(folder))
    assert [event["number"] for event in events if event["kind"] == "iteration"] == [0, 1, 2, 3]


def wait_until_unlocked(folder):
    """Until what the killed process had started is gone, the lock may still be held."""
    from curation_env.errors import RunLocked
    from curation_env.ledger import Ledger

    for _ in range(20):
        try:
            Ledger(locate(folder)).close()
            return
        except RunLocked:
            time.sleep(0.5)
    raise AssertionError("the killed run's lock is still held")


def test_wandb_offline_writes_the_scores_and_sends_nothing(run, tmp_path):
    run("agent=baseline", "iterations=1", "logger=wandb")
    (folder,) = folders(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}
    (offline,) = (folder / "wandb").glob("offline-run-*")
    (log,) = offline.glob("*.wandb")
    data = log.read_bytes()
    assert folder.name.encode() in data
    assert b"scores/MiniOCR" in data
    scores = read_run(folder).state.history[1]
    assert f"{scores.average}"[:8].encode() in data
    assert b"sealed" not in data


def test_mistakes_are_one_line(run):
    assert "task.rows can't be changed here: use rows=10" in run("task.rows=10", fails=True)
    assert "In 'config': Could not find 'agent/sarch'" in run("agent=sarch", fails=True)
    assert "nano' has one world" in run("world=5", fails=True)
    for arguments, words in (
        (["agent=replay"], "give a value: Missing mandatory value: run (of agent.run)"),
        (["agent=replay", "agent.run=nowhere"], "no run at nowhere"),
        (["agent=baseline", "agent.policies=[mine]"], "no policy 'mine'"),
        (["iterations=0"], "greater than or equal to 1"),
        (["seed=abc"], "seed must be a whole number from 0, not 'abc'"),
        (["seed=-1"], "seed must be a whole number from 0, not -1"),
        (["task=mini-worlds", "world=abc"], "world must be a whole number from 0, not 'abc'"),
        (["sandbox.kind=foo"], "sandbox.kind must be one of auto"),
        (["executor.device=foo"], "executor.device must be one of auto"),
        (["limits.cost=-2"], "the limit cost must be a number more than 0, not -2"),
        (["seeds=99"], "ask for fewer"),
        (["cache=3"], "cache must be true or false"),
        (["logger=wandb", "logger.mode=onlin"], "run.py: logger: mode must be 'offline' or 'online'"),
        (["task=mini-mixture"], "task 'mini-mixture' takes numbers, agent 'search' gives texts"),
    ):
        error = run(*arguments, fails=True)
        assert words in error
        assert len(error.splitlines()) == 1


def test_one_bad_job_of_a_sweep_does_not_keep_the_others(run, tmp_path):
    text = run("-m", "agent=baseline", "iterations=1", "agent.policies=[nowhere],[random]", fails=True)
    (said,) = [line for line in text.splitlines() if "no policy 'nowhere'" in line]
    assert said.startswith("run.py: ")
    assert "agent.policies=[nowhere]" in said
    assert "Traceback" not in text
    (folder,) = folders(tmp_path)
    assert len(read_run(folder).state.history) == 2


def test_a_changed_policy_file_is_another_run_and_a_fresh_one_is_played_anew(run, tmp_path):
    policy = tmp_path / "mine.py"
    policy.write_text("import curation\ncuration.select(curation.pool()['id'][:20])\n")
    arguments = ("agent=baseline", f"agent.policies=[{policy}]", "iterations=1", "limits.shell_commands=5")
    run(*arguments)
    policy.write_text("import curation\ncuration.select(curation.pool()['id'][:30])\n")
    assert "finished already" not in run(*arguments)
    assert len(folders(tmp_path)) == 2
    output = run(*arguments, "fresh=true")
    assert "iteration 1: feedback average" in output
    assert len(folders(tmp_path)) == 2
    assert sorted(len(list(folder.glob("episode-*"))) for folder in folders(tmp_path)) == [1, 2]


def test_a_limit_of_the_configuration_ends_the_run(run, tmp_path):
    assert "shell: limit (limit_exceeded)" in run("agent=random", "agent.look=0.99", "limits.shell_commands=1")
    (folder,) = folders(tmp_path)
    assert [event["resource"] for event in read_events(locate(folder)) if event["kind"] == "limit"] == [
        "shell_commands"
    ]


def test_groups_are_complete_and_task_files_are_the_task_group(run):
    listed = run("--info=defaults")
    assert "task/nano" in listed
    for name in task_names():
        assert yaml.safe_load((conf_dir() / "task" / f"{name}.yaml").read_text())["name"] == name
    for path in (conf_dir() / "experiment").glob("*.yaml"):
        config = yaml.safe_load(run(f"experiment={path.stem}", "--cfg=job", "--resolve"))
        assert config["task"]["name"] in task_names()
    assert os.environ.get("WANDB_MODE") is None
    assert json.dumps(config)
