"""An agent that submits random rows, and now and then looks around first."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from curation_env import actions
from curation_env.agents.base import Agent
from curation_env.agents.policies import policy_source

LOOKS = ("curation task", "curation history", "ls pool")


class RandomAgent(Agent):
    """Submits the random policy again and again; the harness's seed makes every draw another.

    Args:
        look: Probability that an action is a shell command instead.
    """

    name = "random"
    deterministic = True

    def __init__(self, look: float = 0.25) -> None:
        if not 0 <= look < 1:
            raise ValueError(f"look is a probability below 1, not {look}")
        self._look = look

    def identity(self) -> str:
        return hashlib.sha256(policy_source("random").encode()).hexdigest()

    def reset(self, task: Mapping[str, Any], seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._iterations = int(task["iterations"])

    def act(self, observation: Any, info: dict[str, Any]) -> actions.Action:
        if info["iteration"] >= self._iterations:
            return actions.stop()  # the final choice, where there is one: the best on feedback
        if self._rng.random() < self._look:
            return actions.shell(str(self._rng.choice(LOOKS)))
        return actions.policy(policy_source("random"))
