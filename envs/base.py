"""`CurationEnv`: the Gymnasium shell around an episode. What is shared by every family is here."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils import EzPickle

from curation_env import text
from curation_env.assets import Assets, data_root, prepared
from curation_env.choices import DEVICES, SANDBOXES, check_choice, check_gib
from curation_env.envs.spaces import SharedText
from curation_env.errors import AgentError, LimitExceeded
from curation_env.group import Group
from curation_env.statuses import STATUSES
from curation_env.task import Task

if TYPE_CHECKING:
    from curation_env.episode import Episode, Turn
    from curation_env.executor import LocalExecutor
    from curation_env.judge import Judge
    from curation_env.ledger import Ledger
    from curation_env.pipeline import Pipeline, Progress
    from curation_env.sandbox import SandboxKind
    from curation_env.sandbox.base import Sandbox
    from curation_env.session import Session

ACTION_CHARS = 4096
REMAINING = ("iterations", "shell_commands", "curation_seconds", "wall_seconds", "cost")
#: What can be limited, in words; see `CurationEnv.limit`.
RESOURCES = {
    "steps": "steps",
    "shell_commands": "shell commands",
    "curation_seconds": "seconds of curation compute",
    "wall_seconds": "seconds of wall clock",
    "cost": "dollars",
}


class CurationEnv(gym.Env[dict[str, Any], dict[str, Any]], EzPickle):
    """Curate training data: inspect a pool in a sandbox, write a data policy, submit it, read the scores.

    ## Actions
    `Dict(tool=Discrete(3), text=Text)`, made by `curation_env.actions`: `shell(text)` runs a command in the sandbox
    and charges no iteration; `policy(source)` or `policy(path=)` runs a Python script in a fresh sandbox, audits what
    it selects, fine-tunes and evaluates the student and charges one iteration; `stop(nominate=k)` ends the episode.
    The declared space is what `sample()` draws; `step` takes any UTF-8 text up to 1 MB.

    ## Observations
    | key | space | meaning |
    |---|---|---|
    | scores | Box(0, 100, (benchmarks,)) | feedback scores of the last scored iteration, percent |
    | base | Box(0, 100, (benchmarks,)) | of iteration 0, the untrained init |
    | best | Box(0, 100, (benchmarks,)) | of the best iteration so far |
    | average | Box(0, 100, (1,)) | mean of `scores` |
    | history | Box(0, 100, (iterations + 1, benchmarks)) | one row an iteration; zeros where nothing is yet |
    | history_mask | MultiBinary(iterations + 1) | 1 where a row of `history` was scored |
    | iteration | Discrete(iterations + 1) | iterations charged so far |
    | remaining | Box(0, 1, (5,)) | left of: iterations, shell commands, curation compute, wall clock, cost |
    | status | Discrete(9) | see `curation_env.statuses.STATUSES` |
    | message | Text | output of a command, feedback table, or what was wrong |

    ## Reward
    The rise, in points, of the episode's best feedback average (from base on), so that an episode returns
    max(0, best - base). It is a shaped reward, biased upward by its maximum; what is reported is the nominee on sealed
    items. Everything else earns 0. Invalid, rejected and breaching actions charge nothing the first three times of an
    episode and one iteration each afterwards.

    ## Episode end
    `terminated` when the iterations are used up or after STOP. `final_choice=True` leaves one free step for
    `stop(nominate=k)`; whatever else is done in it chooses the best on feedback. `truncated` by the step that uses up a
    limit: of the task (`max_episode_steps`, `budgets`), or one that `curation_env.wrappers.limits` sets. That step is
    played to its end; it says which limit it was, with the status `limit` unless it was scored. An infrastructure
    failure raises, it never looks like a score; a step that raised has not happened.

    ## Info
    Flat, the same keys on every step; None, 0 or "" where there is nothing.
    | key | meaning |
    |---|---|
    | iteration, status | number charged so far; the status' name |
    | score, scores/<benchmark>, stderr | feedback of this step's iteration and its standard error over items, points |
    | gain_recovered | (score - base) / (full - base) on the same items; None where full is not known |
    | commit, submission | hash of the trajectory's commit; digest of what was trained on |
    | n_rows, n_supervised_tokens | size of the submission |
    | audit/<kind> | findings of the audit by kind (warnings too) |
    | curation_seconds | recorded prices of the signals read so far: the part of curation compute that is equal in \
equal episodes; `remaining`, `usage` and limits add the measured seconds of commands and policies |
    | error | code of the agent's error, see `curation_env.errors` |

    Args:
        task: Name of a task file.
        iterations, rows, tokens, seeds, feedback, detail: Overrides of the task; those that move scores enter its hash.
        final_choice: Leave one free step for `stop(nominate=k)` after the last iteration.
        sandbox: "auto" (Docker, else bubblewrap), "docker", "bubblewrap", or "none" for no isolation at all.
        run_dir: Folder of this environment's episodes (`episode-0000`, ...); default: under the data root.
        data_root: Folder of pools, suites and caches; default `$CURATION_ENV_DATA` or `~/.cache/curation-env`.
        device: Where to train and evaluate: "auto", "cpu" or "cuda".
        gpu_memory_gib: What training and evaluation may take of a GPU's memory; default: all that is free.
        processes: How many processes of this machine share training and evaluation, on a GPU each; see
            `docs/scaling.md`.
        hostfile: Machines that share them, in place of `processes`: a file with a line `HOST slots=N` each.
        zero_stage: What those processes share out besides rows: nothing (0), moments (1), gradients too (2), weights
            too (3): each takes less memory and more time.
        cache: Whether results of equal submissions are taken from earlier runs.
        on_progress: Called with a dict (stage, done, total, unit, seconds_left, ...) while something runs.
        render_mode: "ansi" (a table as text), "human" (the same, printed) or "rgb_array" (a small plot).
    """

    metadata = {"render_modes": ["ansi", "human", "rgb_array"], "render_fps": 1}
    reset_options: ClassVar[tuple[str, ...]] = ("resume",)
    _spec: EnvSpec | None = None

    def __init__(
        self,
        task: str,
        *,
        iterations: int | None = None,
        rows: int | None = None,
        tokens: int | None = None,
        seeds: int | None = None,
        feedback: str | None = None,
        detail: str | None = None,
        final_choice: bool = False,
        sandbox: SandboxKind = "auto",
        run_dir: str | Path | None = None,
        data_root: str | Path | None = None,
        device: str = "auto",
        gpu_memory_gib: float | None = None,
        processes: int = 1,
        hostfile: str | Path | None = None,
        zero_stage: int = 0,
        cache: bool = True,
        on_progress: Callable[[dict[str, Any]], None] | None = None,
        render_mode: str | None = None,
    ) -> None:
        EzPickle.__init__(
            self,
            task,
            iterations=iterations,
            rows=rows,
            tokens=tokens,
            seeds=seeds,
            feedback=feedback,
            detail=detail,
            final_choice=final_choice,
            sandbox=sandbox,
            run_dir=run_dir,
            data_root=data_root,
            device=device,
            gpu_memory_gib=gpu_memory_gib,
            processes=processes,
            hostfile=hostfile,
            zero_stage=zero_stage,
            cache=cache,
            on_progress=on_progress,
            render_mode=render_mode,
        )
        check_choice("sandbox", sandbox, SANDBOXES)
        check_choice("device", device, DEVICES)
        check_gib("gpu_memory_gib", gpu_memory_gib)
        self._group = Group.checked(processes, hostfile, zero_stage)
        if render_mode is not None and render_mode not in self.metadata["render_modes"]:
            raise ValueError(f"render_mode must be one of {self.metadata['render_modes']}, not {render_mode!r}")
        self.task = Task.load(
            task, iterations=iterations, rows=rows, tokens=tokens, seeds=seeds, feedback=feedback, detail=detail
        )
        self.render_mode = render_mode
        self.on_progress: Progress | None = on_progress
        self._final_choice = final_choice
        self._sandbox_kind = sandbox
        self._run_root = Path(run_dir) if run_dir is not None else None
        self._data_root = data_root
        self._device = device
        self._gpu_memory_gib = gpu_memory_gib
        self._cache = cache
        self._limits = {"steps": float(self.task.max_episode_steps)}
        for resource, amount in self.task.budgets.model_dump().items():
            if amount is not None:
                self.limit(resource, amount)
        self._executor: LocalExecutor | None = None
        self._judge: Judge | None = None
        self._pipeline: Pipeline | None = None
        self._episode: Episode | None = None
        self._turn: Turn | None = None
        self.action_space = spaces.Dict(
            {"tool": spaces.Discrete(3), "text": spaces.Text(ACTION_CHARS, min_length=0, charset=text.CHARSET)}
        )
        self.observation_space = self._observation_space()

    def _observation_space(self) -> spaces.Dict:
        count, rows = len(self.task.benchmarks), self.task.iterations + 1

        def percent(*shape: int) -> spaces.Box:
            return spaces.Box(0.0, 100.0, shape, np.float32)

        return spaces.Dict(
            {
                "scores": percent(count),
                "base": percent(count),
                "best": percent(count),
                "average": percent(1),
                "history": percent(rows, count),
                "history_mask": spaces.MultiBinary(rows),
                "iteration": spaces.Discrete(rows),
                "remaining": spaces.Box(0.0, 1.0, (len(REMAINING),), np.float32),
                "status": spaces.Discrete(len(STATUSES)),
                "message": SharedText(text.MESSAGE_CHARS, min_length=0, charset=text.CHARSET),
            }
        )

    # ------------------------------------------------------------------ the Gymnasium interface

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start an episode: score the base model (cached) and start the sandbox.

        Args:
            seed: Policy seeds and, in tasks that draw worlds, the world follow from it.
            options: {"resume": True} continues the run folder's last episode after its last recorded step.

        Raises:
            RunDiffers: (resume) The episode was started with another task or other settings; the world of a task that
                draws worlds is the recorded one, unless `seed` or an option asks for another.
            MissingAssets: Pool, student or suite are not prepared; lists every missing path and what prepares it.
            InfrastructureError: The base model could not be scored, or no sandbox engine is there.
        """
        from curation_env.episode import Episode

        super().reset(seed=seed)
        options = options or {}
        if unknown := set(options) - set(self.reset_options):
            raise ValueError(f"unknown reset options {sorted(unknown)}: there are {sorted(self.reset_options)}")
        self._close_episode()
        task = self._draw_task(options)
        episode_seed = int(self.np_random.integers(2**31))
        resume = bool(options.get("resume")) and self._episodes_on_disk() > 0
        run_dir = self._next_run_dir(resume)
        if resume:
            task = self._resumed(task, run_dir, asked=seed is not None or options.get("world") is not None)
        self._episode = Episode(
            task,
            self._pipeline_for(task),
            run_dir,
            sandbox=self._sandbox_kind,
            seed=episode_seed,
            final_choice=self._final_choice,
            on_progress=self.on_progress,
            resume=resume,
        )
        self._turn = None
        return self._observation("ready", self._episode.welcome()), self._info("ready")

    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Do one action; see the class for what comes back.

        Raises:
            InfrastructureError: Training, evaluation or the sandbox failed twice; nothing was charged.
            ResetNeeded: There is no episode.
        """
        if self._episode is None:
            raise gym.error.ResetNeeded("call reset() before step()")
        return self._answer(action, self._episode.act(action))

    def refuse(self, action: Any, error: AgentError) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Answer an action that a scaffold's rule refused: charged and recorded as the design says, not played.

        A ticket that the action would have played is answered with the error. After the episode's end nothing is
        charged or recorded, as in `step`.
        """
        if self._episode is None:
            raise gym.error.ResetNeeded("call reset() before step()")
        return self._answer(action, self._episode.charge(action, error))

    def _answer(self, action: Any, turn: Turn) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        assert self._episode is not None
        self._turn = turn
        used_up = None if turn.terminated else self._used_up()
        if used_up is not None:
            why = f"The episode ends: its limit of {self._limits[used_up]:g} {RESOURCES[used_up]} is used up."
            self._episode.ledger.event("limit", resource=used_up, limit=self._limits[used_up])
            self._turn = turn = replace(turn, message=f"{turn.message}\n{why}")
            if turn.status != "scored":
                self._turn = turn = replace(turn, status="limit", error=LimitExceeded.code)
        observation = self._observation(turn.status, turn.message)
        info = self._info(turn.status)
        self._episode.record(action, turn, observation, info)
        if self.render_mode == "human":
            self.render()
        return observation, turn.reward, turn.terminated, used_up is not None, info

    def _used_up(self) -> str | None:
        """The first limit that the episode has reached."""
        used = {**self.usage, "steps": self.episode.state.steps}
        return next((resource for resource, amount in self._limits.items() if used[resource] >= amount), None)

    def render(self) -> Any:
        """The episode so far, in the render mode."""
        from curation_env.render import ansi, rgb_array

        if self.render_mode is None:
            gym.logger.warn("render() needs a render_mode: pass one to gym.make")
            return None
        if self._episode is None:
            raise gym.error.ResetNeeded("call reset() before render()")
        if self.render_mode == "rgb_array":
            return rgb_array(self._episode.task, self._episode.state.history)
        table = ansi(self._episode.task, self._episode.state.history, self._episode.state.best)
        if self.render_mode == "human":
            sys.stdout.write(table + "\n")
            return None
        return table

    def close(self) -> None:
        """Stop sandbox, session and workers; may be called twice."""
        self._close_episode()
        if self._executor is not None:
            self._executor.close()
            self._executor = None
        if self._judge is not None:
            self._judge.close()
            self._judge = None
        self._pipeline = None

    @property
    def spec(self) -> EnvSpec | None:
        """How `gym.make` made this environment, in plain data: it goes through JSON whatever paths were given."""
        return self._spec

    @spec.setter
    def spec(self, spec: EnvSpec | None) -> None:
        if spec is not None:
            spec.kwargs = {key: str(v) if isinstance(v, Path) else v for key, v in spec.kwargs.items()}
        self._spec = spec

    # ------------------------------------------------------------------ for wrappers and the agent loop

    @property
    def episode(self) -> Episode:
        """The running episode (core object; wrappers read it, agents never get it)."""
        if self._episode is None:
            raise gym.error.ResetNeeded("call reset() first")
        return self._episode

    @property
    def session(self) -> Session:
        assert self.episode.session is not None
        return self.episode.session

    @property
    def sandbox(self) -> Sandbox | None:
        return self.episode.sandbox

    @property
    def ledger(self) -> Ledger:
        return self.episode.ledger

    @property
    def pipeline(self) -> Pipeline:
        """The running episode's path to scores; calibration and reports use it without an agent."""
        return self.episode.pipeline

    @property
    def usage(self) -> dict[str, float]:
        """What the episode has used: iterations, shell_commands, curation_seconds, wall_seconds, cost."""
        return self.episode.usage

    def limit(self, resource: str, amount: float) -> None:
        """Let an episode use at most `amount` of a resource (see `RESOURCES`); the tighter of two limits holds.

        Raises:
            ValueError: There is no such resource, or the amount is not more than 0.
        """
        if resource not in RESOURCES:
            raise ValueError(f"no resource {resource!r}: there are {', '.join(RESOURCES)}")
        if not amount > 0:
            raise ValueError(f"a limit on {RESOURCES[resource]} must be more than 0, not {amount}")
        self._limits[resource] = min(float(amount), self._limits.get(resource, math.inf))

    def add_cost(self, dollars: float) -> None:
        """Count what the agent's model was billed against the episode's cost; agents call it when they learn of it.

        Raises:
            ValueError: Not a finite amount from 0.
            ResetNeeded: There is no episode.
        """
        if not 0 <= dollars < math.inf:
            raise ValueError(f"a cost is a finite number of dollars from 0, not {dollars}")
        self.episode.state.cost += float(dollars)
        self.ledger.event("cost", dollars=float(dollars))

    # ------------------------------------------------------------------ inside

    def _draw_task(self, options: dict[str, Any]) -> Task:
        """The task of the next episode; families that draw worlds override this."""
        return self.task

    def _resumed(self, task: Task, run_dir: Path, asked: bool) -> Task:
        """The drawn task as the run was begun with: in its world, unless another was asked for, which is an error."""
        from curation_env.runs import check_resumable, recorded_task

        recorded = None if asked or task.pool.world == self.task.pool.world else recorded_task(run_dir)
        if recorded is not None:
            task = self.task.in_world(int(recorded.pool.world))
        check_resumable(run_dir, task, self._final_choice)
        return task

    def _pipeline_for(self, task: Task) -> Pipeline:
        from curation_env.executor import LocalExecutor
        from curation_env.judge import Judge
        from curation_env.pipeline import Pipeline

        if self._pipeline is not None and self._pipeline.task.hash == task.hash:
            return self._pipeline
        root = data_root(self._data_root)
        assets: Assets = prepared(task, root, self.on_progress)
        if self._executor is None:
            self._executor = LocalExecutor()
            self._executor.start()
            self._judge = Judge()
        self._pipeline = Pipeline(
            task,
            assets,
            self._executor,
            self._judge,
            data_root=root,
            device=self._device,
            gpu_memory_gib=self._gpu_memory_gib,
            group=self._group,
            cache=self._cache,
        )
        return self._pipeline

    def _run_folder(self) -> Path:
        if self._run_root is None:
            stamp = time.strftime("%Y%m%d-%H%M%S")
            self._run_root = (
                data_root(self._data_root) / "runs" / f"{self.task.name}-{stamp}-{os.getpid()}-{id(self):x}"
            )
        return self._run_root

    def _episodes_on_disk(self) -> int:
        return len(list(self._run_folder().glob("episode-*")))

    def _next_run_dir(self, resume: bool) -> Path:
        count = self._episodes_on_disk()
        if resume:
            return self._run_folder() / f"episode-{count - 1:04d}"
        self._run_folder().mkdir(parents=True, exist_ok=True)
        while True:  # copies of an environment may share a run folder: each episode's folder is claimed by one
            folder = self._run_folder() / f"episode-{count:04d}"
            try:
                folder.mkdir()
                return folder
            except FileExistsError:
                count += 1

    def _close_episode(self) -> None:
        if self._episode is not None:
            self._episode.close()
            self._episode = None

    def _observation(self, status: str, message: str) -> dict[str, Any]:
        episode = self.episode
        state, count = episode.state, len(self.task.benchmarks)
        history = np.zeros((self.task.iterations + 1, count), np.float32)
        mask = np.zeros(self.task.iterations + 1, np.int8)
        for entry in state.history:
            if entry.scores is not None:
                history[entry.number] = [entry.scores[name] for name in self.task.benchmarks]
                mask[entry.number] = 1
        last = int(np.flatnonzero(mask)[-1])
        return {
            "scores": history[last].copy(),
            "base": history[0].copy(),
            "best": history[state.best].copy(),
            "average": np.array([history[last].mean()], np.float32),
            "history": history,
            "history_mask": mask,
            "iteration": np.int64(state.iteration),
            "remaining": np.array([self._left(name) for name in REMAINING], np.float32),
            "status": np.int64(STATUSES.index(status)),
            "message": text.message(message),
        }

    def _left(self, resource: str) -> float:
        """Share of a budget that is left; 1 where there is no limit."""
        if resource == "iterations":
            return 1.0 - self.episode.state.iteration / self.task.iterations
        limit = self._limits.get(resource)
        return 1.0 if limit is None else min(1.0, max(0.0, 1.0 - self.usage[resource] / limit))

    def _info(self, status: str) -> dict[str, Any]:
        episode = self.episode
        state = episode.state
        scored = status == "scored" or (status == "ready" and state.iteration == 0)
        entry = state.history[-1] if scored else None
        # None, not NaN: an info that is not equal to itself fails Gymnasium's own check of determinism.
        gain = None if entry is None or entry.average is None else episode.gain_recovered(entry.average)
        info: dict[str, Any] = {
            "iteration": state.iteration,
            "status": status,
            "score": None if entry is None else entry.average,
            "stderr": None if entry is None else entry.stderr,
            "gain_recovered": gain,
            "commit": "" if entry is None else entry.commit,
            "submission": "" if entry is None else entry.submission,
            "n_rows": 0 if entry is None else entry.n_rows,
            "n_supervised_tokens": 0 if entry is None else entry.n_supervised_tokens,
            "curation_seconds": state.priced_seconds,
            "error": self._turn.error if self._turn is not None and status != "ready" else "",
        }
        for name in self.task.benchmarks:
            info[f"scores/{name}"] = None if entry is None or entry.scores is None else entry.scores[name]
        for kind in AUDIT_KINDS:
            info[f"audit/{kind}"] = 0 if entry is None else entry.audit.get(kind, 0)
        return info


AUDIT_KINDS = ("image", "question", "answer", "image+question", "image+answer", "rewrite")

__all__ = ["AUDIT_KINDS", "REMAINING", "RESOURCES", "CurationEnv"]
