"""Executors run stages (train, evaluate, signal) somewhere and answer with futures."""

from __future__ import annotations

import contextlib
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from curation_env.errors import CurationError, OutOfMemory, StageFailed, StageTimeout, WorkerDied, by_code
from curation_env.scratch import Scratch
from curation_env.worker import OUT_OF_MEMORY_EXIT, frame, unframe

Progress = Callable[[dict[str, Any]], None]
LOG_TAIL = 4000
START_SECONDS = 180.0


class Stage(NamedTuple):
    """A unit of work: `name` in train, evaluate, signal, device; `payload` is JSON data with paths as strings."""

    name: str
    payload: dict[str, Any]


class Resources(NamedTuple):
    """What a stage may take (None: no limit): wall-clock seconds, private memory in MB on top of the warm worker's, and
    GiB of a GPU's memory.
    """

    timeout: float | None = None
    memory_mb: int | None = None
    gpu_memory_gib: float | None = None


class Executor(Protocol):
    def submit(
        self, stage: Stage, resources: Resources | None = None, on_progress: Progress | None = None
    ) -> Future[dict[str, Any]]:
        """Queue a stage; the future gives its result or raises its `CurationError`.

        `on_progress` is called from another thread with
        `{"stage", "done", "total", "unit", "seconds_left", ...}`.
        """

    def close(self) -> None:
        """Kill what runs and free everything; queued stages fail with `WorkerDied`. Idempotent."""


class _Job(NamedTuple):
    stage: Stage
    resources: Resources
    on_progress: Progress | None
    future: Future[dict[str, Any]]


class LocalExecutor:
    """One warm worker process on this machine; stages run one after the other.

    The worker is started on the first use (or by `start`), killed with its whole process group on a time-out or when it
    ran out of memory, and replaced when it died.

    Args:
        threads: Threads of the worker on a CPU. Other values than 1 may change the last bits of a result.
    """

    def __init__(self, threads: int = 1) -> None:
        self._threads = threads
        self._scratch: Scratch | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._pipes: Pipes | None = None
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._closed = False
        self._ready = False

    def start(self) -> None:
        """Start the worker now, without waiting for it: its imports take seconds."""
        with self._lock:
            if self._closed:
                raise WorkerDied("the executor is closed")
            if self._process is None:  # a dead one is replaced by the thread that reads its pipe
                self._spawn()
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, daemon=True, name="executor")
                self._thread.start()

    def submit(
        self, stage: Stage, resources: Resources | None = None, on_progress: Progress | None = None
    ) -> Future[dict[str, Any]]:
        self.start()
        future: Future[dict[str, Any]] = Future()
        self._jobs.put(_Job(stage, resources or Resources(), on_progress, future))
        return future

    @property
    def pid(self) -> int | None:
        """Process id of the worker, None when there is none."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def kill(self) -> None:
        """Kill the worker and its children: the stage that runs fails with `WorkerDied`."""
        if self._process is not None:
            _kill(self._process)

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self.kill()
            self._jobs.put(None)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        self._release()
        if self._scratch is not None:
            self._scratch.close()

    def __enter__(self) -> LocalExecutor:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _spawn(self) -> None:
        self._release()
        if self._scratch is None:
            self._scratch = Scratch()
        threads = str(self._threads)
        environment = os.environ | {
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
            "HF_DEACTIVATE_ASYNC_LOAD": "1",  # a thread that can't start for want of memory hangs its caller
            "PYTHONUNBUFFERED": "1",
            # Micro-batches differ in size: in fixed segments, a GPU's memory would go to pieces.
            "PYTORCH_ALLOC_CONF": os.environ.get("PYTORCH_ALLOC_CONF", "expandable_segments:True"),
        }
        self._ready = False
        self._process = subprocess.Popen(
            [sys.executable, "-m", "curation_env.worker", "--log", str(self._log)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,  # what `poll` sees is then all there is
            env=environment,
            start_new_session=True,
        )
        self._pipes = Pipes(self._process)

    @property
    def _log(self) -> Path:
        assert self._scratch is not None
        return self._scratch.path / "worker.log"

    def _release(self) -> None:
        if self._process is not None:
            for stream in (self._process.stdin, self._process.stdout):
                assert stream is not None
                with contextlib.suppress(OSError):
                    stream.close()

    def _serve(self) -> None:
        while (job := self._jobs.get()) is not None:
            if not job.future.set_running_or_notify_cancel():
                continue
            try:
                job.future.set_result(self._run(job))
            except BaseException as error:
                if not isinstance(error, CurationError) or isinstance(error, OutOfMemory):
                    self.kill()  # its state is unknown, or its memory in pieces
                job.future.set_exception(error)

    def _run(self, job: _Job) -> dict[str, Any]:
        with self._lock:
            if self._closed:
                raise WorkerDied("the executor was closed before the stage ran")
            if self._process is None or self._process.poll() is not None:
                self._spawn()
            process, pipes = self._process, self._pipes
        assert process is not None
        assert pipes is not None
        name, resources = job.stage.name, job.resources
        deadline = self._deadline(resources, 0.0 if self._ready else START_SECONDS)
        limits = {"memory_mb": resources.memory_mb, "gpu_memory_gib": resources.gpu_memory_gib}
        pipes.send({"stage": name, "payload": job.stage.payload, **limits})
        while True:
            try:
                message = pipes.receive(deadline)
                if message is not None and "progress" in message and _past(deadline):
                    raise TimeoutError  # it works, without end
            except TimeoutError:
                _kill(process)
                raise StageTimeout(f"{name} took longer than {resources.timeout:g} s", details=self._tail()) from None
            if message is None:
                raise self._death(process, name)
            if "ready" in message:
                self._ready = True
                deadline = self._deadline(resources, 0.0)
            elif "progress" in message and job.on_progress is not None:
                job.on_progress(message["progress"])
            elif "result" in message:
                return message["result"]
            elif "error" in message:
                raise self._error(message["error"])

    @staticmethod
    def _deadline(resources: Resources, start: float) -> float | None:
        """When a stage's time is up; a worker that has yet to import its libraries gets `start` seconds for that."""
        return None if resources.timeout is None else time.monotonic() + start + resources.timeout

    def _error(self, answer: dict[str, str]) -> CurationError:
        cls = by_code().get(answer["code"], StageFailed)
        return cls(answer["message"], details=f"{answer['details']}\n--- log ---\n{self._tail()}")

    def _tail(self) -> str:
        return self._log.read_bytes()[-LOG_TAIL:].decode(errors="replace") if self._log.exists() else ""

    def _death(self, process: subprocess.Popen[bytes], name: str) -> CurationError:
        """What a worker died of, after its pipe has closed."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5.0)  # a worker that is dying has its own reason, which `_kill` would hide
        _kill(process)
        code = process.wait()
        if code == OUT_OF_MEMORY_EXIT:
            return OutOfMemory(f"{name} ran out of memory", details=self._tail())
        if code == -signal.SIGKILL:
            reason = "killed (by the system when it is out of memory, or by a person)"
        else:
            reason = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return WorkerDied(f"the worker died during {name}: {reason}", details=self._tail())


class Pipes:
    """The two pipes of a worker, written and read without ever waiting past a deadline: it may stop anywhere, also in
    the middle of a message, and then neither takes nor gives another byte.
    """

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._in, self._out = process.stdin.fileno(), process.stdout.fileno()
        self._unsent: memoryview = memoryview(b"")
        self._received = bytearray()
        for descriptor in (self._in, self._out):
            os.set_blocking(descriptor, False)

    def send(self, message: dict[str, Any]) -> None:
        """Queue a message; it is written while `receive` waits for the answer."""
        self._unsent = memoryview(frame(message))

    def receive(self, deadline: float | None) -> dict[str, Any] | None:
        """Return the next message; None when the worker has closed its end.

        Raises:
            TimeoutError: There is no whole message at `deadline` (of `time.monotonic`).
        """
        while (message := unframe(self._received)) is None:
            poller = select.poll()
            poller.register(self._out, select.POLLIN)
            if self._unsent:
                poller.register(self._in, select.POLLOUT)
            left = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
            ready = dict(poller.poll(left))
            if not ready:
                raise TimeoutError
            if self._in in ready:
                self._write()
            if self._out in ready:
                part = os.read(self._out, 1 << 20)
                if not part:
                    return None
                self._received += part
        return message

    def _write(self) -> None:
        try:
            self._unsent = self._unsent[os.write(self._in, self._unsent[: 1 << 20]) :]
        except BlockingIOError:
            pass
        except BrokenPipeError:  # it is dead: its other pipe says so
            self._unsent = memoryview(b"")


def _past(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() > deadline


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a worker's process group and reap it; nothing when it is gone."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
