"""An episode: one agent's run over a task's iterations. The gym environment is a thin shell around it."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from curation_env import actions, feedback
from curation_env.errors import AgentError, InvalidAction, PolicyFailed, SandboxError
from curation_env.feedback import FeedbackFolder, feedback_table, shown_part
from curation_env.host import HostBackend
from curation_env.ledger import Ledger
from curation_env.pipeline import Outcome, Pipeline, Progress
from curation_env.pool import canonical_json
from curation_env.sandbox import SandboxKind, make_sandbox
from curation_env.sandbox.base import Mount, Sandbox, SandboxConfig, SandboxLimits
from curation_env.session import Session
from curation_env.task import Task

if TYPE_CHECKING:
    from curation_env.policy import PolicyRun

#: Invalid, rejected and breaching actions of an episode that cost nothing.
FREE_ERRORS = 3
MAX_POLICY_BYTES = 1_000_000


@dataclass
class Iteration:
    """What one charged submission left behind; `scores` is None when it was charged without being scored."""

    number: int
    scores: dict[str, float] | None
    average: float | None
    stderr: float = 0.0
    commit: str = ""
    submission: str = ""
    n_rows: int = 0
    n_supervised_tokens: int = 0
    audit: dict[str, int] = field(default_factory=dict)
    error: str = ""


@dataclass
class State:
    """Everything that an episode remembers; journaled after every step, so that a run can be continued."""

    seed: int
    iteration: int = 0
    free_errors: int = FREE_ERRORS
    history: list[Iteration] = field(default_factory=list)
    best: int = 0
    shell_commands: int = 0
    curation_seconds: float = 0.0
    priced_seconds: float = 0.0
    wall_seconds: float = 0.0
    cost: float = 0.0
    steps: int = 0
    awaiting_choice: bool = False
    finished: bool = False
    nominee: int | None = None
    tickets: list[str] = field(default_factory=list)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> State:
        history = [Iteration(**item) for item in record["history"]]
        return cls(**{**record, "history": history})


@dataclass(frozen=True)
class Turn:
    """What one action led to."""

    status: str
    message: str
    reward: float = 0.0
    terminated: bool = False
    error: str = ""


class Episode:
    """One run: its folder, ledger, sandbox and session, and what each action does.

    Args:
        task: What is curated.
        pipeline: Scores submissions; shared between the episodes of an environment.
        run_dir: The run folder; with `resume` it must hold an earlier part of the same run.
        sandbox: "auto", "docker", "bubblewrap", "dummy" or "none".
        seed: Policy seeds of the episode are derived from it.
        final_choice: Whether one free step for `stop(nominate=k)` follows the last iteration.
        on_progress: Called with what runs at the moment.
        resume: Continue from the last recorded step.

    Raises:
        RunLocked: Another process holds the run folder.
        SandboxError: No engine, or it failed to start.
    """

    def __init__(
        self,
        task: Task,
        pipeline: Pipeline,
        run_dir: Path,
        *,
        sandbox: SandboxKind = "auto",
        seed: int = 0,
        final_choice: bool = False,
        on_progress: Progress | None = None,
        resume: bool = False,
    ) -> None:
        self.task = task
        self.pipeline = pipeline
        self.run_dir = run_dir
        self.final_choice = final_choice
        self.on_progress = on_progress
        self._sandbox_kind = sandbox
        self.busy = threading.RLock()  # signals and checks are asked for by the session's threads
        self._started = time.monotonic()
        self.ledger = Ledger(run_dir)
        self.sandbox: Sandbox | None = None
        self.session: Session | None = None
        self._answer: dict[str, Any] | None = None  # to this step's ticket
        try:
            self.state = self._recorded(seed) if resume else State(seed)
            self._folders()
            if not self.state.history:
                self._begin()
            self._feedback.write(self.task, self.state.history)
            self.session = Session(None, HostBackend(self)).start()
            self._restore_tickets()
            self._start_sandbox()
        except BaseException:
            self.close()
            raise

    # ------------------------------------------------------------------ what an agent does

    def act(self, action: Any) -> Turn:
        """Do one action and record it."""
        if self.state.finished:
            turn = Turn("finished", "the episode is over: reset the environment", terminated=True)
        else:
            try:
                turn = self._dispatch(action)
            except AgentError as error:
                turn = self._charge(error)
        self.state.steps += 1
        self.state.tickets = [ticket.policy for ticket in self._session.waiting()]
        return turn

    def _dispatch(self, action: Any) -> Turn:
        parsed = actions.parse(action)
        if parsed.tool == actions.STOP:
            return self._stop(parsed.nominate)
        if self.state.awaiting_choice:
            raise InvalidAction("the iterations are used up: the only action left is stop(nominate=K)")
        if parsed.tool == actions.SHELL:
            return self._shell(parsed.text)
        return self._policy(parsed)

    def _shell(self, command: str) -> Turn:
        self.state.shell_commands += 1
        seconds = self.task.limits.shell_seconds
        result = self._in_sandbox(lambda sandbox: sandbox.exec(command, timeout=seconds))
        self.state.curation_seconds += result.seconds
        output = result.stdout.decode(errors="replace")
        if result.stderr:
            output += ("\n" if output and not output.endswith("\n") else "") + result.stderr.decode(errors="replace")
        notes = []
        if result.timed_out:
            notes.append(f"[stopped after {seconds:g} s, with every process that it started]")
        if result.truncated:
            notes.append(f"[output cut at {self.task.limits.output_bytes:,} bytes]")
        if result.exit_code:
            notes.append(f"[exit code {result.exit_code}]")
        for ticket in self._session.waiting()[:1]:
            notes.append(f"[{ticket.name} waits: the next POLICY action with empty text runs it]")
        ok = result.exit_code == 0 and not result.timed_out
        return Turn("shell_ok" if ok else "shell_failed", "\n".join([output.rstrip("\n"), *notes]).strip("\n"))

    def _policy(self, parsed: actions.Parsed) -> Turn:
        ticket, source = self._source(parsed)
        try:
            turn = self._run_and_score(source)
        except AgentError as error:
            self._resolve(ticket, {"status": "error", "error": error.code, "message": str(error)})
            raise
        self._resolve(ticket, {"status": turn.status, "message": turn.message})
        return turn

    def _resolve(self, ticket: str, result: dict[str, Any]) -> None:
        if ticket:
            self._session.resolve(ticket, result)
            self._answer = {"name": ticket, "result": result}

    def _restore_tickets(self) -> None:
        """Of a resumed run: a policy submitted again finds its result, is not charged again, and what waited waits."""
        for event in self.ledger.events("step"):
            if event.get("ticket"):
                self._session.resolve(**event["ticket"])
        for policy in self.state.tickets:
            self._session.submit(policy.encode(), again=True)

    def _source(self, parsed: actions.Parsed) -> tuple[str, str]:
        """The ticket ("" when there is none) and the source of a POLICY action."""
        if parsed.path is not None:
            path = parsed.path
            try:
                data = self._in_sandbox(lambda sandbox: sandbox.read(path, MAX_POLICY_BYTES))
            except (FileNotFoundError, IsADirectoryError, PermissionError, ValueError) as error:
                raise PolicyFailed(f"no policy at {path}: {error}") from error
            return "", _decode_policy(data)
        if parsed.text.strip():
            return "", parsed.text
        taken = self._session.next_ticket()
        if taken is None:
            raise InvalidAction("POLICY needs a script: policy(source), policy(path=...), or a submitted ticket")
        return taken.name, taken.policy

    def _run_and_score(self, source: str) -> Turn:
        number = self.state.iteration + 1
        run = self._run_policy(source, number)
        self.state.curation_seconds += run.seconds
        self.ledger.event("policy_run", iteration=number, seconds=run.seconds, snapshot=run.snapshot_digest)
        if run.error is not None:
            if isinstance(run.error, AgentError):
                raise type(run.error)(_with_output(str(run.error), run.output))
            raise run.error
        if run.submission is None:
            raise PolicyFailed(_with_output("the policy selected nothing: call curation.select(ids)", run.output))
        with self.busy:
            outcome = self.pipeline.score(run.submission, self.on_progress)
        return self._scored(number, source, run, outcome)

    def _run_policy(self, source: str, number: int) -> PolicyRun:
        from curation_env.policy import run_policy

        if self.on_progress:
            self.on_progress({"stage": "policy", "done": 0, "total": 1, "unit": "runs"})
        if self.sandbox is not None:
            self._in_sandbox(lambda sandbox: sandbox.freeze())  # nothing may write while the workspace is copied
        with ExitStack() as after, Session(None, HostBackend(self), read_only=True) as session:
            after.callback(self._thaw)
            return run_policy(
                source,
                workspace=self.workspace,
                make=lambda config: make_sandbox(self._sandbox_kind, config),
                config=self._config(f"{self.run_dir.name}-policy", session.path),
                seed=policy_seed(self.state.seed, number),
                timeout=self.task.limits.policy_seconds,
                snapshot_mb=self.task.limits.disk_mb,
            )

    def _thaw(self) -> None:
        if self.sandbox is not None:
            self._in_sandbox(lambda sandbox: sandbox.thaw())

    def _scored(self, number: int, source: str, run: PolicyRun, outcome: Outcome) -> Turn:
        assert run.submission is not None
        part = shown_part(self.task)
        visible = dict(outcome.scores.parts[part])
        average = outcome.scores.mean(part)
        files = {
            "policy.py": source.encode(),
            "provenance.json": _json(
                {"policy_seed": policy_seed(self.state.seed, number), "snapshot": run.snapshot_digest}
            ),
            **{f"submission/{name}": data for name, data in run.submission.to_files().items()},
            **outcome.files,
            "scores.json": _json({"task": self.task.hash, "scores": outcome.scores.to_json()}),
        }
        self.ledger.seal(number, outcome.scores.to_json())  # first: a committed iteration has them
        commit = self.ledger.commit(number, files, f"iteration {number}: {average:.2f}")
        best_before = self._average(self.state.best)
        entry = Iteration(
            number,
            visible,
            average,
            outcome.scores.stderr[part],
            commit,
            run.submission.digest,
            outcome.rows,
            outcome.supervised_tokens,
            dict(outcome.audit),
        )
        self.state.history.append(entry)
        self.state.iteration = number
        if average > best_before:
            self.state.best = number
        self.ledger.event("iteration", number=number, commit=commit, seconds=outcome.seconds, cached=outcome.cached)
        self._feedback.write(self.task, self.state.history, outcome)
        terminated = self._iterations_used_up()
        text = feedback_table(self.task, self.state.history, self.state.best)
        if terminated and self.final_choice:
            self.state.awaiting_choice, terminated = True, False
            text += "\nThe iterations are used up. Name the one that you stand by: stop(nominate=K)."
        self.state.finished = terminated
        return Turn("scored", text, max(0.0, average - best_before), terminated)

    def _stop(self, nominate: int | None) -> Turn:
        scored = [entry.number for entry in self.state.history if entry.scores is not None]
        if nominate is not None and nominate not in scored:
            raise InvalidAction(f"iteration {nominate} was not scored: nominate one of {scored}")
        self.state.nominee = nominate
        self.state.finished = True
        chosen = self.nominee
        return Turn("finished", f"stopped; the nominee is iteration {chosen} ({self._average(chosen):.2f})", 0.0, True)

    @property
    def nominee(self) -> int:
        """The iteration that the agent stands by: its own choice, else the best on feedback."""
        return self.state.best if self.state.nominee is None else self.state.nominee

    def charge(self, error: AgentError) -> Turn:
        """Answer an agent's error that a wrapper found (a breach): counted and recorded like the core's own."""
        turn = self._charge(error)
        self.state.steps += 1
        return turn

    def _charge(self, error: AgentError) -> Turn:
        """Answer an agent's error: free at first, one iteration each afterwards."""
        status = {"rejected_submission": "rejected", "rule_breach": "breach"}.get(error.code, "invalid")
        text = f"{error.code}: {error}"
        if self.state.awaiting_choice:
            return Turn(status, text, error=error.code)
        if self.state.free_errors > 0:
            self.state.free_errors -= 1
            text += f"\n[nothing charged; {self.state.free_errors} more such errors are free]"
            return Turn(status, text, error=error.code)
        self.state.iteration += 1
        self.state.history.append(Iteration(self.state.iteration, None, None, error=error.code))
        self._feedback.write(self.task, self.state.history)
        text += "\n[one iteration charged: the free errors are used up]"
        terminated = self._iterations_used_up()
        if terminated and self.final_choice:
            self.state.awaiting_choice, terminated = True, False
        self.state.finished = terminated
        return Turn(status, text, 0.0, terminated, error.code)

    def _iterations_used_up(self) -> bool:
        return self.state.iteration >= self.task.iterations

    def _average(self, number: int) -> float:
        value = self.state.history[number].average
        assert value is not None
        return value

    # ------------------------------------------------------------------ start, record, close

    def _begin(self) -> None:
        """Score the base model (iteration 0, free) and open the record."""
        self.ledger.event(
            "episode_started",
            task=self.task.model_dump(mode="json"),
            task_hash=self.task.hash,
            seed=self.state.seed,
        )
        outcome = self.pipeline.base(self.on_progress)
        part = shown_part(self.task)
        scores = outcome.scores.to_json()
        self.ledger.seal(0, scores)
        commit = self.ledger.commit(
            0, {**outcome.files, "scores.json": _json({"task": self.task.hash, "scores": scores})}, "iteration 0: base"
        )
        self.state.history.append(
            Iteration(
                0, dict(outcome.scores.parts[part]), outcome.scores.mean(part), outcome.scores.stderr[part], commit
            )
        )
        self.ledger.event("iteration", number=0, commit=commit, seconds=outcome.seconds, cached=outcome.cached)
        self.ledger.event("reset", state=asdict(self.state))

    def record(self, action: Any, turn: Turn, observation: dict[str, Any], info: dict[str, Any]) -> None:
        """Journal one step, whole, with the state after it: the last one is where a resumed run goes on."""
        self.state.wall_seconds += time.monotonic() - self._started
        self._started = time.monotonic()
        self.ledger.event(
            "step",
            step=self.state.steps,
            action=_plain(action),
            observation=_plain(observation),
            reward=turn.reward,
            terminated=turn.terminated,
            info=_plain(info),
            ticket=self._answer,
            state=asdict(self.state),
        )
        self._answer = None
        if self.state.finished:
            self.ledger.event("episode_finished", nominee=self.nominee, best=self.state.best)

    def welcome(self) -> str:
        """The first message: the task in one paragraph and the base scores, or where a resumed run stands."""
        task = self.task
        where = f"iteration {self.state.iteration} of {task.iterations}"
        return (
            f"{task.title}: select at most {task.rows:,} of {len(self.pipeline.view):,} rows"
            + (f" and {task.tokens:,} supervised tokens" if task.tokens else "")
            + f" to fine-tune the student; {where}. `curation task` says more.\n"
            + feedback_table(task, self.state.history, self.state.best)
        )

    def gain_recovered(self, average: float) -> float | None:
        """Share of the way from base to the full pool, on the items that the agent sees; None where not known."""
        return feedback.gain_recovered(self.task, average, self._average(0))

    def _recorded(self, seed: int) -> State:
        """The state after the last recorded step; a fresh one when the run was cut before the base was scored."""
        events = list(self.ledger.events())
        for event in reversed(events):
            if event["kind"] in ("reset", "step"):
                return State.from_json(event["state"])
        return State(next((event["seed"] for event in events if event["kind"] == "episode_started"), seed))

    @property
    def usage(self) -> dict[str, float]:
        """What the episode has used so far: iterations, shell commands, seconds, cost."""
        state = self.state
        return {
            "iterations": state.iteration,
            "shell_commands": state.shell_commands,
            "curation_seconds": state.curation_seconds,
            "wall_seconds": state.wall_seconds + time.monotonic() - self._started,
            "cost": state.cost,
        }

    def _folders(self) -> None:
        self.workspace = self.run_dir / "workspace"
        self.workspace.mkdir(exist_ok=True)
        self._feedback = FeedbackFolder(self.run_dir / "feedback")

    def _config(self, label: str, socket: Path) -> SandboxConfig:
        limits = self.task.limits
        mounts = [Mount(self.pipeline.assets.view / "rows", "/workspace/pool")]
        if self.task.show_student:
            mounts.append(Mount(self.pipeline.assets.student, "/workspace/student"))
        mounts.append(Mount(self._feedback.path, "/workspace/feedback"))
        return SandboxConfig(
            workspace=self.workspace,
            mounts=tuple(mounts),
            socket=socket,
            limits=SandboxLimits(
                memory_mb=limits.memory_mb,
                cpus=limits.cpus,
                pids=limits.pids,
                disk_mb=limits.disk_mb,
                output_bytes=limits.output_bytes,
            ),
            label=label,
        )

    def _start_sandbox(self) -> None:
        self.sandbox = make_sandbox(self._sandbox_kind, self._config(self.run_dir.name, self._session.path))
        self.sandbox.start()

    @property
    def _session(self) -> Session:
        assert self.session is not None, "the episode is closed"
        return self.session

    def _in_sandbox(self, use: Callable[[Sandbox], Any]) -> Any:
        """Use the sandbox; one that died is started again once (the workspace outlives it)."""
        for attempt in (1, 2):
            try:
                if self.sandbox is None:
                    self._start_sandbox()
                assert self.sandbox is not None
                return use(self.sandbox)
            except SandboxError as error:
                self.ledger.event("sandbox_failed", error=str(error), attempt=attempt)
                if self.sandbox is not None:
                    self.sandbox.stop()
                self.sandbox = None
                if attempt == 2:
                    raise
        raise AssertionError("unreachable")

    def close(self) -> None:
        """Stop sandbox and session and release the run folder; may be called twice."""
        if self.sandbox is not None:
            self.sandbox.stop()
        if self.session is not None:
            self.session.stop()
        self.ledger.close()
        self.sandbox = self.session = None


def policy_seed(episode_seed: int, iteration: int) -> int:
    """The seed that a policy gets: the harness's, different in every iteration, equal in equal runs."""
    return int(np.random.SeedSequence([episode_seed, iteration]).generate_state(1)[0])


def _json(value: Any) -> bytes:
    return (canonical_json(value) + "\n").encode()


def _plain(value: Any) -> Any:
    """Numpy values as JSON's; NaN as None; what JSON has no word for by its repr, cut short."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    return value if isinstance(value, int | bool) or value is None else repr(value)[:1000]


def _decode_policy(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise PolicyFailed(f"the policy is not UTF-8 (byte {error.start})") from error


def _with_output(text: str, output: str) -> str:
    return f"{text}\n{output[-4000:]}" if output.strip() else text
