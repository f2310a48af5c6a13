"""Numeric actions and observations, over the nano task."""

from __future__ import annotations

import ast
from collections import Counter

import gymnasium as gym
import numpy as np
import pytest

from curation_env import envs
from curation_env.actions import POLICY, shell
from curation_env.errors import InvalidAction
from curation_env.wrappers.numeric import MixtureAction, NumericObservation


def vector(**values: float) -> np.ndarray:
    """A mixture: every source at `rest`, some by position (`s3=1`), and `cut`."""
    action = np.full(15, values.get("rest", 0.0), np.float32)
    action[-1] = values.get("cut", 0.0)
    for name, value in values.items():
        if name[0] == "s":
            action[int(name[1:])] = value
    return action


@pytest.fixture
def mixture(nano):
    env = MixtureAction(nano())
    env.reset(seed=0)
    return env


def test_sources_are_in_order_of_size(mixture):
    counts = Counter(mixture.unwrapped.pipeline.view.sources)
    assert sorted(mixture.sources) == sorted(counts)
    assert [counts[name] for name in mixture.sources] == sorted(counts.values(), reverse=True)


def test_an_action_is_a_readable_policy(mixture):
    action = mixture.action(vector(rest=-1, s0=1, s1=0, cut=0.5))
    assert action["tool"] == POLICY
    tree = ast.parse(action["text"])
    weights = next(n.value for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "WEIGHTS")
    shares = ast.literal_eval(weights)
    assert {name: share for name, share in shares.items() if share} == pytest.approx(
        {mixture.sources[0]: 2 / 3, mixture.sources[1]: 1 / 3}, abs=1e-5
    )
    assert "CUT = 0.2500" in action["text"]
    assert "CUT = 0.0000" in mixture.action(vector(cut=-0.5))["text"]
    assert action == mixture.action(vector(rest=-7, s0=9, s1=0, cut=0.5)), "values outside the box are clipped"


def test_mixtures_are_played_and_scored(mixture):
    _, reward, terminated, _, info = mixture.step(vector(rest=-1, s0=1, s1=1))
    assert info["status"] == "scored", info
    assert info["n_rows"] == 96
    assert reward >= 0
    assert not terminated
    mixture.action_space.seed(0)
    _, _, _, _, info = mixture.step(mixture.action_space.sample())
    assert (info["status"], info["error"], info["iteration"]) == ("scored", "", 2)


def test_a_broken_action_is_answered_and_the_episode_goes_on(nano):
    env = NumericObservation(MixtureAction(nano(iterations=1)))
    env.reset(seed=0)
    broken = [np.zeros(14), np.full(15, np.nan), shell("ls"), None]
    for k, action in enumerate(broken, start=1):  # the fourth is charged, as any invalid action
        with pytest.raises(InvalidAction, match="15 finite numbers"):
            env.env.action(action)
        observation, reward, terminated, truncated, info = env.step(action)
        assert (info["error"], info["status"], reward, truncated) == ("invalid_action", "invalid", 0.0, False)
        assert observation in env.observation_space
        assert terminated == (k == len(broken))
    messages = [event["observation"]["message"] for event in env.unwrapped.ledger.events("step")]
    assert "shape (14,)" in messages[0]
    assert "NaN or inf" in messages[1]


def test_the_number_of_sources_must_fit(nano):
    env = MixtureAction(nano(), sources=3)
    env.reset(seed=0)
    with pytest.raises(ValueError, match="pass sources=14"):
        env.action(np.zeros(4))


@pytest.mark.parametrize("arguments", [{"sources": 0}, {"max_cut": 1.0}, {"max_cut": -0.1}])
def test_settings_are_checked(arguments):
    with pytest.raises(ValueError, match="sources must be"):
        MixtureAction(envs.make("nano"), **arguments)


def test_observations_are_numbers_between_0_and_1(nano):
    inner = nano(iterations=2)
    env = NumericObservation(inner)
    seen, _ = env.reset(seed=0)
    assert seen in env.observation_space
    assert list(env.layout) == [key for key in inner.observation_space if key != "message"]
    assert sum(part.stop - part.start for part in env.layout.values()) == len(seen)
    plain = inner.unwrapped._observation("ready", "")
    assert seen[env.layout["base"]] == pytest.approx(plain["base"] / 100)
    assert seen[env.layout["remaining"]] == pytest.approx(plain["remaining"])
    assert seen[env.layout["history_mask"]].tolist() == [1, 0, 0]
    assert seen[env.layout["iteration"]].tolist() == [1, 0, 0]
    after, *_ = env.step(shell("true"))
    assert after in env.observation_space
    assert np.flatnonzero(after[env.layout["status"]]).tolist() == [1]


def test_the_registered_task_is_numeric():
    env = gym.make("CurationBench-MiniMixture-v0")
    assert env.action_space.shape == (15,)
    assert isinstance(env.observation_space, gym.spaces.Box)
    assert [wrapper.name for wrapper in env.spec.additional_wrappers] == ["MixtureAction", "NumericObservation"]
    assert gym.envs.registration.EnvSpec.from_json(env.spec.to_json()).make().action_space == env.action_space
