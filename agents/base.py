"""The `Agent` protocol, and `run_episode`: query, execute, observe, and what a killed run needs to go on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, cast, runtime_checkable

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from curation_env.actions import policy
from curation_env.envs.base import CurationEnv
from curation_env.errors import CurationError
from curation_env.host import HostBackend
from curation_env.journal import plain

#: Journal events of this loop, beside the environment's own.
STARTED, ENDED = "agent_started", "agent_ended"


class AgentDiverged(CurationError):
    """A resumed agent did not repeat its recorded actions, or the record is another agent's."""

    code = "agent_diverged"


class Step(NamedTuple):
    """One step of an episode, as the outermost environment answered it.

    Attributes:
        number: 1 for the first step of the episode.
        ticket: The ticket that was played, "" when the agent itself acted.
    """

    number: int
    action: Any
    observation: Any
    reward: float
    terminated: bool
    truncated: bool
    info: dict[str, Any]
    ticket: str = ""


@runtime_checkable
class Agent(Protocol):
    """Anything that turns observations into actions. Subclass it for the defaults.

    A deterministic agent's actions follow from `reset` and from what it was told since, so that it needs no saving:
    it is told the recorded steps again. Others also implement `save` and `load` (`Saves`).

    Attributes:
        name: What tables call it.
        deterministic: Whether equal seeds and observations give equal actions.
        numeric: Whether its actions are numbers (see `MixtureAction`), not those of `curation_env.actions`.
    """

    name: str
    deterministic: bool = True
    numeric: ClassVar[bool] = False

    def reset(self, task: Mapping[str, Any], seed: int) -> None:
        """Begin an episode.

        Args:
            task: What `curation.task()` says in the sandbox: rows, tokens, sources, benchmarks, iterations, ...
            seed: Of all that the agent does at random.
        """

    def act(self, observation: Any, info: dict[str, Any]) -> Any:
        """The next action, given what the last step (or `reset`) returned."""

    def observe(self, step: Step) -> None:
        """Learn of a step: the agent's own, or a ticket's, which it was not asked for."""

    def identity(self) -> str:
        """A digest of what it does that its settings don't say: files that it loaded. It names the run, too."""
        return ""

    def summary(self) -> str:
        """What is worth saying at the end; "" is nothing."""
        return ""


@runtime_checkable
class Saves(Agent, Protocol):
    """An agent that goes on from what it saved after the last step."""

    def save(self, path: Path) -> None:
        """Write everything that `load` needs into the empty folder `path`."""

    def load(self, path: Path) -> None:
        """Become what `save` wrote, after `reset`; steps that came later are told by `observe`."""


@dataclass(frozen=True)
class EpisodeResult:
    """How an episode ended.

    Attributes:
        folder: The run folder.
        reason: "terminated" or "truncated".
        reward: Sum of the rewards: points of feedback average above base.
        steps: Actions, tickets among them. iterations: charged ones.
        best, nominee: Numbers of iterations.
        score: Feedback average of the nominee, percent.
    """

    folder: Path
    reason: str
    reward: float
    steps: int
    iterations: int
    best: int
    nominee: int
    score: float


def run_episode(
    env: gym.Env[Any, Any],
    agent: Agent,
    *,
    seed: int,
    resume: bool = False,
    options: Mapping[str, Any] | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> EpisodeResult:
    """Let an agent play one episode to its end.

    A policy that something in the sandbox submitted (`curation submit`) is played before the agent is asked again, as a
    step of `env` itself, so that no wrapper is bypassed; one at a time.

    Args:
        env: The outermost wrapped environment. Its wrappers decide when an episode is truncated.
        agent: Who plays.
        seed: Of the environment and of the agent.
        resume: Go on with the newest episode of the environment's run folder, if there is one. The trajectory is the
            one that an uninterrupted run would have had, for a deterministic agent or one that saves, as long as the
            wrappers leave actions and observations as they are.
        options: Further options of `env.reset`.
        on_step: Told of every new step.

    Raises:
        AgentDiverged: The resumed agent is not the one that was recorded.
        InfrastructureError: The machine failed; resume when it is repaired.
    """
    core = cast(CurationEnv, env.unwrapped)
    observation, info = env.reset(seed=seed, options={**(options or {}), **({"resume": True} if resume else {})})
    agent.reset(HostBackend(core.episode).task(), seed)
    record = _Record(core)
    if record.steps:
        observation, info = _catch_up(env, agent, record, seed)
    else:
        core.ledger.event(STARTED, agent=agent.name, seed=seed, observation=plain(observation), info=plain(info))
    number, reward = len(record.steps), sum(step.reward for step in record.steps)
    over = record.ended or ("terminated" if core.episode.state.finished else "")
    while not over:
        waiting = core.session.waiting()
        ticket = waiting[0].name if waiting else ""
        action = policy() if ticket else agent.act(observation, info)
        observation, gained, terminated, truncated, info = env.step(action)
        number, reward = number + 1, reward + float(gained)
        step = Step(number, action, observation, float(gained), terminated, truncated, info, ticket)
        agent.observe(step)
        _save(agent, core.episode.run_dir, number)
        if on_step is not None:
            on_step(step)
        over = "terminated" if terminated else "truncated" if truncated else ""
    if not record.ended:
        core.ledger.event(ENDED, reason=over, steps=number, reward=reward)
    return _result(core, over, number, reward)


def has_ended(events: list[dict[str, Any]]) -> bool:
    """Whether the episode of a journal was played to its end by `run_episode`."""
    return any(event["kind"] == ENDED for event in events)


def _result(core: CurationEnv, reason: str, steps: int, reward: float) -> EpisodeResult:
    episode = core.episode
    score = episode.state.history[episode.nominee].average
    assert score is not None
    state = episode.state
    return EpisodeResult(
        episode.run_dir, reason, reward, steps, state.iteration, state.best, episode.nominee, float(score)
    )


# ---------------------------------------------------------------------- resuming


class _Record:
    """What the journal says of an episode: how it started, its steps, and whether it ended."""

    def __init__(self, core: CurationEnv) -> None:
        self._space = core.observation_space
        events = core.ledger.events()
        self.started = next((event for event in events if event["kind"] == STARTED), None)
        self.ended = next((event["reason"] for event in events if event["kind"] == ENDED), "")
        self.steps = list(self._steps(events))

    def first(self) -> tuple[Any, dict[str, Any]]:
        """What `reset` returned."""
        if self.started is None:
            raise AgentDiverged("this run was not played by run_episode, so no agent can go on with it")
        return from_plain(self._space, self.started["observation"]), _info(self.started["info"])

    def _steps(self, events: list[dict[str, Any]]) -> Iterator[Step]:
        recorded = [event for event in events if event["kind"] == "step"]
        for number, event in enumerate(recorded, start=1):
            yield Step(
                number,
                event["action"],
                from_plain(self._space, event["observation"]),
                event["reward"],
                event["terminated"],
                False,
                _info(event["info"]),
                event["ticket"]["name"] if event["ticket"] else "",
            )


def _catch_up(env: gym.Env[Any, Any], agent: Agent, record: _Record, seed: int) -> tuple[Any, dict[str, Any]]:
    """Bring the agent to where the record ends; returns the last observation and info."""
    observation, info = record.first()
    assert record.started is not None
    was = (record.started["agent"], record.started["seed"])
    if was != (agent.name, seed):
        raise AgentDiverged(f"agent {agent.name!r}, seed {seed} can't resume a run of {was[0]!r}, seed {was[1]}")
    if env.has_wrapper_attr("_elapsed_steps"):  # gymnasium's TimeLimit counts from reset
        env.set_wrapper_attr("_elapsed_steps", len(record.steps))
    saved = 0
    if not agent.deterministic:
        saved = _load(agent, cast(CurationEnv, env.unwrapped).episode.run_dir)
    for step in record.steps:
        if agent.deterministic and not step.ticket:
            repeated = plain(agent.act(observation, info))
            if repeated != step.action:
                raise AgentDiverged(
                    f"step {step.number}: the agent did not repeat its recorded action, so the run can't be resumed"
                    f" (its code, a library or its settings changed). Recorded: {_short(step.action)};"
                    f" now: {_short(repeated)}"
                )
        if step.number > saved:
            agent.observe(step)
        observation, info = step.observation, step.info
    return observation, info


def _save(agent: Agent, run_dir: Path, steps: int) -> None:
    """Let an agent that is not deterministic write down where it is; only the newest whole copy is kept."""
    if agent.deterministic:
        return
    folder = run_dir / "agent"
    scratch, target = folder / ".partial", folder / f"{steps:06d}"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    _saves(agent).save(scratch)
    scratch.rename(target)
    for old in folder.glob("[0-9]*"):
        if old != target:
            shutil.rmtree(old)


def _load(agent: Agent, run_dir: Path) -> int:
    """Load the newest copy; returns the number of steps that it knows of."""
    copies = sorted((run_dir / "agent").glob("[0-9]*"))
    if not copies:
        return 0
    _saves(agent).load(copies[-1])
    return int(copies[-1].name)


def _saves(agent: Agent) -> Saves:
    if not isinstance(agent, Saves):
        raise TypeError(f"agent {agent.name!r} is not deterministic, so it must implement save(path) and load(path)")
    return agent


def _short(action: Any) -> str:
    text = json.dumps(action)
    return text if len(text) <= 300 else f"{text[:300]}..."


def from_plain(space: spaces.Space[Any], value: Any) -> Any:
    """The observation that the journal's JSON stands for."""
    if isinstance(space, spaces.Dict):
        return {key: from_plain(item, value[key]) for key, item in space.spaces.items()}
    if isinstance(space, spaces.Box | spaces.MultiBinary):
        return np.asarray(value, dtype=space.dtype)
    if isinstance(space, spaces.Discrete):
        return np.int64(value)
    return value


def _info(recorded: Mapping[str, Any]) -> dict[str, Any]:
    return dict(recorded)


__all__ = ["Agent", "AgentDiverged", "EpisodeResult", "Saves", "Step", "has_ended", "run_episode"]
