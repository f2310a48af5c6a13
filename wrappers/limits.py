"""What an episode may use: each wrapper ends it (`truncated`) when one resource is used up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, cast

import gymnasium as gym
import numpy as np
from gymnasium.utils import RecordConstructorArgs

from curation_env import text
from curation_env.envs.base import REMAINING
from curation_env.errors import LimitExceeded
from curation_env.statuses import STATUSES

if TYPE_CHECKING:
    from curation_env.envs.base import CurationEnv


class ResourceLimit(gym.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    """Truncates the episode after the step that uses up a resource; the base of the limits below.

    The step itself is played to its end and keeps its reward; a scored iteration stays scored. Any other step gets the
    status `limit`. The last message says which limit it was, and the observation's `remaining` counts against it
    (inside of `NumericObservation`; around it the episode is truncated all the same).

    Args:
        env: The environment.
        limit: How much of the resource an episode may use, more than 0.

    Raises:
        ValueError: `limit` is not a positive number.
    """

    resource: ClassVar[str]
    unit: ClassVar[str]

    def __init__(self, env: gym.Env[Any, Any], limit: float) -> None:
        if not limit > 0:
            raise ValueError(f"a limit on {self.unit} must be more than 0, not {limit}")
        RecordConstructorArgs.__init__(self, limit=limit)
        gym.Wrapper.__init__(self, env)
        self.limit = limit

    @property
    def used(self) -> float:
        """How much of the resource the episode has used."""
        return cast("CurationEnv", self.unwrapped).usage[self.resource]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        observation, info = self.env.reset(seed=seed, options=options)
        return self._with_remaining(observation), info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        observation = self._with_remaining(observation)
        if self.used >= self.limit and not terminated:
            truncated = True
            cast("CurationEnv", self.unwrapped).ledger.event("limit", resource=self.resource, limit=self.limit)
            if info["status"] != "scored":
                info = {**info, "status": "limit", "error": LimitExceeded.code}
            if isinstance(observation, dict):
                why = f"The episode ends: its limit of {self.limit:g} {self.unit} is used up."
                observation["message"] = text.message(f"{observation['message']}\n{why}")
                observation["status"] = np.int64(STATUSES.index(info["status"]))
        return observation, reward, terminated, truncated, info

    def _with_remaining(self, observation: Any) -> Any:
        """The observation with what is left of this limit; numeric observations are left as they are."""
        if not isinstance(observation, dict):
            return observation
        k = REMAINING.index(self.resource)
        remaining = observation["remaining"].copy()
        remaining[k] = min(remaining[k], max(0.0, 1.0 - self.used / self.limit))
        return {**observation, "remaining": remaining}


class WallClockLimit(ResourceLimit):
    """Ends the episode once it has run for `limit` seconds of wall clock, training included.

    A step is never cut short: one that begins in time is played to its end.

    Example:
        >>> from curation_env import envs
        >>> WallClockLimit(envs.make("nano"), 3600).limit
        3600
    """

    resource = "wall_seconds"
    unit = "seconds of wall clock"


class ShellCommandLimit(ResourceLimit):
    """Ends the episode after `limit` shell commands.

    Example:
        >>> from curation_env import envs
        >>> ShellCommandLimit(envs.make("nano"), 30).limit
        30
    """

    resource = "shell_commands"
    unit = "shell commands"


class CurationComputeLimit(ResourceLimit):
    """Ends the episode once curation (shell commands, policies, signals at their recorded price) took `limit` seconds.

    Example:
        >>> from curation_env import envs
        >>> CurationComputeLimit(envs.make("nano"), 600).limit
        600
    """

    resource = "curation_seconds"
    unit = "seconds of curation compute"


class CostLimit(ResourceLimit):
    """Ends the episode once its cost (what the agent's model was billed) reaches `limit` dollars.

    Example:
        >>> from curation_env import envs
        >>> CostLimit(envs.make("nano"), 5.0).limit
        5.0
    """

    resource = "cost"
    unit = "dollars"


LIMITS: tuple[type[ResourceLimit], ...] = (WallClockLimit, ShellCommandLimit, CurationComputeLimit, CostLimit)


def limits(env: gym.Env[Any, Any]) -> gym.Env[Any, Any]:
    """Put every limit around an environment for which its task file has a budget.

    Example:
        >>> from curation_env import envs
        >>> env = envs.make("nano")
        >>> limits(env) is env  # the task file sets no budget
        True
    """
    budgets = cast("CurationEnv", env.unwrapped).task.budgets
    for limit in LIMITS:
        amount = getattr(budgets, limit.resource)
        if amount is not None:
            env = limit(env, amount)
    return env
