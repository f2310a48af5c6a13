"""The record of a run: an append-only journal with times, a git trajectory without any, and the sealed scores.

    run folder/
      journal.jsonl     one event a line: {"seq", "time", "kind", ...}, fsynced
      journal.torn      what a crash left half written, if it ever did
      sealed.jsonl      the sealed items' scores and predictions, an iteration a line: nowhere else in the run folder,
                        they leave only through `unseal`, which counts; the commit holds each line's digest
      trajectory.git    one commit an iteration, by content alone: the same run gives the same commits on any host
      lock              held while a process writes; it dies with its holder

Order makes a kill at any moment harmless: `commit` moves the branch and then writes its journal line. A commit whose
line is missing gets it when the ledger is opened again; a step that was committed and not journaled as over is played
again and, with the same content, finds its commit.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from curation_env.errors import RunLocked
from curation_env.journal import LedgerError, Lines, finite, read_events
from curation_env.pool import canonical_json
from curation_env.trajectory import Commit, Trajectory, clean_message

__all__ = ["Commit", "Ledger", "LedgerError", "read_events"]

LOCK_SECONDS = 2.0
#: The file of a commit that binds it to its sealed scores: what `seal` returned.
SEALED_DIGEST = "sealed.sha256"


class Ledger:
    """Opens or makes the record of a run folder; a context manager. Its methods may be called from several threads.

    Args:
        run_dir: The run folder; made if missing.

    Raises:
        RunLocked: Another process writes to this run.
        LedgerError: The record is damaged beyond a torn last line, or can't be written.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self.run_dir = Path(run_dir)
        self._journal = Lines(self.run_dir / "journal.jsonl")
        self._sealed = Lines(self.run_dir / "sealed.jsonl")
        self._threads = threading.RLock()
        self._own_commits: set[int] = set()
        self._lock: int | None = None
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            self._lock = _take_lock(self.run_dir / "lock")
            self._trajectory = Trajectory(self.run_dir / "trajectory.git", self._lock)
            self._journal.repair()
            self._sealed.repair()
            self._trajectory.open()
            self._seq = len(self._journal.read())
            self._commits = self._trajectory.commits()
            self._finish_last_commit()
        except OSError as error:
            self.close()
            raise LedgerError(f"the run folder {self.run_dir} can't be written: {error.strerror}") from error
        except BaseException:
            self.close()
            raise

    def event(self, kind: str, **fields: Any) -> dict[str, Any]:
        """Append one event and return it; it is on the disk when this returns.

        Args:
            kind: What happened: "episode_started", "step", "commit", ...
            fields: Plain JSON; NaN and infinities become null.

        Raises:
            LedgerError: It could not be written; the journal is as it was.
        """
        with self._threads:
            self._open()
            now = datetime.now(UTC).isoformat(timespec="milliseconds")
            record = {"seq": self._seq, "time": now, "kind": kind, **fields}
            self._journal.append(record)
            self._seq += 1
            return record

    def events(self, kind: str | None = None) -> list[dict[str, Any]]:
        """The journal in order, or the events of one kind."""
        events = self._journal.read()
        return events if kind is None else [event for event in events if event["kind"] == kind]

    def commit(self, iteration: int, files: Mapping[str, bytes], message: str) -> str:
        """Record an iteration and return its commit's sha, which depends on content and history alone.

        Args:
            iteration: Larger than the last one's. The last one again, with the same content, changes nothing; another
                content takes its place where its step was never over: its process died, or it `failed`.
            files: The commit's tree, by relative path of letters, digits, `_`, `-`, `.` and `/`. Nothing in it may tell
                time, host or place, or the same run would not give the same commits.
            message: One line or more.

        Raises:
            ValueError: A bad path, an iteration out of order, or another content for one that is recorded.
            LedgerError: It could not be written; the trajectory is as it was.
        """
        message = clean_message(message)
        if not message:
            raise ValueError("a commit needs a message")
        with self._threads:
            self._open()
            history = self._commits
            if history and iteration == history[-1].iteration:
                last = history[-1]
                if message == last.message and dict(files) == self.files(last.sha):
                    self._note_commits([last])  # the disk may have been full for its line
                    return last.sha
                if iteration in self._own_commits:
                    raise ValueError(f"iteration {iteration} is recorded already, with another content ({last.sha})")
                history = history[:-1]
            if history and iteration <= history[-1].iteration:
                raise ValueError(f"iteration {iteration} can't follow iteration {history[-1].iteration}")
            sha = self._trajectory.write(iteration, files, message, history[-1].sha if history else None)
            self._commits = [*history, Commit(iteration, sha, message)]
            self._own_commits.add(iteration)
            self._note_commits(self._commits[-1:])
            return sha

    def failed(self) -> None:
        """The step that made the last commit was not recorded: played again, it may record another content."""
        self._own_commits.clear()

    def commits(self) -> list[Commit]:
        """The trajectory, oldest first."""
        return list(self._commits)

    def files(self, commit: str) -> dict[str, bytes]:
        """The tree of a commit: path -> content."""
        self._open()
        return self._trajectory.files(commit)

    def seal(self, iteration: int, scores: Mapping[str, Any], predictions: Mapping[str, str] | None = None) -> str:
        """Put an iteration's sealed scores away; the last ones of an iteration count.

        Args:
            iteration: Its number.
            scores: Plain JSON.
            predictions: Sealed items' predictions, JSON lines by the name of the file that they were taken from.

        Returns:
            A digest, for the commit's file `SEALED_DIGEST`: `unseal` holds the one against the other.

        Raises:
            LedgerError: They could not be written.
        """
        record = {"iteration": iteration, "scores": dict(scores), "predictions": dict(predictions or {})}
        with self._threads:
            self._open()
            self._sealed.append(record)
        return _digest(record)

    def unseal(self) -> list[dict[str, Any]]:
        """Open the sealed scores: `{"iteration", "scores", "predictions"}` an iteration.

        Each opening is an event, and stays one.

        Raises:
            LedgerError: Those that a commit was made with are not there: the file was changed.
        """
        self.event("unseal", opening=self.openings() + 1)
        records = self._sealed.read()
        chosen = {record["iteration"]: record for record in records}
        by_digest = {_digest(record): record for record in records}
        for commit in self._commits:
            bound = self.files(commit.sha).get(SEALED_DIGEST)
            if bound is None:
                continue
            record = by_digest.get(bound.decode().strip())
            if record is None or record["iteration"] != commit.iteration:
                raise LedgerError(
                    f"{self._sealed.path} lacks the scores that iteration {commit.iteration} was committed with"
                    f" ({commit.sha[:12]}): restore the file from a copy"
                )
            chosen[commit.iteration] = record
        return [chosen[iteration] for iteration in sorted(chosen)]

    def openings(self) -> int:
        """How often the sealed scores were opened."""
        return len(self.events("unseal"))

    def close(self) -> None:
        """Give the lock back. Idempotent."""
        lock, self._lock = self._lock, None
        if lock is not None:
            os.close(lock)

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self) -> None:
        if self._lock is None:
            raise LedgerError(f"the record of {self.run_dir} is closed")

    def _finish_last_commit(self) -> None:
        self._note_commits(self._commits)
        known = {commit.iteration for commit in self._commits}
        missing = {event["iteration"] for event in self.events("commit")} - known
        if missing:
            raise LedgerError(f"the trajectory of {self.run_dir} lacks iterations that its journal names: {missing}")

    def _note_commits(self, commits: Sequence[Commit]) -> None:
        """Write the journal lines that these commits lack."""
        written = {event["iteration"]: event["commit"] for event in self.events("commit")}
        for commit in commits:
            if written.get(commit.iteration) != commit.sha:
                self.event("commit", iteration=commit.iteration, commit=commit.sha)


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json(finite(record)).encode()).hexdigest()  # as the file gives it back


def _take_lock(path: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    give_up = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            if time.monotonic() > give_up:
                os.close(descriptor)
                raise RunLocked(
                    f"another process is writing to the run {path.parent}: wait for it or stop it"
                ) from None
            time.sleep(0.05)
