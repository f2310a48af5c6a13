"""An agent that plays fixed policy files."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from curation_env import actions
from curation_env.agents.base import Agent
from curation_env.agents.policies import policy_source
from curation_env.pool import canonical_json


class BaselineAgent(Agent):
    """Plays policies in turn, one an iteration, from the first again when all had theirs.

    Args:
        policies: Names of shipped policies (random, source_balanced, loss_window), or paths of policy files.

    Raises:
        PolicyFileError: There is no such policy, or it is not UTF-8.
    """

    name = "baseline"
    deterministic = True

    def __init__(self, policies: Sequence[str] = ("random", "source_balanced")) -> None:
        if not policies:
            raise ValueError("name at least one policy")
        self._sources = [policy_source(name) for name in policies]

    def identity(self) -> str:
        return hashlib.sha256(canonical_json(self._sources).encode()).hexdigest()

    def reset(self, task: Mapping[str, Any], seed: int) -> None:
        self._iterations = int(task["iterations"])

    def act(self, observation: Any, info: dict[str, Any]) -> actions.Action:
        if info["iteration"] >= self._iterations:
            return actions.stop()  # the final choice, where there is one: the best on feedback
        return actions.policy(self._sources[info["iteration"] % len(self._sources)])
