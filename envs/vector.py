"""`gym.make_vec` of the text environments: `mode=` picks sync or async, and each copy has a run folder of its own."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv


def make_vector(
    num_envs: int = 1,
    *,
    task: str,
    mode: Literal["sync", "async"] = "sync",
    autoreset_mode: str | AutoresetMode = AutoresetMode.NEXT_STEP,
    run_dir: str | Path | None = None,
    **kwargs: Any,
) -> VectorEnv[Any, Any, Any]:
    """Make `num_envs` copies of a task's environment, stepped together.

    `gym.make_vec(id, vectorization_mode="sync")` and `"async"` give the same observations. They hand one `run_dir` to
    all copies, whose episodes then lie in it in the order of their beginning.

    Args:
        num_envs: Copies; each has its own sandbox, worker and run folder.
        task: The task's name, set by the registered spec.
        mode: "sync" steps one after another; "async" runs each in a process of its own.
        autoreset_mode: Gymnasium's: by default, the step after an episode's end resets that copy, and its action is
            not played. "Disabled" leaves it to `reset(options={"reset_mask": mask})`.
        run_dir: Copy k gets its folder `env-k`.
        **kwargs: Overrides of `gym.make`; `max_episode_steps` as well.

    Raises:
        InvalidSetting: An unknown mode.

    Example:
        >>> envs = gym.make_vec("CurationBench-Mini-v0", num_envs=2, mode="async")  # doctest: +SKIP
    """
    from curation_env.choices import check_choice
    from curation_env.registry import ENTRIES

    check_choice("mode", mode, ("sync", "async"))
    id_ = next(entry.id for entry in ENTRIES if entry.task == task)
    folders = [None if run_dir is None else str(Path(run_dir) / f"env-{k}") for k in range(num_envs)]
    makers = [functools.partial(gym.make, id_, run_dir=folder, **kwargs) for folder in folders]
    vector = AsyncVectorEnv if mode == "async" else SyncVectorEnv
    return vector(makers, autoreset_mode=autoreset_mode)
