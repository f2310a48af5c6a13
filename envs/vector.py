"""`gym.make_vec` for the text environments: the default vector environments garble texts."""

from __future__ import annotations

import functools
from typing import Any, Literal

import gymnasium as gym
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv


def make_vector(
    num_envs: int = 1, *, task: str, mode: Literal["sync", "async"] = "sync", **kwargs: Any
) -> VectorEnv[Any, Any, Any]:
    """Make `num_envs` copies of a task's environment, stepped together.

    Two defaults of Gymnasium's are wrong for these environments: shared memory returns "000..." for every `Text`
    observation, and the next-step autoreset throws away the action after an episode's end, which here may cost an hour
    of training. So memory is not shared, and a sub-environment whose episode is over is reset by
    `reset(options={"reset_mask": mask})`.

    Args:
        num_envs: Copies; each has its own sandbox, worker and run folder.
        task: The task's name, set by the registered spec.
        mode: "sync" steps one after another; "async" runs each in a process of its own.
        **kwargs: Overrides of `gym.make`; `max_episode_steps` as well.

    Example:
        >>> envs = gym.make_vec("CurationBench-Mini-v0", num_envs=2, mode="async")  # doctest: +SKIP
    """
    from curation_env.registry import ENTRIES

    id_ = next(entry.id for entry in ENTRIES if entry.task == task)
    makers = [functools.partial(gym.make, id_, **kwargs) for _ in range(num_envs)]
    if mode == "async":
        return AsyncVectorEnv(makers, shared_memory=False, autoreset_mode=AutoresetMode.DISABLED)
    if mode == "sync":
        return SyncVectorEnv(makers, autoreset_mode=AutoresetMode.DISABLED)
    raise ValueError(f"mode must be 'sync' or 'async', not {mode!r}")
