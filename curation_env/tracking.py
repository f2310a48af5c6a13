"""Telling a tracking service of a run: nothing by default, Weights & Biases behind `logger=wandb`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal


class Tracker:
    """Tells nobody; the interface of the others."""

    def start(self, folder: Path, key: str, config: Mapping[str, Any]) -> None:
        """A run begins or goes on.

        Args:
            folder: The run folder; files go there.
            key: The run's name: the same when it is resumed.
            config: The resolved configuration.
        """

    def step(self, number: int, info: Mapping[str, Any]) -> None:
        """A step was made; `info` is the environment's, so nothing sealed is in it."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        """The run is over."""

    def close(self) -> None:
        """Flush; also after an error."""


class WandbTracker(Tracker):
    """One Weights & Biases run a run folder: scores by iteration, and the configuration.

    Args:
        project: Project name.
        mode: "offline" writes files under the run folder and sends nothing; "online" sends.
    """

    def __init__(self, project: str, mode: Literal["offline", "online"] = "offline") -> None:
        if mode not in ("offline", "online"):
            raise ValueError(f"mode must be 'offline' or 'online', not {mode!r}")
        self._project = project
        self._mode: Literal["offline", "online"] = mode
        self._run: Any = None

    def start(self, folder: Path, key: str, config: Mapping[str, Any]) -> None:
        import wandb

        quiet = wandb.Settings(console="off", silent=True, disable_git=True, disable_code=True, x_disable_stats=True)
        self._run = wandb.init(
            project=self._project,
            mode=self._mode,
            dir=folder,
            id=key,
            name=key,
            resume="allow",
            config=dict(config),
            settings=quiet,
        )
        self._run.define_metric("*", step_metric="iteration")

    def step(self, number: int, info: Mapping[str, Any]) -> None:
        if info["status"] == "scored":
            figures = {key: value for key, value in info.items() if isinstance(value, int | float)}
            self._run.log({key: value for key, value in figures.items() if math.isfinite(value)} | {"step": number})

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._run.summary.update(dict(summary))

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None
