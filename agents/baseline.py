"""An agent that plays fixed policy files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from curation_env import actions
from curation_env.agents.base import Agent
from curation_env.agents.policies import policy_source


class BaselineAgent(Agent):
    """Plays policies in turn, one an iteration, from the first again when all had theirs.

    Args:
        policies: Names of shipped policies (random, source_balanced, loss_window), or paths of policy files.

    Raises:
        FileNotFoundError: There is no such policy.
    """

    name = "baseline"
    deterministic = True
    produces: ClassVar[frozenset[str]] = frozenset({"front_matter"})

    def __init__(self, policies: Sequence[str] = ("random", "source_balanced")) -> None:
        if not policies:
            raise ValueError("name at least one policy")
        self._sources = [policy_source(name) for name in policies]

    def reset(self, task: Mapping[str, Any], seed: int) -> None:
        self._iterations = int(task["iterations"])

    def act(self, observation: Any, info: dict[str, Any]) -> actions.Action:
        if info["iteration"] >= self._iterations:
            return actions.stop()  # the final choice, where there is one: the best on feedback
        return actions.policy(self._sources[info["iteration"] % len(self._sources)])
