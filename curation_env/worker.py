"""The worker: a warm process that trains, evaluates and computes signals, one request at a time.

`python -m curation_env.worker --log FILE` speaks length-prefixed JSON (4 bytes, big-endian, then UTF-8) over its
standard input and output; whatever else prints goes to the log. It leads its own process group and dies with its
parent: a closed input kills the group, also in the middle of a stage. A request is
`{"stage", "payload", "memory_mb", "gpu_memory_gib"}`; the answers are `{"progress": {...}}` lines, then one
`{"result": {...}}` or `{"error": {"code", "message", "details"}}`. What is kept between requests is keyed by content,
so that a warm worker and a fresh one give the same bits.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import resource
import select
import signal
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import IO, Any

from curation_env.errors import CurationError, OutOfMemory, StageFailed

Progress = Callable[[dict[str, Any]], None]
MAX_MESSAGE = 1 << 30
OUT_OF_MEMORY_EXIT = 77
MEMORY_SIGNS = ("t allocate memory", "out of memory", "not enough memory", "std::bad_alloc", "can't start new thread")
GPU_MEMORY_SIGNS = ("out of memory", "ALLOC_FAILED")


def read_message(stream: IO[bytes]) -> dict[str, Any] | None:
    """Read one message; None at the end of the stream, also when it ends within a message."""
    header = _read(stream, 4)
    if header is None:
        return None
    (length,) = struct.unpack(">I", header)
    if length > MAX_MESSAGE:
        raise ValueError(f"a message of {length} bytes")
    body = _read(stream, length)
    return None if body is None else json.loads(body)


def _read(stream: IO[bytes], size: int) -> bytes | None:
    parts, left = [], size
    while left:
        part = stream.read(left)
        if not part:
            return None
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def frame(message: dict[str, Any]) -> bytes:
    """One message as it goes over a pipe."""
    body = json.dumps(message).encode()
    return struct.pack(">I", len(body)) + body


def unframe(received: bytearray) -> dict[str, Any] | None:
    """Take the first message off what was received; None while it is not whole.

    Raises:
        ValueError: It is longer than any message.
    """
    if len(received) < 4:
        return None
    (length,) = struct.unpack_from(">I", received)
    if length > MAX_MESSAGE:
        raise ValueError(f"a message of {length} bytes")
    if len(received) < 4 + length:
        return None
    message = json.loads(received[4 : 4 + length])
    del received[: 4 + length]
    return message


def write_message(stream: IO[bytes], message: dict[str, Any]) -> None:
    """Write one message and flush it."""
    left = memoryview(frame(message))
    while left:
        left = left[stream.write(left) :]
    stream.flush()


def run_stage(name: str, payload: dict[str, Any], on_progress: Progress) -> dict[str, Any]:
    """Run a stage in this process; see the design for the payloads.

    Raises:
        CurationError: What went wrong, by its cause.
    """
    from curation_env.group import Group, run_group
    from curation_env.training.recipe import Recipe

    payload = dict(payload)
    group = Group(*payload.pop("group", ()))
    if name == "train" and group.shared:
        return run_group(group, name, {**payload, "zero_stage": group.zero_stage}, on_progress)
    if name == "train":
        from curation_env.training.vlm import train

        recipe = Recipe.model_validate(payload["recipe"])
        return train(**{**payload, "recipe": recipe}, on_progress=on_progress)
    if name in ("evaluate", "answer", "answer_share", "grade"):
        from curation_env.evaluation import run
        from curation_env.evaluation.judge import Endpoint
        from curation_env.evaluation.suite import Suite

        known: dict[str, Any] = {"suite": Suite.model_validate(payload["suite"])}
        if name != "grade":
            known["recipe"] = Recipe.model_validate(payload["recipe"])
        if name == "answer_share":
            return run.answer_share(**{**payload, **known}, on_progress=on_progress)
        known["judge"] = Endpoint(**payload["judge"]) if payload.get("judge") else None
        if name == "grade":
            return run.grade(**{**payload, **known}, on_progress=on_progress)
        known["group"] = group if group.shared else None
        half = run.answer if name == "answer" else run.evaluate
        return half(**{**payload, **known}, on_progress=on_progress)
    if name == "signal":
        from curation_env.training.signals import signal_stage

        return signal_stage(**{**payload, "recipe": Recipe.model_validate(payload["recipe"])}, on_progress=on_progress)
    if name == "device":
        return place_of(payload["device"])
    raise StageFailed(f"there is no stage {name!r}")


def throttled(tell: Progress) -> Progress:
    """Tell how far a stage is ten times a second at most, and always that it is over."""
    sent = 0.0

    def on_progress(event: dict[str, Any]) -> None:
        nonlocal sent
        if event["done"] == event["total"] or time.monotonic() - sent > 0.1:
            sent = time.monotonic()
            tell(event)

    return on_progress


def place_of(device: str) -> dict[str, str]:
    """What a stage on `device` ("cpu", "cuda" or "auto") computes on: `type`, and `name`, the model of a GPU."""
    import torch

    from curation_env.training.model import resolve_device

    place = resolve_device(device)
    return {"type": place.type, "name": torch.cuda.get_device_name(place) if place.type == "cuda" else ""}


def as_curation_error(error: BaseException, stage: str) -> CurationError:
    """Name the cause of any exception of a stage, with its traceback as details."""
    import torch

    text = "".join(traceback.format_exception(error))
    if isinstance(error, CurationError):
        error.details = error.details or text
        return error
    said = next(iter(str(error).splitlines()), "") or type(error).__name__
    if isinstance(error, torch.OutOfMemoryError) or ("CUDA" in said and any(sign in said for sign in GPU_MEMORY_SIGNS)):
        return OutOfMemory(gpu_memory_message(stage, said), details=text)
    if isinstance(error, MemoryError) or any(sign in str(error) for sign in MEMORY_SIGNS):
        return OutOfMemory(f"{stage} ran out of memory: {said}", details=text)
    return StageFailed(f"{type(error).__name__}: {error}", details=text)


def gpu_memory_message(stage: str, said: str) -> str:
    """What there is to say where a GPU's memory is used up: on which card, what was asked for, what to do."""
    import torch

    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "the GPU"
    short, found, _ = said.partition(" is free.")  # what follows counts the same memory in other ways
    return (
        f"{stage} ran out of the memory of {card}: {short + found} Nothing of it was kept. Let nothing else use the "
        "card, or set gpu_memory_gib to less than it has: less is then computed at a time"
    )


@contextlib.contextmanager
def memory_limit(memory_mb: int | None) -> Iterator[None]:
    """Cap the private memory (RLIMIT_DATA) that a stage may take on top of the warm worker's."""
    if memory_mb is None:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    with open("/proc/self/status") as status:
        used = next(int(line.split()[1]) << 10 for line in status if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (used + (memory_mb << 20), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def die_with_parent(descriptor: int) -> None:
    """Kill the process group as soon as nobody holds the other end of the request pipe."""

    def watch() -> None:
        poller = select.poll()
        poller.register(descriptor, 0)  # a hang-up is always reported
        poller.poll()
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="parent-watch").start()


def exit_when_a_thread_has_no_memory() -> None:
    """A thread that can't even start leaves whoever waits for it hanging: better no process than that one."""
    report = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if unraisable.exc_type is MemoryError:
            os._exit(OUT_OF_MEMORY_EXIT)
        report(unraisable)

    sys.unraisablehook = hook


def warm_up() -> None:
    """Import what every stage needs; one thread on a CPU, which is both faster here and the same every time."""
    import datasets  # noqa: F401
    import torch
    from transformers import AutoTokenizer, LlavaForConditionalGeneration  # noqa: F401

    import curation_env.evaluation.run
    import curation_env.training.vlm  # noqa: F401

    torch.set_num_threads(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log", required=True, help="file that everything printed is appended to")
    arguments = parser.parse_args()
    requests = os.fdopen(os.dup(0), "rb")
    answers = os.fdopen(os.dup(1), "wb")
    log = os.open(arguments.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if os.getpgrp() != os.getpid():
        os.setpgrp()
    die_with_parent(requests.fileno())
    exit_when_a_thread_has_no_memory()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s %(message)s", stream=sys.stderr)
    warm_up()
    from curation_env.training.plan import limit_gpu

    write_message(answers, {"ready": os.getpid()})
    while (request := read_message(requests)) is not None:
        on_progress = throttled(lambda event: write_message(answers, {"progress": event}))
        try:
            limit_gpu(request.get("gpu_memory_gib"))
            with memory_limit(request.get("memory_mb")):
                answer = {"result": run_stage(request["stage"], request["payload"], on_progress)}
        except Exception as error:  # whatever a stage raises is answered by its cause
            cause = as_curation_error(error, request["stage"])
            answer = {"error": {"code": cause.code, "message": str(cause), "details": cause.details}}
        write_message(answers, answer)


if __name__ == "__main__":
    main()
