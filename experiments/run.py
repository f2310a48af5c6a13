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
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, MissingMandatoryValue, OmegaConf
from rich.console import Console

from curation_env import envs
from curation_env.agents.base import Agent, EpisodeResult, Step, has_ended, run_episode
from curation_env.errors import CurationError
from curation_env.ledger import read_events
from curation_env.pool import canonical_json
from curation_env.progress import Progress
from curation_env.report.table import run_table, save_plot
from curation_env.runs import NoSuchRun, locate, read_run
from curation_env.task import Task, conf_dir
from curation_env.tracking import Tracker
from curation_env.wrappers import limits, scaffold

OVERRIDES = ("iterations", "rows", "tokens", "seeds", "feedback", "detail")
#: Where things lie: no part of what a run is.
PLACES = ("runs", "data_root")


@hydra.main(version_base="1.3", config_path="pkg://curation_env.conf", config_name="config")
def main(config: DictConfig) -> None:
    """Make one run, or find it made already; print its table and where it lies."""
    try:
        make(config)
    except MissingMandatoryValue as error:
        _give_up(f"give a value: {str(error).splitlines()[0]} (of {error.full_key})")
    except InstantiationException as error:
        _give_up(f"{config.agent._target_}: {error.__cause__ or error}")
    except CurationError as error:
        _give_up(f"{error}\n{error.details}".rstrip())
    except KeyboardInterrupt:
        _give_up("interrupted: the same command goes on from here", code=130)


def make(config: DictConfig) -> None:
    """Make the run that a configuration describes, unless it is finished already, and show it."""
    settings: dict[str, Any] = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)  # type: ignore[assignment]
    task = _task(settings)
    agent: Agent = instantiate(config.agent)
    key = f"{task.name}-{agent.name}-{run_hash(settings, task)}"
    folder = Path(settings["runs"]).absolute() / key
    if is_finished(folder):
        print(f"{key} is finished already, so it is not made again")
    else:
        play(settings, agent, folder, instantiate(config.logger))
    show(folder)


def run_hash(settings: dict[str, Any], task: Task) -> str:
    """12 hex digits over everything in the configuration but places, and over what the task's scores depend on."""
    identity = {key: value for key, value in settings.items() if key not in PLACES} | {"task_hash": task.hash}
    return hashlib.sha256(canonical_json(identity).encode()).hexdigest()[:12]


def is_finished(folder: Path) -> bool:
    """Whether the newest episode of a run folder was played to its end."""
    try:
        return has_ended(read_events(locate(folder)))
    except NoSuchRun:
        return False


def play(settings: dict[str, Any], agent: Agent, folder: Path, tracker: Tracker) -> EpisodeResult:
    """Play one episode in a run folder, from where an earlier attempt was cut."""
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
            device=settings["executor"]["device"],
            data_root=settings["data_root"],
            cache=settings["cache"],
            run_dir=str(folder),
        )
        env.unwrapped.on_progress = progress  # type: ignore[attr-defined]  # after `make`: a spec holds plain data
        try:
            env = scaffold(limits(env), **settings["scaffold"])
            tracker.start(folder, folder.name, settings)
            result = run_episode(env, agent, seed=settings["seed"], resume=True, options=options, on_step=on_step)
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
    tools = ("shell", "policy", "stop")
    done = tools[step.action["tool"]] + (" (submitted from the sandbox)" if step.ticket else "")
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
    if settings["world"] is not None and on_disk["pool"]["world"] != "by seed":
        raise CurationError(f"task {name!r} has one world, so world={settings['world']} says nothing: try mini-worlds")
    return Task.load(name, **{key: settings[key] for key in OVERRIDES})


def _give_up(text: str, code: int = 2) -> NoReturn:
    """A mistake of the user's, or a broken machine: what it is, and no trace of where it was noticed."""
    sys.stderr.write(f"run.py: {text}\n")
    raise SystemExit(code) from None


if __name__ == "__main__":
    main()
