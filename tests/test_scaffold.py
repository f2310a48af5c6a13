"""Scaffolds: the prompt, its errors, and that the environment stays a proper one."""

from __future__ import annotations

import json
import shutil
import sys
import warnings

import gymnasium as gym
import pytest
from gymnasium.utils.env_checker import check_env

from curation_env.actions import shell
from curation_env.envs import make
from curation_env.wrappers import Scaffold, ScaffoldError, scaffold
from curation_env.wrappers.scaffold import scaffold_names, scaffold_settings


@pytest.mark.parametrize("name", scaffold_names())
def test_every_scaffold_renders_on_nano(nano, name):
    env = scaffold(nano(), name)
    with pytest.raises(gym.error.ResetNeeded):
        _ = env.prompt
    env.reset(seed=0)
    prompt = env.get_wrapper_attr("prompt")
    assert "at most 96" in prompt
    assert "curation.select" in prompt
    assert all(benchmark in prompt for benchmark in env.unwrapped.task.benchmarks)
    assert not any(line != line.rstrip() or len(line) > 500 for line in prompt.splitlines())
    assert "{" not in prompt
    recorded = env.unwrapped.ledger.events("scaffold")
    assert [(event["name"], event["prompt"]) for event in recorded] == [(name, prompt)]
    assert scaffold_settings(name)["name"] == name


def test_the_prompt_follows_the_task_and_the_override(nano):
    plain = scaffold(nano(), "open_prompt")
    other = scaffold(nano(tokens=2000, rows=50), "open_prompt", extra="Write short policies.")
    plain.reset(seed=0)
    other.reset(seed=0)
    assert "supervised tokens" not in plain.prompt
    assert "at most 50" in other.prompt
    assert "2000 supervised tokens" in other.prompt
    assert other.prompt.rstrip().endswith("Write short policies.")


def test_actions_and_observations_pass_unchanged(nano):
    bare, wrapped = nano(), scaffold(nano(), "open_prompt")
    assert wrapped.observation_space == bare.observation_space
    first, second = bare.reset(seed=0), wrapped.reset(seed=0)
    assert first[0]["message"] == second[0]["message"]
    assert first[1] == second[1]
    assert bare.step(shell("echo hi"))[0]["message"] == wrapped.step(shell("echo hi"))[0]["message"]


def test_unknown_names_and_settings_name_the_nearest(nano):
    with pytest.raises(ScaffoldError, match="did you mean 'open_prompt'"):
        scaffold(nano(), "open_promt")
    with pytest.raises(ScaffoldError, match="no setting 'extras'; did you mean 'extra'"):
        scaffold(nano(), "open_prompt", extras="x")
    with pytest.raises(ScaffoldError, match=r"no prompt 'missing\.j2'"):
        Scaffold(nano(), name="x", prompt="missing.j2")


@pytest.fixture
def templates(tmp_path, monkeypatch):
    """A copy of the configuration, to put templates into."""
    module = sys.modules["curation_env.wrappers.scaffold"]  # `curation_env.wrappers.scaffold` is the function
    shutil.copytree(module.conf_dir() / "scaffold", tmp_path / "conf" / "scaffold")
    monkeypatch.setattr(module, "conf_dir", lambda: tmp_path / "conf")
    return tmp_path / "conf" / "scaffold"


def test_undefined_variables_are_errors(nano, templates):
    (templates / "a.j2").write_text("{{ task.rows }} {{ tone }}")
    with pytest.raises(ScaffoldError, match=r"a\.j2 uses tone, which nothing defines"):
        Scaffold(nano(), name="a", prompt="a.j2")
    Scaffold(nano(), name="a", prompt="a.j2", variables={"tone": "calm"})
    (templates / "b.j2").write_text("{{ task.row }}")
    env = Scaffold(nano(), name="b", prompt="b.j2")
    with pytest.raises(ScaffoldError, match="'row'"):
        env.reset(seed=0)
    (templates / "c.j2").write_text("{% if %}")
    with pytest.raises(ScaffoldError, match=r"c\.j2 is not a Jinja template"):
        Scaffold(nano(), name="c", prompt="c.j2")


def test_it_shows_in_the_spec_and_the_environment_can_be_made_again():
    env = scaffold(make("mini", iterations=3), "open_prompt", extra="Be brief.")
    spec = env.spec
    assert [wrapper.name for wrapper in spec.additional_wrappers] == ["Scaffold"]
    loaded = gym.envs.registration.EnvSpec.from_json(spec.to_json())
    assert loaded == spec
    again = gym.make(loaded)
    assert again.get_wrapper_attr("name") == "open_prompt"
    assert again.spec.kwargs["iterations"] == 3
    assert again.spec.additional_wrappers[0].kwargs["variables"] == {"extra": "Be brief."}
    assert json.loads(spec.to_json())["id"] == "CurationBench-Mini-v0"


def test_check_env(nano):
    env = scaffold(nano(), "open_prompt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*different from the unwrapped version.*")
        check_env(env, skip_render_check=True)
