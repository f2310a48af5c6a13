"""One of several processes that run a stage together, as a launcher starts it: `python -m curation_env.launch FOLDER`.

A folder holds `request.json`: the stage, its payload, and the environment of the worker that asks. The first process
writes progress, a JSON line each, into `progress.jsonl`, and the stage's result into `result.json`; one that fails
leaves `error-RANK.json`. Several folders are worked on one after the other. See `curation_env.group`.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

#: Seconds without a sign of life from the worker after which a process on another host ends.
SILENCE_SECONDS = 120.0
_PR_SET_PDEATHSIG = 1


def main() -> None:
    folders = [Path(argument) for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    _end_with_the_launcher()
    rank = int(os.environ["RANK"])
    for folder in folders:
        request = json.loads((folder / "request.json").read_text())
        os.environ.update(request["environment"])
        if request["watched"]:
            threading.Thread(target=_watch, args=(folder / "alive",), daemon=True, name="worker-watch").start()
        try:
            result = _run(request, folder / "progress.jsonl" if rank == 0 else None)
        except Exception as error:
            _leave_error(folder, rank, request["stage"], error)
        else:
            if rank == 0:
                write(folder / "result.json", result)
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def write(path: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(value))
    partial.replace(path)


def _run(request: dict[str, Any], progress: Path | None) -> dict[str, Any]:
    import torch

    from curation_env.training.plan import limit_gpu
    from curation_env.worker import exit_when_a_thread_has_no_memory, run_stage, throttled

    exit_when_a_thread_has_no_memory()
    limit_gpu(request["gpu_memory_gib"])
    payload = request["payload"]
    if payload.get("device") != "cpu" and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        torch.set_num_threads(1)

    def tell(event: dict[str, Any]) -> None:
        if progress is not None:
            with open(progress, "a") as lines:
                lines.write(json.dumps(event) + "\n")

    return run_stage(request["stage"], payload, throttled(tell))


def _leave_error(folder: Path, rank: int, stage: str, error: Exception) -> None:
    """Say what went wrong and end at once: what is left of the group's connections would be waited for."""
    import torch

    from curation_env.errors import WorkerDied
    from curation_env.worker import as_curation_error

    cause = as_curation_error(error, stage)
    if isinstance(error, torch.distributed.DistError) or "losed by peer" in str(error) or "reset by peer" in str(error):
        cause = WorkerDied(f"another process of the group is gone: {error}", details=cause.details)
    answer = {"code": cause.code, "message": str(cause), "details": cause.details, "time": time.time()}
    write(folder / f"error-{rank}.json", answer)
    sys.stderr.write(f"process {rank}: {cause.details}\n")
    sys.stderr.flush()
    os._exit(1)


def _end_with_the_launcher() -> None:
    """Have the system kill this process when the one that started it is gone."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent or parent == 1:
        os._exit(1)


def _watch(alive: Path) -> None:
    """End when the worker, maybe on another host, has given no sign of life for long. Clocks of hosts may differ."""
    seen, since = -1.0, time.monotonic()
    while time.monotonic() - since < SILENCE_SECONDS:
        try:
            now = alive.stat().st_mtime
        except OSError:
            now = seen
        if now != seen:
            seen, since = now, time.monotonic()
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
