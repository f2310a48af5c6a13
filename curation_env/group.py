"""Stages that several processes run together: started by the worker, relayed, and ended with it.

On this machine PyTorch's elastic agent (that of `torchrun`) starts them; DeepSpeed's launcher does on the machines of a
hostfile. They and the worker share a folder of the stage's own, `out/.group-*`: see `curation_env.launch`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from curation_env.errors import CurationError, InvalidSetting, OutOfMemory, StageFailed, WorkerDied, by_code
from curation_env.launch import write
from curation_env.worker import OUT_OF_MEMORY_EXIT

Progress = Callable[[dict[str, Any]], None]
MODULE = "curation_env.launch"
RELAY_SECONDS = 0.1
#: What a process elsewhere needs of the worker's environment.
ENVIRONMENT = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "TOKENIZERS_PARALLELISM",
    "HF_HUB_OFFLINE",
    "HF_DATASETS_OFFLINE",
    "CUBLAS_WORKSPACE_CONFIG",
    "HF_DEACTIVATE_ASYNC_LOAD",
    "PYTHONUNBUFFERED",
)
STAGES = (0, 1, 2, 3)


class Group(NamedTuple):
    """How many processes train and evaluate together, and where.

    Attributes:
        processes: On this machine: one a GPU.
        hostfile: Machines and their GPUs, a line `HOST slots=N` each, in place of `processes`.
        zero_stage: What processes share out besides rows while they train: nothing (0), or by DeepSpeed's ZeRO the
            optimizer's moments (1), the gradients too (2), the weights too (3).
        gpu_memory_gib: What each may take of its GPU; None: all that is free.
    """

    processes: int = 1
    hostfile: str | None = None
    zero_stage: int = 0
    gpu_memory_gib: float | None = None

    @classmethod
    def checked(cls, processes: int, hostfile: str | Path | None, zero_stage: int) -> Group:
        """A group of valid settings.

        Raises:
            InvalidSetting: One of them can't be.
        """
        if isinstance(processes, bool) or not isinstance(processes, int) or processes < 1:
            raise InvalidSetting(f"processes must be a whole number from 1, not {processes!r}")
        if isinstance(zero_stage, bool) or zero_stage not in STAGES:
            raise InvalidSetting(f"zero_stage must be 0, 1, 2 or 3, not {zero_stage!r}")
        if hostfile is None:
            return cls(processes, None, zero_stage)
        if processes != 1:
            raise InvalidSetting("give processes or a hostfile, whose slots say how many there are, not both")
        path = Path(hostfile).absolute()
        return cls(slots(path), str(path), zero_stage)

    @property
    def shared(self) -> bool:
        """Whether stages run in processes of their own."""
        return self.processes > 1 or self.hostfile is not None


ALONE = Group()


def slots(hostfile: Path) -> int:
    """Processes of a hostfile.

    Raises:
        InvalidSetting: It is not there, or a line is not `HOST slots=N`.
    """
    try:
        lines = [line.partition("#")[0].split() for line in hostfile.read_text().splitlines()]
    except OSError as error:
        raise InvalidSetting(f"the hostfile can't be read: {error}") from error
    count = 0
    for line in filter(None, lines):
        if len(line) != 2 or not line[1].startswith("slots=") or not line[1][6:].isdigit():
            raise InvalidSetting(f"{hostfile}: a line must be `HOST slots=N`, not {' '.join(line)!r}")
        count += int(line[1][6:])
    if not count:
        raise InvalidSetting(f"{hostfile} names no host")
    return count


def run_group(group: Group, stage: str, payload: dict[str, Any], on_progress: Progress) -> dict[str, Any]:
    """Run a stage in the group's processes and return what the first one returns.

    Args:
        payload: JSON data; its `out` is a folder that all processes see.

    Raises:
        InvalidSetting: There are fewer GPUs than processes.
        CurationError: What went wrong in the process that failed first, by its cause.
        WorkerDied: One of them was killed, or ended without a word.
    """
    _check_gpus(group, payload["device"])
    out = Path(payload["out"])
    out.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".group-", dir=out))
    try:
        environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
        request = {
            "stage": stage,
            "payload": payload,
            "environment": environment,
            "gpu_memory_gib": group.gpu_memory_gib,
            "watched": group.hostfile is not None,
        }
        write(folder / "request.json", request)
        with _relayed(folder, on_progress):
            died = _on_hosts(group.hostfile, folder) if group.hostfile else _here(group.processes, folder)
        if died is not None or not (folder / "result.json").is_file():
            raise _cause(folder, stage, died)
        return json.loads((folder / "result.json").read_text())
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check_gpus(group: Group, device: str) -> None:
    import torch

    if device == "cpu" or group.hostfile is not None or (device == "auto" and not torch.cuda.is_available()):
        return
    if (there := torch.cuda.device_count()) < group.processes:
        raise InvalidSetting(f"{group.processes} processes need as many GPUs, and there are {there}: lower processes")
    torch.cuda.empty_cache()  # what the worker holds of the first GPU


def _here(processes: int, folder: Path) -> CurationError | None:
    """Run the processes on this machine; return what one died of, where it could not say so itself."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        logs_specs=DefaultLogsSpecs(log_dir=str(folder / "logs")),
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
    )
    with _kept_signals():
        try:
            elastic_launch(config, sys.executable)("-m", MODULE, str(folder))
        except ChildFailedError as error:
            for rank, failure in sorted(error.failures.items()):
                if failure.exitcode == OUT_OF_MEMORY_EXIT:
                    return OutOfMemory(f"process {rank} of {processes} ran out of memory")
                if failure.exitcode < 0:
                    return WorkerDied(f"process {rank} of {processes} died: signal {failure.signal_name()}")
            return WorkerDied(f"one of {processes} processes died")
    return None


@contextlib.contextmanager
def _kept_signals() -> Iterator[None]:
    """The agent takes signals over and does not give them back."""
    names = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    before = {name: signal.getsignal(name) for name in names}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def _on_hosts(hostfile: str, folder: Path) -> CurationError | None:
    """Run the processes on the machines of a hostfile; return what the launcher ended with, where it failed."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", hostfile, "--master_port", str(port)]
    said = folder / "launcher.log"
    with said.open("wb") as log:
        code = subprocess.run(
            [*command, "--module", MODULE, str(folder)], stdin=subprocess.DEVNULL, stdout=log, stderr=log
        ).returncode
    text = said.read_text(errors="replace").strip()
    sys.stderr.write(f"{text}\n")
    if not code:
        return None
    last = text.splitlines()[-1] if text else "it said nothing"
    return WorkerDied(f"DeepSpeed's launcher ended with exit code {code}: {last}")


@contextlib.contextmanager
def _relayed(folder: Path, on_progress: Progress) -> Iterator[None]:
    """Pass the processes' progress on while the block runs, and let them see that this process lives."""
    ended = threading.Event()

    def relay() -> None:
        (folder / "progress.jsonl").touch()
        with open(folder / "progress.jsonl") as lines:
            part = ""
            while True:
                last = ended.wait(RELAY_SECONDS)
                (folder / "alive").touch()
                while part := part + lines.readline():
                    if not part.endswith("\n"):
                        break
                    on_progress(json.loads(part))
                    part = ""
                if last:
                    return

    thread = threading.Thread(target=relay, name="relay", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _cause(folder: Path, stage: str, died: CurationError | None) -> CurationError:
    """What a group failed of: a process that was killed, else the first that said what was wrong with itself."""
    said = [json.loads(path.read_text()) for path in folder.glob("error-*.json")]
    own = sorted((answer for answer in said if answer["code"] != WorkerDied.code), key=lambda answer: answer["time"])
    if own:
        answer = own[0]
        return by_code().get(answer["code"], StageFailed)(answer["message"], details=answer["details"])
    if died is not None:
        return type(died)(f"{stage}: {died}", details="\n".join(answer["details"] for answer in said))
    return StageFailed(f"the processes of {stage} ended without a result")
