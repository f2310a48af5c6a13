"""Which judge grades open answers: the miniature's own server, started here, or the endpoint that the user names."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import urllib3

from curation_env.errors import JudgeUnavailable
from curation_env.evaluation.wording import checkout

START_SECONDS = 60.0
LOAD_SECONDS = 1800.0  # a large model from a slow disk
STOP_SECONDS = 30.0
COMMAND = "CURATION_JUDGE_COMMAND"


def configured(wanted: dict[str, Any]) -> tuple[bool, str]:
    """Whether the judge that a suite asks the user for can be asked, and which it is; starts nothing.

    Args:
        wanted: The suite's `judge`, of kind "endpoint".

    Returns:
        (True, which judge), (False, what is wrong with it), or (False, "") where the environment names none.
    """
    url, command = os.environ.get("CURATION_JUDGE_URL"), os.environ.get(COMMAND)
    if url:
        from curation_env.evaluation.judge import Endpoint, JudgeClient

        try:
            with JudgeClient(Endpoint(url, wanted["model"], os.environ.get("CURATION_JUDGE_KEY", ""))) as client:
                client.find()
        except JudgeUnavailable as error:
            return False, str(error)
        return True, f"{wanted['model']} at {url}"
    words = shlex.split(command or "")
    if words and shutil.which(words[0]) is None:
        return False, f"{COMMAND} begins with {words[0]!r}, which is no program here"
    return bool(words), f"{wanted['model']}, started by {COMMAND} when it is asked" if words else ""


class Judge:
    """Gives a suite's judge endpoint; a built-in judge is started on first use and again when it died.

    The miniature's is a process of its own on a loopback port, with a key that only this process knows, so that nothing
    else on the machine can be mistaken for it. A local judge is what `$CURATION_JUDGE_COMMAND` starts, such as
    `vllm serve ... --port {port}`; it runs within `serving` alone, so that student and judge share a GPU in turn.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._endpoint: dict[str, str] = {}
        self._local: _LocalServer | None = None

    @property
    def is_local(self) -> bool:
        """Whether the endpoint is a command of the user's, which is not running before its stage."""
        return bool(os.environ.get(COMMAND)) and not os.environ.get("CURATION_JUDGE_URL")

    def endpoint(self, suite: dict[str, Any]) -> dict[str, Any] | None:
        """URL, model and key of the judge that `suite` asks for, and in whose words; None when it asks for none.

        Raises:
            JudgeUnavailable: The built-in or the local server did not start, or no endpoint is configured.
        """
        wanted = suite.get("judge")
        if wanted is None:
            return None
        if wanted["kind"] == "builtin":
            if self._process is None or self._process.poll() is not None:
                self._start(wanted["model"])
            return dict(self._endpoint)
        url = os.environ.get("CURATION_JUDGE_URL")
        if not url and self._local is not None:
            url = self._local.url()
        if not url:
            raise JudgeUnavailable(
                f"this suite is graded by {wanted['model']}: set CURATION_JUDGE_URL to an OpenAI-compatible endpoint "
                f"that serves it (and CURATION_JUDGE_KEY to its key), or {COMMAND} to what starts one on port {{port}}"
            )
        words = (wanted.get("prompts") or {}).get("source")
        return {
            "url": url,
            "model": wanted["model"],
            "key": os.environ.get("CURATION_JUDGE_KEY", ""),
            "body": wanted.get("body", {}),
            "vlmevalkit": checkout() if words == "vlmevalkit" else "",
        }

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """Have a local judge: started on first use, again when it died, stopped at the end."""
        if not self.is_local:
            yield
            return
        self._local = _LocalServer(os.environ[COMMAND])
        try:
            yield
        finally:
            local, self._local = self._local, None
            local.stop()

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


class _LocalServer:
    """A server that the user's command starts on a free loopback port, in a process group of its own."""

    def __init__(self, command: str) -> None:
        self.command = command
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `stop`)
        self._port = 0

    def url(self) -> str:
        """The base URL of the server, which has answered.

        Raises:
            JudgeUnavailable: It can't be started, ended, or did not answer in time; with the end of what it printed.
        """
        if self._process is None or self._process.poll() is not None:
            self._start()
        return f"http://127.0.0.1:{self._port}/v1"

    def _start(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self._log.seek(0)  # the next one writes where this file stands
        self._log.truncate()
        words = shlex.split(self.command.replace("{port}", str(self._port)))
        try:
            self._process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:
            raise JudgeUnavailable(f"{COMMAND} can't be started: {error}") from error
        key = os.environ.get("CURATION_JUDGE_KEY", "")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        address = f"http://127.0.0.1:{self._port}/v1/models"
        give_up = time.monotonic() + LOAD_SECONDS
        with urllib3.PoolManager(retries=False, timeout=5.0, headers=headers) as client:
            while True:
                with contextlib.suppress(urllib3.exceptions.HTTPError):
                    if client.request("GET", address).status == 200:
                        return
                if self._process.poll() is not None or time.monotonic() > give_up:
                    ended = self._process.poll()
                    state = "did not answer in time" if ended is None else f"ended with status {ended}"
                    self._end()
                    raise JudgeUnavailable(f"the judge that {COMMAND} started {state}: {self._last_words()}")
                time.sleep(0.1)

    def _last_words(self) -> str:
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - 1000))
        return self._log.read().decode(errors="replace").strip() or "it printed nothing"

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        for sign in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, sign)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)

    def stop(self) -> None:
        """End the server with everything that it started, so that the GPU is free again."""
        self._end()
        self._log.close()
