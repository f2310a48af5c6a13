"""One run, or a sweep: `python experiments/run.py task=mini agent=search scaffold=open_prompt iterations=5`.

A run's folder is named by the hash of its resolved configuration, so a run that is finished is not made again, and one
that was interrupted goes on. `-m agent=random,search iterations=3,5` makes several. See `docs/agents.md`.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException, InstantiationException
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, MissingMandatoryValue, OmegaConf
from rich.console import Console

from curation_env import envs
from curation_env.actions import TOOLS
from curation_env.agents.base import Agent, EpisodeResult, Step, has_ended, run_episode
from curation_env.choices import DEVICES, SANDBOXES, check_choice, check_gib
from curation_env.errors import CurationError, InvalidSetting
from curation_env.group import Group
from curation_env.ledger import read_events
from curation_env.pool import canonical_json
from curation_env.progress import Progress
from curation_env.registry import ENTRIES
from curation_env.report.table import run_table, save_plot
from curation_env.runs import NoSuchRun, locate, read_run
from curation_env.task import Task, conf_dir
from curation_env.tracking import Tracker
from curation_env.wrappers import scaffold
from curation_env.wrappers.limits import check_amounts, limits

OVERRIDES = ("iterations", "rows", "tokens", "seeds", "feedback", "detail")
#: Where things lie, and whether to begin anew: no part of what a run is.
PLACES = ("runs", "data_root", "fresh")


@hydra.main(version_base="1.3", config_path="pkg://curation_env.conf", config_name="config")
def main(config: DictConfig) -> None:
    """Make one run, or find it made already; print its table and where it lies."""
    try:
        make(config)
    except MissingMandatoryValue as error:
        _fail(f"give a value: {str(error).splitlines()[0]} (of {error.full_key})")
    except CurationError as error:
        _fail(f"{error}\n{error.details}".rstrip())
    except OSError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        _give_up("interrupted: the same command goes on from here", code=130)


class JobFailed(CompactHydraException):
    """A job of a sweep failed and said why. Hydra makes the others, then ends with exit code 1."""


def make(config: DictConfig) -> None:
    """Make the run that a configuration describes, unless it is finished already, and show it."""
    settings: dict[str, Any] = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)  # type: ignore[assignment]
    task = _task(settings)
    agent: Agent = _instantiate("agent", config.agent)
    _check_fit(agent, task)
    tracker: Tracker = _instantiate("logger", config.logger)
    key = f"{task.name}-{agent.name}-{run_hash(settings, task, agent)}"
    folder = Path(settings["runs"]).absolute() / key
    if is_finished(folder) and not settings["fresh"]:
        print(f"{key} is finished already, so it is not made again")
    else:
        play(settings, agent, folder, tracker)
    show(folder)


def run_hash(settings: dict[str, Any], task: Task, agent: Agent) -> str:
    """12 hex digits over the configuration but `PLACES`, the task's hash, and the files that the agent loaded."""
    identity = {key: value for key, value in settings.items() if key not in PLACES}
    identity |= {"task_hash": task.hash, "agent_identity": agent.identity()}
    return hashlib.sha256(canonical_json(identity).encode()).hexdigest()[:12]


def is_finished(folder: Path) -> bool:
    """Whether the newest episode of a run folder was played to its end."""
    try:
        return has_ended(read_events(locate(folder)))
    except NoSuchRun:
        return False


def play(settings: dict[str, Any], agent: Agent, folder: Path, tracker: Tracker) -> EpisodeResult:
    """Play one episode in a run folder, from where an earlier attempt was cut unless a fresh one is asked for."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    options = {} if settings["world"] is None else {"world": settings["world"]}

    def on_step(step: Step) -> None:
        tracker.step(step.number, step.info)
        print(step_line(step), flush=True)

    with Progress() as progress:
        env = envs.make(
            settings["task"]["name"],
            **{key: settings[key] for key in OVERRIDES},
            final_choice=settings["final_choice"],
            sandbox=settings["sandbox"]["kind"],
            **settings["executor"],
            data_root=settings["data_root"],
            cache=settings["cache"],
            run_dir=str(folder),
        )
        env.unwrapped.on_progress = progress  # type: ignore[attr-defined]  # after `make`: a spec holds plain data
        try:
            env = scaffold(limits(env, **settings["limits"]), **settings["scaffold"])
            tracker.start(folder, folder.name, settings)
            resume = not settings["fresh"]
            result = run_episode(env, agent, seed=settings["seed"], resume=resume, options=options, on_step=on_step)
            tracker.finish({key: value for key, value in asdict(result).items() if key != "folder"})
        finally:
            tracker.close()
            env.close()
    if summary := agent.summary():
        print(summary)
    return result


def show(folder: Path) -> None:
    """Print a run's table, draw its plot, and say where it lies."""
    run = read_run(folder)
    # Piped, a table keeps its width, so that no column is squeezed away.
    (Console() if sys.stdout.isatty() else Console(width=200)).print(run_table(run))
    print(f"plot: {save_plot(run, folder / 'scores.png')}")
    print(f"run folder: {folder}")


def step_line(step: Step) -> str:
    """One line on a step: what was done, and what came of it."""
    tool = TOOLS[step.action["tool"]] if isinstance(step.action, dict) else "mixture"
    done = tool + (" (submitted from the sandbox)" if step.ticket else "")
    info = step.info
    if info["status"] == "scored":
        outcome = f"iteration {info['iteration']}: feedback average {info['score']:.2f} +- {info['stderr']:.2f}"
        return f"{done}: {outcome}" + (f", {step.reward:.2f} better than before" if step.reward else "")
    return f"{done}: {info['status']}" + (f" ({info['error']})" if info["error"] else "")


def _task(settings: dict[str, Any]) -> Task:
    """The task that the configuration names, its file unchanged: it is what the records refer to."""
    name = settings["task"]["name"]
    on_disk = yaml.safe_load((conf_dir() / "task" / f"{name}.yaml").read_text())
    for key in on_disk.keys() | settings["task"].keys():
        if settings["task"].get(key) != on_disk.get(key):
            say = f"{key}={settings['task'].get(key)}" if key in OVERRIDES else "a task file of your own"
            raise CurationError(f"task.{key} can't be changed here: use {say}")
    task = Task.load(name, **{key: settings[key] for key in OVERRIDES})
    _whole_number("seed", settings["seed"])
    if settings["world"] is not None:
        task.drawn(_whole_number("world", settings["world"]))
    for key in ("final_choice", "cache", "fresh"):
        if not isinstance(settings[key], bool):
            raise InvalidSetting(f"{key} must be true or false, not {settings[key]!r}")
    check_choice("sandbox.kind", settings["sandbox"]["kind"], SANDBOXES)
    check_choice("executor.device", settings["executor"]["device"], DEVICES)
    check_gib("executor.gpu_memory_gib", settings["executor"]["gpu_memory_gib"])
    Group.checked(*(settings["executor"][key] for key in ("processes", "hostfile", "zero_stage")))
    check_amounts(settings["limits"])
    return task


def _whole_number(key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise InvalidSetting(f"{key} must be a whole number from 0, not {value!r}")
    return value


def _instantiate(group: str, config: DictConfig) -> Any:
    """What a group's file names, with its own word on what is wrong with its settings."""
    try:
        return instantiate(config)
    except InstantiationException as error:
        raise InvalidSetting(f"{group}: {error.__cause__ or error}") from error


def _check_fit(agent: Agent, task: Task) -> None:
    """Agents give texts or numbers, and tasks take the ones or the others."""
    numeric = {entry.task for entry in ENTRIES if entry.numeric}
    if agent.numeric and task.name not in numeric:
        raise InvalidSetting(f"agent {agent.name!r} gives numbers: play one of {', '.join(sorted(numeric))}")
    if task.name in numeric and not agent.numeric:
        raise InvalidSetting(
            f"task {task.name!r} takes numbers, agent {agent.name!r} gives texts: try task=mini-worlds, the same worlds"
        )


def _fail(text: str) -> NoReturn:
    """What went wrong: the end of a run, or of one job of a sweep."""
    if HydraConfig.get().mode is not RunMode.MULTIRUN:
        _give_up(text)
    sys.stderr.write(f"run.py: {' '.join(HydraConfig.get().overrides.task)}: {text}\n")
    raise JobFailed("run.py: it failed as said above; what else there was to make is made") from None


def _give_up(text: str, code: int = 2) -> NoReturn:
    """A mistake of the user's, or a broken machine: what it is, and no trace of where it was noticed."""
    sys.stderr.write(f"run.py: {text}\n")
    raise SystemExit(code) from None


if __name__ == "__main__":
    main()
