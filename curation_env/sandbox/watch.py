"""The watch over what no engine can limit in the kernel without privileges: the size of the workspace."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable

from curation_env.errors import SandboxError
from curation_env.sandbox import files
from curation_env.sandbox.base import SandboxConfig

_SHORTEST, _LONGEST = 0.1, 2.0
_MB = 1 << 20


class Watch:
    """Looks at the workspace every tenth of a second (less often where looking takes long) and calls `enforce`, which
    kills everything, when it has grown beyond its limit. Over the limit, `full` is true: commands may then delete, but
    any that makes it grow is killed again.

    Args:
        other: Names a further limit that is broken now, or "".
        enforce: Kills every process of the sandbox.
        pids: The sandbox's processes as the host numbers them, whose deleted but open files count too.
    """

    def __init__(
        self,
        config: SandboxConfig,
        *,
        other: Callable[[], str],
        enforce: Callable[[], None],
        pids: Callable[[], list[int]],
    ) -> None:
        self._config = config
        self._other = other
        self._enforce = enforce
        self._pids = pids
        self._done = threading.Event()
        self._allowed = (config.limits.disk_mb * _MB, config.limits.files)
        self.lock = threading.Lock()
        """Held while a broken limit is enforced: a command started under it isn't hit by what came before it."""
        self.full = False
        self.hits = 0
        self.last_limit = ""
        self._check()
        self._thread = threading.Thread(target=self._loop, name="sandbox-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._done.set()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _loop(self) -> None:
        pause = _SHORTEST
        while not self._done.wait(pause):
            begin = time.monotonic()
            self._check()
            pause = min(max(_SHORTEST, 20 * (time.monotonic() - begin)), _LONGEST)

    def _check(self) -> None:
        limits = self._config.limits
        most = (limits.disk_mb * _MB, limits.files)
        size, count, deep = self._usage()
        with self.lock:
            limit = self._other()
            if size > self._allowed[0]:
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
        self.full = size > most[0] or count > most[1]
        self._allowed = (max(most[0], size), max(most[1], count))

    def _usage(self) -> tuple[int, int, bool]:
        root = self._config.workspace
        files.keep_own(root)
        size, count, deep = files.usage(root, stop_at=4 * self._config.limits.files)
        return size + files.deleted_bytes(self._pids(), root), count, deep
