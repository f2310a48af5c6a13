"""The record of a run: an append-only journal with times, a git trajectory without any, and the sealed scores.

    run folder/
      journal.jsonl     one event a line: {"seq", "time", "kind", ...}, fsynced
      journal.torn      what a crash left half written, if it ever did
      sealed.jsonl      the sealed items' scores, an iteration a line; they leave only through `unseal`, which counts
      trajectory.git    one commit an iteration, by content alone: the same run gives the same commits on any host
      lock              held while a process writes; it dies with its holder

Order makes a kill at any moment harmless. An iteration is sealed, then committed; `commit` moves the branch and then
writes its journal line. What was not committed was not finished; a commit whose journal line is missing gets it when
the ledger is opened again.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from curation_env.errors import InfrastructureError, RunLocked

BRANCH = "refs/heads/trajectory"
LOCK_SECONDS = 2.0
#: Who and when is the same for every commit: a commit is named by what it holds and what came before it.
AUTHOR = "Curation-Bench <curation-bench@localhost> 946684800 +0000"
_FILE_NAME = re.compile(r"(?!\.)[\w.-]+(/(?!\.)[\w.-]+)*", re.ASCII)


class LedgerError(InfrastructureError):
    """The record could not be written (a full or read-only disk) or is damaged; `details` has the cause."""

    code = "ledger"


class Commit(NamedTuple):
    """One entry of the trajectory."""

    iteration: int
    sha: str
    message: str


class Ledger:
    """Opens or makes the record of a run folder; a context manager.

    Args:
        run_dir: The run folder; made if missing.

    Raises:
        RunLocked: Another process writes to this run.
        LedgerError: The record is damaged beyond a torn last line, or can't be written.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self.run_dir = Path(run_dir)
        self._git_dir = self.run_dir / "trajectory.git"
        self._lock: int | None = None
        self._journal = _Lines(self.run_dir / "journal.jsonl")
        self._sealed = _Lines(self.run_dir / "sealed.jsonl")
        self._own_commits: set[int] = set()
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            self._lock = _take_lock(self.run_dir / "lock")
        except OSError as error:
            raise LedgerError(f"the run folder {self.run_dir} can't be written: {error.strerror}") from error
        try:
            self._journal.repair()
            self._sealed.repair()
            self._repair_git()
            self._seq = len(self._journal.read())
            self._commits = self._read_commits()
            self._finish_last_commit()
        except BaseException:
            self.close()
            raise

    def event(self, kind: str, **fields: Any) -> dict[str, Any]:
        """Append one event and return it; it is on the disk when this returns.

        Args:
            kind: What happened: "episode", "action", "stage", "commit", ...
            fields: Plain JSON; NaN and infinities become null.

        Raises:
            LedgerError: It could not be written; the journal is as it was.
        """
        self._writable()
        record = {
            "seq": self._seq,
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "kind": kind,
            **fields,
        }
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
                content takes its place where it stems from an earlier process, which died before its step was over.
            files: The commit's tree, by relative path of letters, digits, `_`, `-`, `.` and `/`. Nothing in it may tell
                time, host or place, or the same run would not give the same commits.
            message: One line or more.

        Raises:
            ValueError: A bad path, an iteration out of order, or another content for one that is recorded.
            LedgerError: It could not be written; the trajectory is as it was.
        """
        self._writable()
        for name in files:
            if not _FILE_NAME.fullmatch(name):
                raise ValueError(f"not a path for the trajectory: {name!r}")
        # Control characters out: the subject may quote an agent, and `git log` is read by people and by `commits`.
        message = re.sub(r"[^\n\t\x20-\x7e\x80-\U0010ffff]|[\x80-\x9f\ud800-\udfff]", "", message).strip()
        if not message:
            raise ValueError("a commit needs a message")
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
        text = f"{message}\n\nIteration: {iteration}\n"
        sha = self._import(files, text, history[-1].sha if history else None)
        self._commits = [*history, Commit(iteration, sha, message)]
        self._own_commits.add(iteration)
        self.event("commit", iteration=iteration, commit=sha)
        return sha

    def commits(self) -> list[Commit]:
        """The trajectory, oldest first."""
        return list(self._commits)

    def _read_commits(self) -> list[Commit]:
        if not self._git_dir.is_dir() or not self._git("for-each-ref", BRANCH):
            return []
        log = self._git("log", "--reverse", "--format=%H%x00%B%x01", BRANCH).decode()
        commits = []
        for entry in log.split("\x01"):
            sha, found, body = entry.strip("\n").partition("\0")
            if found:
                message, _, iteration = body.rstrip("\n").rpartition("\n\nIteration: ")
                commits.append(Commit(int(iteration), sha, message))
        return commits

    def files(self, commit: str) -> dict[str, bytes]:
        """The tree of a commit: path -> content."""
        names = self._git("ls-tree", "-r", "-z", "--name-only", commit).decode().split("\0")[:-1]
        request = "".join(f"{commit}:{name}\n" for name in names).encode()
        output = self._git("cat-file", "--batch", stdin=request)
        files, position = {}, 0
        for name in names:
            end = output.index(b"\n", position)
            size = int(output[position:end].rpartition(b" ")[2])
            files[name] = output[end + 1 : end + 1 + size]
            position = end + 2 + size
        return files

    def seal(self, iteration: int, scores: Mapping[str, Any]) -> None:
        """Put an iteration's sealed scores away. Do it before `commit`: a committed iteration has them.

        Raises:
            LedgerError: They could not be written.
        """
        self._writable()
        self._sealed.append({"iteration": iteration, "scores": dict(scores)})

    def unseal(self) -> list[dict[str, Any]]:
        """Open the sealed scores: `{"iteration", "scores"}` an iteration. Each opening is an event, and stays one."""
        self.event("unseal", opening=self.openings() + 1)
        latest = {record["iteration"]: record for record in self._sealed.read()}
        return [latest[iteration] for iteration in sorted(latest)]

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

    def _writable(self) -> None:
        if self._lock is None:
            raise LedgerError(f"the record of {self.run_dir} is closed")

    def _repair_git(self) -> None:
        """Make the repository if there is none; remove what a killed git left: the run's lock says that none runs."""
        if not self._git_dir.is_dir():
            scratch = self.run_dir / ".trajectory.partial"
            subprocess.run(["rm", "-rf", "--", str(scratch)], check=True)
            self._git(
                "init", "-q", "--bare", f"--initial-branch={BRANCH.rpartition('/')[2]}", "--template=", git_dir=scratch
            )
            try:
                scratch.rename(self._git_dir)
                _sync_folder(self.run_dir)
            except OSError as error:
                raise LedgerError(f"the trajectory can't be made in {self.run_dir}: {error.strerror}") from error
            return
        for pattern in ("**/*.lock", "objects/pack/tmp_*", "objects/??/tmp_obj_*", "fast_import_crash_*"):
            for left in self._git_dir.glob(pattern):
                left.unlink(missing_ok=True)

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

    def _import(self, files: Mapping[str, bytes], message: str, parent: str | None) -> str:
        """Write a commit in one git process: objects first, then the branch."""
        text = message.encode()
        stream = [f"commit {BRANCH}\nmark :1\nauthor {AUTHOR}\ncommitter {AUTHOR}\ndata {len(text)}\n".encode(), text]
        if parent is not None:
            stream.append(f"from {parent}\n".encode())
        stream.append(b"deleteall\n")
        for name, data in sorted(files.items()):
            stream += [f"M 100644 inline {name}\ndata {len(data)}\n".encode(), data, b"\n"]
        stream.append(b"get-mark :1\ndone\n")
        return self._git("fast-import", "--quiet", "--done", "--force", stdin=b"".join(stream)).decode().strip()

    def _git(self, *arguments: str, stdin: bytes = b"", git_dir: Path | None = None) -> bytes:
        environment = {
            "PATH": os.environ.get("PATH", os.defpath),
            "GIT_DIR": str(git_dir or self._git_dir),
            "GIT_CONFIG_GLOBAL": "/dev/null",
            "GIT_CONFIG_NOSYSTEM": "1",
            "HOME": "/nonexistent",
            "LC_ALL": "C",
            "TZ": "UTC",
        }
        settings = (
            "-c",
            "core.fsync=objects,derived-metadata,reference",
            "-c",
            "gc.auto=0",
            "-c",
            "core.compression=1",
        )
        # A git that outlives a killed writer keeps the run's lock until it ends, so no two ever write.
        held = () if self._lock is None else (self._lock,)
        try:
            done = subprocess.run(
                ["git", *settings, *arguments],
                env=environment,
                input=stdin,
                capture_output=True,
                pass_fds=held,
                check=False,
            )
        except FileNotFoundError as error:
            raise LedgerError("the command git is not installed") from error
        if done.returncode != 0:
            details = done.stderr.decode(errors="replace")[-2000:]
            raise LedgerError(f"git {arguments[0]} failed in {self.run_dir}", details=details)
        return done.stdout


def read_events(run_dir: str | Path) -> list[dict[str, Any]]:
    """The journal of a run, without its lock: the run may be going on.

    Raises:
        LedgerError: A line is damaged.
    """
    return _Lines(Path(run_dir) / "journal.jsonl").read()


class _Lines:
    """A file of JSON lines that is only ever appended to."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: Mapping[str, Any]) -> None:
        line = (json.dumps(_plain(record), allow_nan=False, ensure_ascii=False) + "\n").encode(errors="replace")
        try:
            new = not self.path.exists()
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            try:
                before = os.fstat(descriptor).st_size
                try:
                    if os.write(descriptor, line) != len(line):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    os.fsync(descriptor)
                except OSError:
                    os.ftruncate(descriptor, before)
                    raise
            finally:
                os.close(descriptor)
            if new:
                _sync_folder(self.path.parent)
        except OSError as error:
            raise LedgerError(f"{self.path} can't be written: {error.strerror}") from error

    def read(self) -> list[dict[str, Any]]:
        """Every whole line. A last line without its end is one that is being written, or was when a crash came."""
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return []
        records = []
        for number, line in enumerate(data.split(b"\n")[:-1], start=1):
            try:
                records.append(json.loads(line))
            except ValueError as error:
                raise LedgerError(f"{self.path}, line {number} is damaged: restore it from a copy") from error
        return records

    def repair(self) -> None:
        """Move a torn last line to a file beside this one."""
        if not self.path.exists():
            return
        with open(self.path, "r+b") as stream:
            data = stream.read()
            whole = data.rfind(b"\n") + 1
            tail = data[whole:]
            if not tail:
                return
            with open(self.path.with_suffix(".torn"), "ab") as torn:
                torn.write(tail + b"\n")
                os.fsync(torn.fileno())
            stream.truncate(whole)
            os.fsync(stream.fileno())


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


def _plain(value: Any) -> Any:
    """The value with NaN and infinities as None: a journal that any JSON reader can read."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
