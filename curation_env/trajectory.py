"""The git side of a run's record: commits named by content and history alone, made by one git process each."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from curation_env.journal import LedgerError, sync_folder

BRANCH = "refs/heads/trajectory"
#: Who and when is the same for every commit: a commit is named by what it holds and what came before it.
AUTHOR = "Curation-Bench <curation-bench@localhost> 946684800 +0000"
_FILE_NAME = re.compile(r"(?!\.)[\w.-]+(/(?!\.)[\w.-]+)*", re.ASCII)
_NOT_IN_MESSAGES = re.compile(r"[^\n\t\x20-\x7e\x80-\U0010ffff]|[\x80-\x9f\ud800-\udfff]")


class Commit(NamedTuple):
    """One entry of the trajectory."""

    iteration: int
    sha: str
    message: str


class Trajectory:
    """A bare repository with one branch.

    Args:
        git_dir: Its folder; `open` makes it.
        lock: Descriptor of the run's lock. A git that outlives a killed writer keeps it until it ends, so that no two
            ever write. None is for reading alone.
    """

    def __init__(self, git_dir: Path, lock: int | None = None) -> None:
        self.git_dir = git_dir
        self._lock = lock

    def open(self) -> None:
        """Make the repository if there is none; remove what a killed git left: the run's lock says that none runs.

        Raises:
            LedgerError: It can't be made.
        """
        if not self.git_dir.is_dir():
            scratch = self.git_dir.with_name(".trajectory.partial")
            subprocess.run(["rm", "-rf", "--", str(scratch)], check=True)
            branch = BRANCH.rpartition("/")[2]
            self._git("init", "-q", "--bare", f"--initial-branch={branch}", "--template=", git_dir=scratch)
            try:
                scratch.rename(self.git_dir)
                sync_folder(self.git_dir.parent)
            except OSError as error:
                raise LedgerError(f"{self.git_dir} can't be made: {error.strerror}") from error
            return
        for pattern in ("**/*.lock", "objects/pack/tmp_*", "objects/??/tmp_obj_*", "fast_import_crash_*"):
            for left in self.git_dir.glob(pattern):
                left.unlink(missing_ok=True)

    def commits(self) -> list[Commit]:
        """Every commit, the oldest first."""
        if not self._git("for-each-ref", BRANCH):
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

    def write(self, iteration: int, files: Mapping[str, bytes], message: str, parent: str | None) -> str:
        """Write a commit, objects first, then the branch; returns its sha.

        Args:
            iteration: Noted at the end of the message.
            files: The tree, by relative path of letters, digits, `_`, `-`, `.` and `/`.
            message: As `clean_message` leaves it.
            parent: What it follows; None for the first.

        Raises:
            ValueError: A bad path.
            LedgerError: It could not be written; the branch is where it was.
        """
        for name in files:
            if not _FILE_NAME.fullmatch(name):
                raise ValueError(f"not a path for the trajectory: {name!r}")
        text = f"{message}\n\nIteration: {iteration}\n".encode()
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
            "GIT_DIR": str(git_dir or self.git_dir),
            "GIT_CONFIG_GLOBAL": "/dev/null",
            "GIT_CONFIG_NOSYSTEM": "1",
            "HOME": "/nonexistent",
            "LC_ALL": "C",
            "TZ": "UTC",
        }
        settings = ["core.fsync=objects,derived-metadata,reference", "gc.auto=0", "core.compression=1"]
        command = ["git", *(part for setting in settings for part in ("-c", setting)), *arguments]
        kept = () if self._lock is None else (self._lock,)
        try:
            done = subprocess.run(
                command, env=environment, input=stdin, capture_output=True, pass_fds=kept, check=False
            )
        except FileNotFoundError as error:
            raise LedgerError("the command git is not installed") from error
        if done.returncode != 0:
            details = done.stderr.decode(errors="replace")[-2000:]
            raise LedgerError(f"git {arguments[0]} failed in {self.git_dir.parent}", details=details)
        return done.stdout


def clean_message(text: str) -> str:
    """Without control characters: a message may quote an agent, and `git log` is read by people and by `commits`."""
    return _NOT_IN_MESSAGES.sub("", text).strip()
