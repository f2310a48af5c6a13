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

    `other` names a further limit that is broken now, or "".
    """

    def __init__(self, config: SandboxConfig, enforce: Callable[[], None], other: Callable[[], str]) -> None:
        self._config = config
        self._enforce = enforce
        self._other = other
        self._done = threading.Event()
        self._allowed = (config.limits.disk_mb * _MB, config.limits.files)
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
        used = self._usage()
        limit = self._other()
        if used[0] > self._allowed[0]:
            limit = "disk"
        elif used[1] > self._allowed[1]:
            limit = "files"
        if limit:
            self.last_limit = limit
            self.hits += 1
            with contextlib.suppress(SandboxError):  # it is dead: whoever uses it next is told
                self._enforce()
            used = self._usage()
        self.full = used[0] > most[0] or used[1] > most[1]
        self._allowed = (max(most[0], used[0]), max(most[1], used[1]))

    def _usage(self) -> tuple[int, int]:
        return files.usage(self._config.workspace, stop_at=4 * self._config.limits.files)
