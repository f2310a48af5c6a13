"""Temporary folders that are locked while their owner lives, so that the next process clears away a killed one's."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
from pathlib import Path

from curation_env.locks import is_locked, locked


class Scratch:
    """A temporary folder of this process, removed by `close`; what a killed process left goes when the next is made.

    Args:
        root: Folder that holds such folders, made where it is missing; one of the user's own under the system's
            temporary folder when left out. Only folders of one root are cleared away, and renames within it are cheap.

    Attributes:
        path: The empty folder to use.

    Raises:
        OSError: The folder can't be made.
        PermissionError: The user's own folder belongs to somebody else.
    """

    def __init__(self, root: Path | None = None) -> None:
        root = _own_root() if root is None else root
        root.mkdir(parents=True, exist_ok=True)
        with locked(root / "lock"):
            dead = [place for place in root.iterdir() if place.is_dir() and not is_locked(place / "lock")]
            self._holder = Path(tempfile.mkdtemp(dir=root))
            self._lock = os.open(self._holder / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        for place in dead:
            shutil.rmtree(place, ignore_errors=True)
        self.path = self._holder / "files"
        self.path.mkdir()

    def close(self) -> None:
        """Remove the folder; may be called twice."""
        shutil.rmtree(self._holder, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Scratch:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _own_root() -> Path:
    root = Path(tempfile.gettempdir()) / f"curation-scratch-{os.getuid()}"
    root.mkdir(mode=0o700, exist_ok=True)
    info = root.lstat()
    if info.st_uid != os.getuid() or not stat.S_ISDIR(info.st_mode):
        raise PermissionError(f"{root} is not a folder of this user")
    return root
