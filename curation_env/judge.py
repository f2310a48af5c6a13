"""Which judge grades open answers: the miniature's own server, started here, or the endpoint that the user names."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from curation_env.errors import JudgeUnavailable

START_SECONDS = 60.0


class Judge:
    """Gives a suite's judge endpoint; a built-in judge is started on first use and again when it died.

    The server is a process of its own on a loopback port, with a key that only this process knows, so that nothing else
    on the machine can be mistaken for it.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._endpoint: dict[str, str] = {}

    def endpoint(self, suite: dict[str, Any]) -> dict[str, str] | None:
        """URL, model and key of the judge that `suite` asks for; None when it asks for none.

        Raises:
            JudgeUnavailable: The built-in server did not start, or no endpoint is configured.
        """
        wanted = suite.get("judge")
        if wanted is None:
            return None
        if wanted["kind"] == "builtin":
            if self._process is None or self._process.poll() is not None:
                self._start(wanted["model"])
            return dict(self._endpoint)
        url = os.environ.get("CURATION_JUDGE_URL")
        if not url:
            raise JudgeUnavailable(
                f"this suite is graded by {wanted['model']}: set CURATION_JUDGE_URL to an OpenAI-compatible endpoint "
                "that serves it (and CURATION_JUDGE_KEY to its key)"
            )
        return {"url": url, "model": wanted["model"], "key": os.environ.get("CURATION_JUDGE_KEY", "")}

    def _start(self, model: str) -> None:
        key = os.urandom(16).hex()
        with tempfile.TemporaryDirectory(prefix="curation-judge-") as folder:
            ready = Path(folder) / "ready"
            self._process = subprocess.Popen(
                [sys.executable, "-m", "curation_env.mini.judge", "--port", "0", "--ready-file", str(ready)],
                stdin=subprocess.PIPE,  # the server ends when this process does
                env={**os.environ, "CURATION_JUDGE_KEY": key},
                start_new_session=True,
            )
            give_up = time.monotonic() + START_SECONDS
            while not ready.is_file():
                if self._process.poll() is not None or time.monotonic() > give_up:
                    self.close()
                    raise JudgeUnavailable("the built-in judge did not start: run `python -m curation_env.mini.judge`")
                time.sleep(0.02)
            self._endpoint = {"url": ready.read_text().strip(), "model": model, "key": key}

    def close(self) -> None:
        """Stop the built-in server; may be called twice."""
        process, self._process = self._process, None
        if process is not None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            if process.poll() is None:
                process.kill()
                process.wait()
            if process.stdin is not None:
                process.stdin.close()
