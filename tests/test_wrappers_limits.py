"""Limits of an episode, over the nano task."""

from __future__ import annotations

import shutil

import pytest

from curation_env import envs, task
from curation_env.actions import policy, shell, stop
from curation_env.errors import InvalidSetting
from curation_env.wrappers.limits import (
    LIMITS,
    CostLimit,
    CurationComputeLimit,
    ShellCommandLimit,
    WallClockLimit,
    limits,
)
from curation_env.wrappers.numeric import NumericObservation


def test_the_last_command_of_a_limit_is_played(nano):
    env = ShellCommandLimit(nano(), 2)
    observation, _ = env.reset(seed=0)
    assert observation["remaining"][1] == 1.0
    observation, _, _, truncated, info = env.step(shell("echo one"))
    assert (info["status"], truncated, observation["remaining"][1]) == ("shell_ok", False, 0.5)
    observation, reward, terminated, truncated, info = env.step(shell("echo two"))
    assert (reward, terminated, truncated) == (0, False, True)
    assert (info["status"], info["error"]) == ("limit", "limit_exceeded")
    assert "two" in observation["message"]
    assert "2 shell commands" in observation["message"]
    assert observation["remaining"][1] == 0.0
    assert observation in env.observation_space
    assert any(event["kind"] == "limit" for event in env.unwrapped.ledger.events())


def test_a_new_episode_starts_afresh(nano):
    env = ShellCommandLimit(nano(), 1)
    for _ in range(2):
        observation, _ = env.reset(seed=0)
        assert observation["remaining"][1] == 1.0
        assert env.step(shell("true"))[3]


def test_a_scored_iteration_stays_scored(nano, random_policy):
    env = WallClockLimit(nano(rows=16), 0.001)
    env.reset(seed=0)
    observation, _, terminated, truncated, info = env.step(policy(random_policy))
    assert (info["status"], info["error"], terminated, truncated) == ("scored", "", False, True)
    assert info["score"] == pytest.approx(float(observation["average"][0]), abs=1e-3)


def test_curation_compute_counts_commands_and_policies(nano):
    env = CurationComputeLimit(nano(), 0.5)
    env.reset(seed=0)
    assert not env.step(shell("true"))[3]
    assert env.step(shell("sleep 0.6"))[3]


def test_cost_is_what_the_agent_reports(nano):
    env = CostLimit(nano(), 1.0)
    env.reset(seed=0)
    env.unwrapped.add_cost(0.75)
    observation, _, _, truncated, _ = env.step(shell("true"))
    assert (truncated, observation["remaining"][4]) == (False, 0.25)
    env.unwrapped.add_cost(0.25)
    assert env.step(shell("true"))[3]
    assert env.unwrapped.usage["cost"] == 1.0
    for wrong in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="a cost is"):
            env.unwrapped.add_cost(wrong)


def test_an_ended_episode_is_not_truncated_too(nano):
    env = WallClockLimit(nano(), 0.001)
    env.reset(seed=0)
    _, _, terminated, truncated, info = env.step(stop())
    assert (terminated, truncated, info["status"]) == (True, False, "finished")


def test_around_numbers_the_episode_ends_all_the_same(nano):
    env = ShellCommandLimit(NumericObservation(nano()), 1)
    env.reset(seed=0)
    observation, _, _, truncated, info = env.step(shell("true"))
    assert (truncated, info["status"]) == (True, "limit")
    assert observation in env.observation_space


@pytest.fixture
def budgeted(tmp_path, monkeypatch):
    """The configuration with a `nano` whose file sets budgets."""
    shutil.copytree(task.conf_dir(), tmp_path / "conf")
    with (tmp_path / "conf" / "task" / "nano.yaml").open("a") as file:
        file.write("budgets: {shell_commands: 2, wall_seconds: 600}\nmax_episode_steps: 3\n")
    monkeypatch.setattr(task, "conf_dir", lambda: tmp_path / "conf")


def test_a_tasks_own_budgets_hold_without_a_wrapper(nano, budgeted):
    env = nano()
    env.reset(seed=0)
    assert not env.step(shell("true"))[3]
    observation, _, _, truncated, info = env.step(shell("true"))
    assert (truncated, info["status"], observation["remaining"][1]) == (True, "limit", 0.0)
    assert "its limit of 2 shell commands is used up" in observation["message"]
    assert env.unwrapped.ledger.events("step")[-1]["info"]["status"] == "limit"  # the record has what was returned


def test_the_step_limit_says_so(nano, budgeted):
    env = limits(nano(), shell_commands=10)  # the tighter one holds
    env.reset(seed=0)
    results = [env.step({"tool": 9, "text": ""}) for _ in range(3)]
    assert [truncated for *_, truncated, _ in results] == [False, False, True]
    assert results[-1][4]["status"] == "limit"
    assert "3 steps" in results[-1][0]["message"]


def test_limits_by_name(nano):
    env = nano()
    assert limits(env) is env
    assert limits(env, cost=None) is env
    wrapped = limits(env, shell_commands=30, wall_seconds=600)
    found = {type(w).__name__: w.limit for w in (wrapped, wrapped.env)}
    assert found == {"ShellCommandLimit": 30, "WallClockLimit": 600}
    with pytest.raises(InvalidSetting, match="no limit 'shell'"):
        limits(env, shell=3)
    for wrong in (0, "abc", float("nan"), True):
        with pytest.raises(InvalidSetting, match="more than 0"):
            limits(env, cost=wrong)


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("amount", [0, -1, float("nan")])
def test_amounts_are_checked(limit, amount):
    with pytest.raises(ValueError, match="more than 0"):
        limit(envs.make("nano"), amount)
