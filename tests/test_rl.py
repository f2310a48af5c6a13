"""Reinforcement learning over numbers: Stable-Baselines3 accepts the environment, and PPO trains on real iterations."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.monitor import Monitor

from curation_env import envs
from curation_env.wrappers.numeric import MixtureAction, NumericObservation

ROWS, ITERATIONS, UPDATES = 16, 2, 3


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Iterator[gym.Env]:
    """One environment for both tests: its worker starts once."""
    folder: Path = tmp_path_factory.mktemp("rl")
    inner = envs.make("nano", rows=ROWS, iterations=ITERATIONS, sandbox="bubblewrap", run_dir=folder)
    env = NumericObservation(MixtureAction(inner))
    yield env
    env.close()


def test_stable_baselines_accepts_it(mixture: gym.Env) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(mixture, skip_render_check=True)


def test_ppo_trains(mixture: gym.Env) -> None:
    torch.set_num_threads(1)
    agent = PPO("MlpPolicy", Monitor(mixture), n_steps=2, batch_size=2, n_epochs=2, seed=0, device="cpu")
    before = [parameter.detach().clone() for parameter in agent.policy.parameters()]
    agent.learn(UPDATES * 2)
    after = list(agent.policy.parameters())
    assert agent.num_timesteps == UPDATES * 2
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(torch.isfinite(parameter).all() for parameter in after)
    assert [episode["l"] for episode in agent.ep_info_buffer] == [ITERATIONS] * UPDATES
    assert all(episode["r"] >= 0 for episode in agent.ep_info_buffer)
    observation, _ = mixture.reset(seed=1)
    action, _ = agent.predict(observation, deterministic=True)
    assert action.dtype == np.float32
    assert action in mixture.action_space
