"""A cache of small files under keys. It is never a reason to fail: what can't be read is a miss, what can't be written
is logged."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Mapping
from pathlib import Path

from curation_env.scratch import Scratch

log = logging.getLogger(__name__)


class Cache:
    """Entries, each a folder of files, that appear as a whole or not at all, also when the machine stops.

    Args:
        root: Where they lie; made with the first entry.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def read(self, key: str) -> dict[str, bytes]:
        """Return the files of an entry by name; none where there is no entry or it can't be read."""
        try:
            return {path.name: path.read_bytes() for path in sorted((self.root / key).iterdir())}
        except FileNotFoundError:
            return {}
        except OSError as error:
            log.warning("cache entry %s can't be read, it is made again: %s", self.root / key, error)
            self.discard(key)
            return {}

    def write(self, key: str, files: Mapping[str, bytes]) -> None:
        """Store an entry; one that is there stays, for it was made of the same things."""
        place = self.root / key
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with Scratch(self.root / ".scratch") as scratch:
                staging = scratch.path / "entry"
                staging.mkdir()
                for name, data in files.items():
                    with open(staging / name, "wb") as stream:
                        stream.write(data)
                        stream.flush()
                        os.fsync(stream.fileno())
                _sync(staging)
                staging.rename(place)  # also onto an empty folder, which is no entry
                _sync(place.parent)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # these: another process stored the same just now
                log.warning("nothing is kept in the cache at %s: %s", place, error)

    def discard(self, key: str) -> None:
        """Remove an entry that turned out to be of no use."""
        place = self.root / key
        try:
            with Scratch(self.root / ".scratch") as scratch:
                place.rename(scratch.path / "entry")
        except FileNotFoundError:
            pass
        except OSError as error:
            log.warning("the spoilt cache entry %s can't be removed: %s", place, error)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
