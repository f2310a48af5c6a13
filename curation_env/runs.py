"""Reading run folders: which episode is meant, and what its journal says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curation_env.episode import State
from curation_env.errors import CurationError
from curation_env.ledger import read_events
from curation_env.task import Task


class NoSuchRun(CurationError):
    code = "no_such_run"


@dataclass(frozen=True)
class Run:
    """What a run folder records: the task as it was, the last state, and the journal."""

    folder: Path
    task: Task
    state: State
    events: list[dict[str, Any]]

    @property
    def sandboxes(self) -> list[str]:
        """The engines that the agent's commands ran in, in order; "none" means without any isolation."""
        started = [event for event in self.events if event["kind"] in ("episode_started", "episode_resumed")]
        return list(dict.fromkeys(event["sandbox"] for event in started if "sandbox" in event))

    @property
    def nominee(self) -> int:
        return self.state.best if self.state.nominee is None else self.state.nominee


def locate(path: str | Path) -> Path:
    """The episode's folder: `path` itself, or the newest episode in it.

    Raises:
        NoSuchRun: There is no journal there.
    """
    path = Path(path)
    if (path / "journal.jsonl").is_file():
        return path
    episodes = sorted(folder for folder in path.glob("episode-*") if (folder / "journal.jsonl").is_file())
    if not episodes:
        raise NoSuchRun(f"no run at {path}: name a folder that holds journal.jsonl or episode-0000/")
    return episodes[-1]


def read_run(path: str | Path) -> Run:
    """Read an episode without locking it.

    Raises:
        NoSuchRun: There is no journal there, or nothing was scored yet.
    """
    folder = locate(path)
    events = read_events(folder)
    started = next((event for event in events if event["kind"] == "episode_started"), None)
    states = [event["state"] for event in events if event["kind"] in ("step", "reset")]
    if started is None or not states:
        raise NoSuchRun(f"the run at {folder} has scored nothing yet")
    return Run(folder, Task.model_validate(started["task"]), State.from_json(states[-1]), events)


def recorded_task(folder: Path) -> Task | None:
    """The task that an episode was started with, None when it was cut before that was recorded."""
    started = [event for event in read_events(folder) if event["kind"] == "episode_started"]
    return Task.model_validate(started[-1]["task"]) if started else None
