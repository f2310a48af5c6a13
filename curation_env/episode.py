"""An episode: one agent's run over a task's iterations. The gym environment is a thin shell around it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from curation_env import actions, feedback
from curation_env.errors import AgentError, InvalidAction, PolicyFailed, SandboxError
from curation_env.feedback import FeedbackFolder, feedback_table, shown_files, shown_part, shown_scores
from curation_env.host import HostBackend
from curation_env.journal import plain
from curation_env.ledger import SEALED_DIGEST, Ledger
from curation_env.pipeline import Outcome, Pipeline, Progress
from curation_env.pool import canonical_json
from curation_env.sandbox import SandboxKind
from curation_env.sandbox.base import ExecResult, Sandbox
from curation_env.session import Session
from curation_env.state import Iteration, State
from curation_env.task import Task
from curation_env.tickets import Ticket, ticket_name
from curation_env.workplace import Workplace

if TYPE_CHECKING:
    from curation_env.policy import PolicyRun

MAX_POLICY_BYTES = 1_000_000
NOTE_SECONDS = 30.0  # between two notes in the journal of how far a stage is
NO_MORE_POLICIES = "the iterations of this episode are used up: no further policy is played"


@dataclass(frozen=True)
class Turn:
    """What one action led to."""

    status: str
    message: str
    reward: float = 0.0
    terminated: bool = False
    error: str = ""
    recorded: bool = True


#: The answer to everything after the end: nothing is done, charged or recorded.
OVER = Turn("finished", "the episode is over: reset the environment", terminated=True, recorded=False)


class Episode:
    """One run: its folder, ledger, sandbox and session, and what each action does.

    A step that raises has not happened: nothing of it is charged, and its ticket waits again. Between actions the
    sandbox is frozen, so that nothing runs there uncounted; whoever runs commands in it itself sets
    `session.deferred` to False and thaws it.

    Args:
        task: What is curated.
        pipeline: Scores submissions; shared between the episodes of an environment.
        run_dir: The run folder; with `resume` it must hold an earlier part of the same run.
        sandbox: "auto", "docker", "bubblewrap", "dummy" or "none".
        seed: Policy seeds of the episode are derived from it.
        final_choice: Whether one free step for `stop(nominate=k)` follows the last iteration.
        on_progress: Called with what runs at the moment.
        resume: Continue from the last recorded step; ask `runs.check_resumable` first.

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
        self.busy = threading.RLock()  # signals and checks are asked for by the session's threads
        self._started = self._told_at = time.monotonic()
        self.ledger = Ledger(run_dir)
        try:
            self._feedback = FeedbackFolder(run_dir / "feedback")
            self._place = Workplace(
                task,
                pipeline.assets,
                run_dir,
                self._feedback.path,
                hidden=(pipeline.data_root, run_dir.parent.parent),
                sandbox=sandbox,
                ledger=self.ledger,
            )
        except BaseException:
            self.ledger.close()
            raise
        self.session: Session | None = None
        self._noted: set[str] = set()  # policies of tickets that the journal has
        self._ticket: Ticket | None = None  # that this step plays
        self._answer: dict[str, Any] | None = None  # to it
        try:
            self.state = self._before = self._recorded(seed) if resume else State(seed)
            if self.state.history:
                self.ledger.event("episode_resumed", sandbox=self._place.kind)
            else:
                self._begin()
            self._feedback.write(self.task, self.state.history)
            self.session = Session(None, HostBackend(self)).start()
            self._restore_tickets()
            self._place.living(self._session.path)
        except BaseException:
            self.close()
            raise

    # ------------------------------------------------------------------ what an agent does

    def act(self, action: Any) -> Turn:
        """Do one action.

        Raises:
            InfrastructureError: The machine failed; the episode is where it was before.
        """
        if self.state.finished:
            return OVER
        with self._step():
            try:
                return self._dispatch(action)
            except AgentError as error:
                return self._charge(error)

    def charge(self, action: Any, error: AgentError) -> Turn:
        """Answer an action that a wrapper refused (a breach): counted and recorded like the core's own errors.

        Where the action would have played a ticket, the ticket is answered with the error.
        """
        if self.state.finished:
            return OVER
        with self._step():
            with suppress(AgentError):
                parsed = actions.parse(action)
                if parsed.tool == actions.POLICY and parsed.path is None and not parsed.text.strip():
                    self._take_ticket()
            self._resolve(_refusal(error))
            return self._charge(error)

    @contextmanager
    def _step(self) -> Iterator[None]:
        """One step: counted when it is over, undone when it fails."""
        self._before = replace(self.state, history=list(self.state.history))
        self._ticket = self._answer = None
        try:
            yield
            self.state.steps += 1
            waiting = self._session.waiting()
            self._note_tickets(waiting)
            self.state.tickets = [ticket.name for ticket in waiting]
        except BaseException:
            self._undo()
            raise

    def _undo(self) -> None:
        """Be where the episode was before this step; what its agent was billed meanwhile stays billed."""
        self.state = replace(self._before, cost=self.state.cost)
        if self._ticket is not None:
            self._session.put_back(self._ticket)
        self.ledger.failed()

    def _dispatch(self, action: Any) -> Turn:
        parsed = actions.parse(action)
        if parsed.tool == actions.STOP:
            return self._stop(parsed.nominate)
        if self.state.awaiting_choice:
            raise InvalidAction("the iterations are used up: the only action left was stop(nominate=K)")
        if parsed.tool == actions.SHELL:
            return self._shell(parsed.text)
        return self._policy(parsed)

    def _shell(self, command: str) -> Turn:
        sandbox = self._place.living(self._session.path)
        started = time.monotonic()
        notes = []
        try:
            result = sandbox.exec(command, timeout=self.task.limits.shell_seconds)
        except SandboxError as error:
            # The command's doing as a rule (all memory in use, its first process killed), so it is not run again; where
            # the engine is what failed, the next sandbox does not start, and that raises.
            self._place.lose(error)
            result = ExecResult(1, b"", b"", False, False, time.monotonic() - started)
            notes.append(self._lost_note())
        finally:
            if self._session.deferred:
                self._place.freeze()
        self._raise_failure(self._session)
        self.state.shell_commands += 1
        self.state.curation_seconds += result.seconds
        return self._shell_turn(result, notes)

    def _lost_note(self) -> str:
        with suppress(SandboxError):
            self._place.living(self._session.path)
        return (
            "[the sandbox ended under this command, which was not run again: did it use more than"
            f" {self.task.limits.memory_mb} MB of memory, or kill processes that it did not start?"
            " A fresh sandbox follows; /workspace is as it was left, processes and /tmp are gone]"
        )

    def _shell_turn(self, result: ExecResult, notes: list[str]) -> Turn:
        output = result.stdout.decode(errors="replace")
        if result.stderr:
            output += ("\n" if output and not output.endswith("\n") else "") + result.stderr.decode(errors="replace")
        lost = bool(notes)
        if result.timed_out:
            seconds = self.task.limits.shell_seconds
            notes.append(f"[stopped after {seconds:g} s, with every process that it started]")
        if result.truncated:
            notes.append(f"[output cut at {self.task.limits.output_bytes:,} bytes]")
        if result.exit_code and not lost:
            notes.append(f"[exit code {result.exit_code}]")
        for ticket in self._session.waiting()[:1]:
            notes.append(f"[{ticket.name} waits: the next POLICY action with empty text runs it]")
        ok = result.exit_code == 0 and not result.timed_out
        return Turn("shell_ok" if ok else "shell_failed", "\n".join([output.rstrip("\n"), *notes]).strip("\n"))

    def _policy(self, parsed: actions.Parsed) -> Turn:
        source = self._source(parsed)
        try:
            turn = self._run_and_score(source)
        except AgentError as error:
            self._resolve(_refusal(error))
            raise
        self._resolve({"status": turn.status, "message": turn.message})
        return turn

    def _resolve(self, result: dict[str, Any]) -> None:
        """Answer the ticket that this step plays, if it plays one."""
        if self._ticket is not None:
            self._session.resolve(self._ticket.name, result)
            self._answer = {"name": self._ticket.name, "result": result}

    def _take_ticket(self) -> Ticket | None:
        """The oldest ticket that waits, which is then this step's."""
        self._ticket = self._session.next_ticket()
        if self._ticket is not None:
            self._note_tickets([self._ticket])
        return self._ticket

    def _note_tickets(self, tickets: list[Ticket]) -> None:
        """Journal the policies of tickets, each once: a step's record only names those that wait."""
        for ticket in tickets:
            name = ticket_name(ticket.policy.encode())
            if name not in self._noted:
                self.ledger.event("ticket", ticket=name, policy=ticket.policy)
                self._noted.add(name)

    def _restore_tickets(self) -> None:
        """Of a resumed run: a policy submitted again finds its result, is not charged again, and what waited waits."""
        policies = {event["ticket"]: event["policy"] for event in self.ledger.events("ticket")}
        self._noted = set(policies)
        for event in self.ledger.events("step"):
            if event.get("ticket"):
                self._session.resolve(**event["ticket"])
        for name in self.state.tickets:
            policy = policies.get(name) or policies.get(name.rpartition("-")[0])  # t-<digest>, or t-<digest>-<count>
            if policy is not None:
                self._session.restore(Ticket(name, policy))
        if self.state.finished or self.state.awaiting_choice:
            self._session.end(NO_MORE_POLICIES)

    def _source(self, parsed: actions.Parsed) -> str:
        """The source of a POLICY action; that of a ticket where it names none."""
        if parsed.path is not None:
            return _decode_policy(self._read(parsed.path))
        if parsed.text.strip():
            return parsed.text
        ticket = self._take_ticket()
        if ticket is None:
            raise InvalidAction("POLICY needs a script: policy(source), policy(path=...), or a submitted ticket")
        return ticket.policy

    def _read(self, path: str) -> bytes:
        sandbox = self.sandbox or self._place.living(self._session.path)
        try:
            return sandbox.read(path, MAX_POLICY_BYTES)
        except (OSError, ValueError) as error:  # a name that is too long, a file of 2 MB, a folder in between
            reason = getattr(error, "strerror", None) or str(error)
            raise PolicyFailed(f"no policy at {path[:300]}: {reason}") from error

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
            outcome = self.pipeline.score(run.submission, self._told)
        return self._scored(number, source, run, outcome)

    def _told(self, event: dict[str, Any]) -> None:
        """Show how far a stage is, with its loss while it trains, and note it in the journal every so often."""
        if time.monotonic() - self._told_at >= NOTE_SECONDS:
            self._told_at = time.monotonic()
            self.ledger.event("progress", **event)
        if self.on_progress:
            self.on_progress(event)

    def _run_policy(self, source: str, number: int) -> PolicyRun:
        from curation_env.policy import run_policy

        if self.on_progress:
            self.on_progress({"stage": "policy", "done": 0, "total": 1, "unit": "runs"})
        self._place.freeze()  # nothing may write while the workspace is copied
        try:
            with Session(None, HostBackend(self), read_only=True) as session:
                run = run_policy(
                    source,
                    workspace=self.workspace,
                    make=self._place.make,
                    config=self._place.config(f"{self.run_dir.name}-policy", session.path),
                    seed=policy_seed(self.state.seed, number),
                    timeout=self.task.limits.policy_seconds,
                    snapshot_mb=self.task.limits.disk_mb,
                    budget=self.task.budget,
                )
                self._raise_failure(session)
                return run
        finally:
            if not self._session.deferred:
                self._place.thaw()

    def _raise_failure(self, session: Session) -> None:
        """A request that the host could not answer is no fault of the agent's, whatever it made of that."""
        failure = session.take_failure()
        if failure is not None:
            self.ledger.event("request_failed", error=failure.code)
            raise failure

    def _scored(self, number: int, source: str, run: PolicyRun, outcome: Outcome) -> Turn:
        assert run.submission is not None
        part = shown_part(self.task)
        average = outcome.scores.mean(part)
        commit = self._commit(
            number,
            f"iteration {number}: {average:.2f}",
            outcome,
            {
                "policy.py": source.encode(),
                "provenance.json": _json(
                    {"policy_seed": policy_seed(self.state.seed, number), "snapshot": run.snapshot_digest}
                ),
                **{f"submission/{name}": data for name, data in run.submission.to_files().items()},
            },
        )
        best_before = self._average(self.state.best)
        entry = Iteration(
            number,
            dict(outcome.scores.parts[part]),
            average,
            outcome.scores.stderr[part],
            commit,
            run.submission.digest,
            outcome.rows,
            outcome.supervised_tokens,
            dict(outcome.audit),
        )
        self._add(entry, outcome)
        text = feedback_table(self.task, self.state.history, self.state.best)
        terminated = self._end_of_iterations()
        if self.state.awaiting_choice:
            text += "\nThe iterations are used up. Name the one that you stand by: stop(nominate=K)."
        return Turn("scored", text, max(0.0, average - best_before), terminated)

    def _commit(self, number: int, message: str, outcome: Outcome, files: dict[str, bytes]) -> str:
        """Record an iteration: what is sealed of it to its own place first, so that a committed iteration has it."""
        scores = outcome.scores.to_json()
        shown, sealed = shown_files(self.task, outcome.files)
        digest = self.ledger.seal(number, scores, sealed)
        files = {
            **files,
            **shown,
            "scores.json": _json({"task": self.task.hash, "scores": shown_scores(self.task, scores)}),
            SEALED_DIGEST: f"{digest}\n".encode(),
        }
        commit = self.ledger.commit(number, files, message)
        memory = {"memory": outcome.memory} if outcome.memory else {}
        self.ledger.event(
            "iteration", number=number, commit=commit, seconds=outcome.seconds, cached=outcome.cached, **memory
        )
        return commit

    def _add(self, entry: Iteration, outcome: Outcome | None = None) -> None:
        """Append to the history, what the agent reads first: if that fails, nothing has happened."""
        history = [*self.state.history, entry]
        self._feedback.write(self.task, history, outcome)
        self.state.history = history
        self.state.iteration = entry.number
        if entry.average is not None and entry.average > self._average(self.state.best):
            self.state.best = entry.number

    def _end_of_iterations(self) -> bool:
        """Whether the episode ends because its iterations are used up; with `final_choice` one step is left."""
        used_up = self.state.iteration >= self.task.iterations
        self.state.awaiting_choice = used_up and self.final_choice
        self.state.finished = used_up and not self.final_choice
        return self.state.finished

    def _stop(self, nominate: int | None) -> Turn:
        scored = [entry.number for entry in self.state.history if entry.scores is not None]
        if nominate is not None and nominate not in scored:
            raise InvalidAction(f"iteration {nominate} was not scored: nominate one of {scored}")
        self.state.nominee = nominate
        self.state.finished = True
        return Turn("finished", f"stopped; {self._nominee_text()}", 0.0, True)

    def _nominee_text(self) -> str:
        return f"the nominee is iteration {self.nominee} ({self._average(self.nominee):.2f})"

    @property
    def nominee(self) -> int:
        """The iteration that the agent stands by: its own choice, else the best on feedback."""
        return self.state.best if self.state.nominee is None else self.state.nominee

    def _charge(self, error: AgentError) -> Turn:
        """Answer an agent's error: free at first, one iteration each afterwards.

        The final choice is one step, whatever is made of it.
        """
        status = {"rejected_submission": "rejected", "rule_breach": "breach"}.get(error.code, "invalid")
        text = f"{error.code}: {error}"
        if self.state.awaiting_choice:
            self.state.finished = True
            return Turn(status, f"{text}\n[no choice was made: {self._nominee_text()}]", 0.0, True, error.code)
        if self.state.free_errors > 0:
            self.state.free_errors -= 1
            text += f"\n[nothing charged; {self.state.free_errors} more such errors are free]"
            return Turn(status, text, error=error.code)
        self._add(Iteration(self.state.iteration + 1, None, None, error=error.code))
        text += "\n[one iteration charged: the free errors are used up]"
        terminated = self._end_of_iterations()
        return Turn(status, text, 0.0, terminated, error.code)

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
            init=self.pipeline.init,
            seed=self.state.seed,
            final_choice=self.final_choice,
            sandbox=self._place.kind,
        )
        outcome = self.pipeline.base(self._told)
        part = shown_part(self.task)
        commit = self._commit(0, "iteration 0: base", outcome, {})
        self.state.history.append(
            Iteration(
                0, dict(outcome.scores.parts[part]), outcome.scores.mean(part), outcome.scores.stderr[part], commit
            )
        )
        self.ledger.event("reset", state=self.state.to_json())

    def record(self, action: Any, turn: Turn, observation: dict[str, Any], info: dict[str, Any]) -> None:
        """Journal one step, whole, with the state after it: the last one is where a resumed run goes on.

        Raises:
            LedgerError: It could not be written; the episode is where it was before the step.
        """
        if not turn.recorded:
            return
        now = time.monotonic()
        self.state.wall_seconds += now - self._started
        self._started = now
        try:
            self.ledger.event(
                "step",
                step=self.state.steps,
                action=plain(action),
                observation=plain(observation),
                reward=turn.reward,
                terminated=turn.terminated,
                info=plain(info),
                ticket=self._answer,
                state=self.state.to_json(),
            )
        except BaseException:
            self._undo()
            raise
        if self.state.finished or self.state.awaiting_choice:
            self._session.end(NO_MORE_POLICIES)
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
        events = self.ledger.events()
        started = [event for event in events if event["kind"] == "episode_started"]
        for event in reversed(events):
            if event["kind"] in ("reset", "step"):
                return State.from_json(event["state"])
        return State(started[-1]["seed"] if started else seed)

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

    @property
    def workspace(self) -> Path:
        """The agent's working folder, on the host."""
        return self._place.folder

    @property
    def sandbox(self) -> Sandbox | None:
        """The sandbox of shell actions, where it lives."""
        return self._place.sandbox

    @property
    def _session(self) -> Session:
        assert self.session is not None, "the episode is closed"
        return self.session

    def close(self) -> None:
        """Stop sandbox and session and release the run folder; may be called twice."""
        self._place.close()
        if self.session is not None:
            self.session.stop()
        self.ledger.close()
        self.session = None


def policy_seed(episode_seed: int, iteration: int) -> int:
    """The seed that a policy gets: the harness's, different in every iteration, equal in equal runs."""
    return int(np.random.SeedSequence([episode_seed, iteration]).generate_state(1)[0])


def _json(value: Any) -> bytes:
    return (canonical_json(value) + "\n").encode()


def _refusal(error: AgentError) -> dict[str, Any]:
    return {"status": "error", "error": error.code, "message": str(error)}


def _decode_policy(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise PolicyFailed(f"the policy is not UTF-8 (byte {error.start})") from error


def _with_output(text: str, output: str) -> str:
    return f"{text}\n{output[-4000:]}" if output.strip() else text
