"""The watch over what no engine can limit in the kernel without privileges: the size of the workspace.

It counts the files of the workspace and the deleted ones that a process inside still holds. A file can also be held
where nobody can see it (its descriptor is under way between two sockets): then free space falls and nothing explains
it. The backstop takes that for the sandbox's doing when two things hold: more has gone from the file system than the
limit and some slack, beyond what was counted; and the sandbox's own processes have written that much. Either alone
would kill the innocent: on a busy host free space falls all the time, and a command may well write and delete a lot.
Where the disk is almost full, which would stop the harness too, the slack alone decides.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable

from curation_env.errors import SandboxError
from curation_env.sandbox import files
from curation_env.sandbox.base import SandboxConfig

_SHORTEST, _LONGEST = 0.1, 2.0
_MB = 1 << 20
_SLACK = 64 * _MB
_ALMOST_FULL = 1024 * _MB

_log = logging.getLogger(__name__)


class Watch:
    """Looks at the workspace every tenth of a second (less often where looking takes long) and calls `enforce`, which
    kills everything, when it has grown beyond its limit. Over the limit, `full` is true: commands may then delete, but
    any that makes it grow is killed again.

    Args:
        other: Names a further limit that is broken now, or "".
        enforce: Kills every process of the sandbox.
        pids: The sandbox's processes as the host numbers them, whose deleted but open or mapped files count too.
        give_up: Ends the sandbox. Called when the watch itself fails, since nothing may run without limits.
    """

    def __init__(
        self,
        config: SandboxConfig,
        *,
        other: Callable[[], str],
        enforce: Callable[[], None],
        pids: Callable[[], list[int]],
        give_up: Callable[[], None],
    ) -> None:
        self._config = config
        self._other = other
        self._enforce = enforce
        self._pids = pids
        self._give_up = give_up
        self._done = threading.Event()
        self._allowed = (config.limits.disk_mb * _MB, config.limits.files)
        self.lock = threading.Lock()
        """Held while a broken limit is enforced: a command started under it isn't hit by what came before it."""
        self.full = False
        self.hits = 0
        self.last_limit = ""
        self._most = 0  # that was ever free, with what the sandbox uses added
        self._written = 0  # before the last kill
        self._pause = _SHORTEST
        self._check()
        self._thread = threading.Thread(target=self._loop, name="sandbox-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._done.set()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _loop(self) -> None:
        while not self._done.wait(self._pause):
            try:
                self._check()
            except Exception:
                _log.exception("the watch over %s failed: its sandbox is ended", self._config.workspace)
                self._give_up()
                return

    def _check(self) -> None:
        limits = self._config.limits
        most = (limits.disk_mb * _MB, limits.files)
        begin = time.monotonic()
        free = files.free_bytes(self._config.workspace)
        size, count, deep = self._usage()
        hides = self._hides(free, size)
        self._pause = min(max(_SHORTEST, 20 * (time.monotonic() - begin)), _LONGEST)
        with self.lock:
            limit = self._other()
            if size > self._allowed[0] or hides:
                limit = "disk"
            elif count > self._allowed[1] or deep:
                limit = "files"
            if limit:
                self.last_limit = limit
                self.hits += 1
                with contextlib.suppress(SandboxError):  # it is dead: whoever uses it next is told
                    self._enforce()
                if deep:
                    files.remove_deep(self._config.workspace)
                size, count, _ = self._usage()
                self._most, self._written = 0, files.written_bytes(self._pids())  # the dead hide nothing
        self.full = size > most[0] or count > most[1]
        self._allowed = (max(most[0], size), max(most[1], count))

    def _hides(self, free: int, size: int) -> bool:
        """Whether it uses more than the limit where no look finds it; `free` is what was before `size` was counted.

        What is written while we count may be in either number: both bounds are taken in the sandbox's favour.
        """
        now = files.free_bytes(self._config.workspace)
        self._most = max(self._most, min(free, now) + size)
        room = _SLACK if now < _ALMOST_FULL else _SLACK + self._config.limits.disk_mb * _MB
        if self._most - size - max(free, now) <= room:
            return False
        return files.written_bytes(self._pids()) - self._written > room

    def _usage(self) -> tuple[int, int, bool]:
        root = self._config.workspace
        files.keep_own(root)
        size, count, deep = files.usage(root, stop_at=4 * self._config.limits.files)
        return size + files.deleted_bytes(self._pids(), root), count, deep
