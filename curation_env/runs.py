"""Reading run folders: which episode is meant, and what its journal says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curation_env.errors import CurationError, RunDiffers
from curation_env.ledger import read_events
from curation_env.state import State
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
    started = _started(folder)
    return None if started is None else Task.model_validate(started["task"])


def check_resumable(folder: Path, task: Task, final_choice: bool) -> None:
    """See that an episode can go on: scores of two tasks, or under two rules, must never stand in one record.

    Raises:
        RunDiffers: It was started with another task or other settings; the message says which.
    """
    started = _started(folder)
    if started is None:
        return
    was, now = {**started["task"], "overrides": None}, {**task.model_dump(mode="json"), "overrides": None}
    if started["task_hash"] != task.hash:
        differ = _differences(was, now) or ["another version of the task's recipe, suite, audit rules or student"]
    else:
        told = ("iterations", "detail")
        differ = _differences({key: was[key] for key in told}, {key: now[key] for key in told})
    if started.get("final_choice", final_choice) != final_choice:
        differ.append(f"final_choice={started['final_choice']} (now {final_choice})")
    if differ:
        raise RunDiffers(
            f"the run at {folder} can't be resumed, it was started with {'; '.join(differ)}:"
            " make the environment as it was, or begin another run in another run_dir"
        )


def _started(folder: Path) -> dict[str, Any] | None:
    return next((event for event in reversed(read_events(folder)) if event["kind"] == "episode_started"), None)


def _differences(was: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key, after in now.items():
        before = was.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += _differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append(f"{prefix}{key}={before!r} (now {after!r})")
    return found
