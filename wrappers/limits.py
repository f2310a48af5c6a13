"""What an episode may use: each wrapper ends it (`truncated`) when one resource is used up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, cast

import gymnasium as gym
from gymnasium.utils import RecordConstructorArgs

from curation_env.errors import InvalidSetting

if TYPE_CHECKING:
    from curation_env.envs.base import CurationEnv


class ResourceLimit(gym.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    """Lets an episode use so much of a resource; the base of the limits below.

    It tells the environment (`CurationEnv.limit`), which truncates the episode after the step that uses the resource
    up: that step is played to its end and keeps its reward, a scored iteration stays scored, any other step gets the
    status `limit`. The last message says which limit it was, and the observation's `remaining` counts against it. Of
    two limits on one resource (a wrapper's, the task's own budget) the tighter holds.

    Args:
        env: The environment.
        limit: How much of the resource an episode may use, more than 0.

    Raises:
        ValueError: `limit` is not a positive number.
    """

    resource: ClassVar[str]

    def __init__(self, env: gym.Env[Any, Any], limit: float) -> None:
        RecordConstructorArgs.__init__(self, limit=limit)
        gym.Wrapper.__init__(self, env)
        cast("CurationEnv", self.unwrapped).limit(self.resource, limit)
        self.limit = limit


class WallClockLimit(ResourceLimit):
    """Ends the episode once it has run for `limit` seconds of wall clock, training included.

    A step is never cut short: one that begins in time is played to its end.

    Example:
        >>> from curation_env import envs
        >>> WallClockLimit(envs.make("nano"), 3600).limit
        3600
    """

    resource = "wall_seconds"


class ShellCommandLimit(ResourceLimit):
    """Ends the episode after `limit` shell commands.

    Example:
        >>> from curation_env import envs
        >>> ShellCommandLimit(envs.make("nano"), 30).limit
        30
    """

    resource = "shell_commands"


class CurationComputeLimit(ResourceLimit):
    """Ends the episode once curation (shell commands, policies, signals at their recorded price) took `limit` seconds.

    Example:
        >>> from curation_env import envs
        >>> CurationComputeLimit(envs.make("nano"), 600).limit
        600
    """

    resource = "curation_seconds"


class CostLimit(ResourceLimit):
    """Ends the episode once its cost (what the agent's model was billed) reaches `limit` dollars.

    Example:
        >>> from curation_env import envs
        >>> CostLimit(envs.make("nano"), 5.0).limit
        5.0
    """

    resource = "cost"


LIMITS: tuple[type[ResourceLimit], ...] = (WallClockLimit, ShellCommandLimit, CurationComputeLimit, CostLimit)


def limits(env: gym.Env[Any, Any], **amounts: float | None) -> gym.Env[Any, Any]:
    """Put a limit around an environment for each amount that is given; those that are None are left out.

    Args:
        env: The environment. What its task's file limits is limited without a wrapper.
        **amounts: `wall_seconds`, `shell_commands`, `curation_seconds` and `cost`.

    Raises:
        InvalidSetting: An unknown name, or not a number more than 0.

    Example:
        >>> from curation_env import envs
        >>> limits(envs.make("nano"), shell_commands=30, cost=None).limit
        30
    """
    check_amounts(amounts)
    for limit in LIMITS:
        amount = amounts.get(limit.resource)
        if amount is not None:
            env = limit(env, amount)
    return env


def check_amounts(amounts: Mapping[str, Any]) -> None:
    """Check the arguments of `limits`.

    Raises:
        InvalidSetting: An unknown name, or neither None nor a number more than 0.
    """
    known = [limit.resource for limit in LIMITS]
    for resource, amount in amounts.items():
        if resource not in known:
            raise InvalidSetting(f"no limit {resource!r}: there are {', '.join(known)}")
        if amount is not None and (isinstance(amount, bool) or not isinstance(amount, int | float) or not amount > 0):
            raise InvalidSetting(f"the limit {resource} must be a number more than 0, not {amount!r}")
