"""Environment families; `make` builds one by its task's name, for tools that name tasks."""

from __future__ import annotations

from typing import Any

import gymnasium as gym


def make(task: str, **overrides: Any) -> gym.Env[Any, Any]:
    """Make the environment of a task by the task's name, as the command line and Hydra do.

    Args:
        task: Name of a task file, for example "mini" or "nano", or the path of one of your own.
        **overrides: What `gym.make` takes for it.

    Raises:
        UnknownTask: No such task file.
    """
    from curation_env.registry import ENTRIES
    from curation_env.task import Task

    loaded = Task.load(task)
    for entry in ENTRIES:
        if entry.task == task:
            return gym.make(entry.id, **overrides)
    # A test-only task, or one of the user's own, has no id.
    if loaded.family == "llava":
        from curation_env.envs.llava import LlavaEnv

        return LlavaEnv(task, **overrides)
    from curation_env.envs.mini import MiniEnv

    return MiniEnv(task, **overrides)
