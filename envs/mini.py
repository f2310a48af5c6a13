"""The miniature: the same environment on a small generated world, seconds an iteration on two CPU cores."""

from __future__ import annotations

import operator
from typing import Any, ClassVar

from curation_env.envs.base import CurationEnv
from curation_env.errors import InvalidSetting
from curation_env.task import Task


class MiniEnv(CurationEnv):
    """Curate 1,000 of about 10,000 rows of one frozen world for a 0.7M-parameter LLaVA.

    ## Description
    Small rendered images and short conversations from 14 sources with meaningless names, faults and planted leaks in
    them; eight benchmarks that mirror the real eight by scoring rule. It tests agents and code: no claim about
    LLaVA-1.5-7B rests on it.

    Actions, observations, reward, episode end and info are `CurationEnv`'s.

    ## Ids
    `CurationBench-Mini-v0` (world 0).

    Example:
        >>> import gymnasium as gym
        >>> import curation_env
        >>> env = gym.make("CurationBench-Mini-v0", iterations=3)
        >>> env.unwrapped.task.iterations
        3
    """

    def __init__(self, task: str = "mini", **kwargs: Any) -> None:
        super().__init__(task, **kwargs)


class MiniWorldsEnv(CurationEnv):
    """The miniature with a world drawn at every `reset(seed=)`.

    ## Description
    Worlds differ in which sources carry which skills and under which names, in shares, in kinds and rates of faults,
    and in which skills are scarce. Training draws from the seeds 1 to 999,999; the held-out test worlds begin at
    1,000,000 and are reached by `reset(options={"world": 1_000_000})` alone. Without a seed, the generator that the
    last one started goes on.

    ## Ids
    `CurationBench-MiniWorlds-v0`; `CurationBench-MiniMixture-v0` adds numeric actions and observations
    (`curation_env.wrappers.numeric`).
    """

    def __init__(self, task: str = "mini-worlds", **kwargs: Any) -> None:
        super().__init__(task, **kwargs)

    reset_options: ClassVar[tuple[str, ...]] = ("resume", "world")

    def _draw_task(self, options: dict[str, Any]) -> Task:
        """The task in the world of the options, else in a train world.

        Raises:
            InvalidSetting: The option is no number of a world.
        """
        from curation_env.mini.world import TRAIN_WORLDS

        world = options.get("world")
        if world is None:
            world = self.np_random.integers(TRAIN_WORLDS.start, TRAIN_WORLDS.stop)
        try:
            return self.task.in_world(operator.index(world))
        except TypeError as error:
            raise InvalidSetting(f"world must be a whole number from 0, not {world!r}") from error
