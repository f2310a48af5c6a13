"""The worker behind the executor: the same bits as a fresh process, and every way to die has its own error."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from evaluation_support import SUITE, make_suite
from safetensors.torch import load_file
from training_support import make_init, make_pool, make_rows

from curation_env.errors import (
    JudgeUnavailable,
    MissingAssets,
    OutOfMemory,
    StageFailed,
    StageTimeout,
    UnsupervisedRow,
    WorkerDied,
)
from curation_env.executor import LocalExecutor, Pipes, Resources, Stage
from curation_env.mini.judge import MODEL, serve
from curation_env.pool import Pool
from curation_env.training.recipe import Recipe


@pytest.fixture(scope="module")
def executor() -> Iterator[LocalExecutor]:
    with LocalExecutor() as executor:
        executor.start()
        yield executor


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("assets")
    return make_init(folder / "init", width=32, layers=2), make_pool(folder / "pool", make_rows(40))


def stage(assets: tuple[Path, Path], out: Path, *, epochs: int = 1, **changes: object) -> Stage:
    init, pool = assets
    recipe = Recipe.load("mini-v1").payload() | {"epochs": epochs}
    payload = {
        "init": str(init),
        "recipe": recipe,
        "pool": str(pool),
        "ids": sorted(Pool.open(pool).ids),
        "rewrites": {},
        "seed": 42,
        "device": "cpu",
        "out": str(out),
    }
    return Stage("train", payload | changes)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"


def wait_until(condition: object, seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():  # type: ignore[operator]
            return True
        time.sleep(0.02)
    return False


def test_a_warm_worker_repeats_itself_and_reports_progress(
    executor: LocalExecutor, assets: tuple[Path, Path], tmp_path: Path
) -> None:
    events: list[dict] = []
    first = executor.submit(stage(assets, tmp_path / "a"), on_progress=events.append).result()
    pid = executor.pid
    second = executor.submit(stage(assets, tmp_path / "b")).result()
    assert executor.pid == pid
    a, b = (load_file(Path(r["checkpoint"]) / "model.safetensors") for r in (first, second))
    assert all(a[name].equal(b[name]) for name in a)
    assert events[-1]["done"] == events[-1]["total"] == first["steps"] == 3
    assert events[-1]["stage"] == "train"
    with LocalExecutor() as fresh:
        third = fresh.submit(stage(assets, tmp_path / "c")).result()
    c = load_file(Path(third["checkpoint"]) / "model.safetensors")
    assert all(a[name].equal(c[name]) for name in a)


def test_a_stage_error_keeps_its_type_and_the_worker(
    executor: LocalExecutor, assets: tuple[Path, Path], tmp_path: Path
) -> None:
    executor.start()
    short = Recipe.load("mini-v1").payload() | {"max_length": 20}
    with pytest.raises(UnsupervisedRow, match="no supervised token"):
        executor.submit(stage(assets, tmp_path, recipe=short)).result()
    with pytest.raises(MissingAssets):
        executor.submit(stage(assets, tmp_path, init=str(tmp_path / "none"))).result()
    with pytest.raises(StageFailed, match="unknown") as caught:
        executor.submit(stage(assets, tmp_path, device="unknown")).result()
    assert "Traceback" in caught.value.details
    with pytest.raises(StageFailed, match="no stage"):
        executor.submit(Stage("bake", {})).result()
    assert executor.submit(stage(assets, tmp_path)).result()["steps"] == 3


def test_one_worker_serves_every_stage(executor: LocalExecutor, assets: tuple[Path, Path], tmp_path: Path) -> None:
    init, pool = assets
    make_suite(tmp_path / "suite")
    recipe = Recipe.load("mini-v1").payload()
    server = serve()
    evaluation = {
        "checkpoint": str(init),
        "recipe": recipe,
        "suite": SUITE,
        "suite_dir": str(tmp_path / "suite"),
        "judge": {"url": server.url, "model": MODEL, "key": ""},
        "device": "cpu",
        "out": str(tmp_path / "evaluation"),
    }
    signal_ = {"name": "loss", "init": str(init), "recipe": recipe, "pool": str(pool), "device": "cpu"}
    out = tmp_path / "loss.npy"
    futures = [
        executor.submit(Stage("evaluate", evaluation)),
        executor.submit(Stage("signal", {**signal_, "out": str(out)})),
        executor.submit(stage(assets, tmp_path / "train")),
        executor.submit(Stage("evaluate", evaluation)),
    ]
    first, price, trained, again = (future.result() for future in futures)
    assert first["scores"] == again["scores"]
    assert price["price"] > 0
    assert np.isfinite(np.load(out)).all()
    assert trained["steps"] == 3
    server.shutdown()
    server.server_close()
    with pytest.raises(JudgeUnavailable):
        executor.submit(Stage("evaluate", {**evaluation, "judge": None})).result()


def test_the_worker_stays_small(assets: tuple[Path, Path], tmp_path: Path) -> None:
    with LocalExecutor() as executor:  # a fresh one: what counts is the most that it ever used
        executor.submit(stage(assets, tmp_path)).result()
        status = Path(f"/proc/{executor.pid}/status").read_text()
        # Its own memory: how much of the libraries' files is mapped depends on what the machine has cached.
        own = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))
    assert own < 500_000


def test_a_worker_killed_in_the_middle_is_named_and_replaced(
    executor: LocalExecutor, assets: tuple[Path, Path], tmp_path: Path
) -> None:
    started = threading.Event()
    future = executor.submit(
        stage(assets, tmp_path, epochs=10_000), on_progress=lambda event: event["stage"] == "train" and started.set()
    )
    assert started.wait(30)
    pid = executor.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(WorkerDied, match="during train: killed"):
        future.result()
    assert not (tmp_path / "checkpoint").exists()
    assert executor.submit(stage(assets, tmp_path)).result()["steps"] == 3
    assert executor.pid != pid


def test_a_time_out_kills_the_worker(executor: LocalExecutor, assets: tuple[Path, Path], tmp_path: Path) -> None:
    events: list[dict] = []
    executor.kill()  # a cold worker: its start is not counted
    forever = stage(assets, tmp_path, epochs=10_000)
    future = executor.submit(forever, Resources(timeout=1.0), events.append)
    with pytest.raises(StageTimeout, match="longer than 1 s"):
        future.result()
    assert events
    assert executor.pid is None


def test_a_stopped_worker_that_reads_nothing_is_timed_out(
    executor: LocalExecutor, assets: tuple[Path, Path], tmp_path: Path
) -> None:
    executor.submit(stage(assets, tmp_path)).result()
    pid = executor.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    large = stage(assets, tmp_path, rewrites={"none": [{"user": "q" * 1_000_000, "assistant": "a"}]})  # no pipe's worth
    with pytest.raises(StageTimeout):
        executor.submit(large, Resources(timeout=0.3)).result(timeout=20)
    assert not alive(pid)


def test_a_message_that_stops_half_way_is_not_waited_for() -> None:
    script = "import sys, time; sys.stdout.write('\\0\\0\\0\\5{}'); sys.stdout.flush(); time.sleep(60)"
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    )
    try:
        with pytest.raises(TimeoutError):
            Pipes(process).receive(time.monotonic() + 0.5)
    finally:
        process.kill()
        process.wait()


def test_the_worker_says_what_it_computes_on(executor: LocalExecutor) -> None:
    assert executor.submit(Stage("device", {"device": "cpu"})).result() == {"type": "cpu", "name": ""}


def test_memory_is_limited_and_its_end_is_out_of_memory(
    executor: LocalExecutor, assets: tuple[Path, Path], tmp_path: Path
) -> None:
    large = Recipe.load("mini-v1").payload() | {"examples_per_step": 1600, "tokens_per_micro_batch": 1 << 20}
    ids = sorted(Pool.open(assets[1]).ids * 40)
    limit = Resources(memory_mb=50)
    executor.start()
    with pytest.raises(OutOfMemory, match="out of memory"):
        executor.submit(stage(assets, tmp_path, recipe=large, ids=ids), limit).result()
    assert not (tmp_path / "checkpoint").exists()
    assert executor.submit(stage(assets, tmp_path), limit).result()["steps"] == 3


def test_a_broken_pipe_is_a_dead_worker(executor: LocalExecutor, assets: tuple[Path, Path], tmp_path: Path) -> None:
    executor.submit(stage(assets, tmp_path)).result()
    pid = executor.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)  # it can't read any more: the request waits in the pipe
    future = executor.submit(stage(assets, tmp_path))
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(WorkerDied):
        future.result()


def test_close_fails_what_is_left_and_leaves_no_process(assets: tuple[Path, Path], tmp_path: Path) -> None:
    executor = LocalExecutor()
    running = executor.submit(stage(assets, tmp_path / "a", epochs=10_000))
    queued = executor.submit(stage(assets, tmp_path / "b"))
    assert wait_until(running.running)
    pid = executor.pid
    assert pid is not None
    executor.close()
    executor.close()
    assert not alive(pid)
    for future in (running, queued):
        with pytest.raises(WorkerDied):
            future.result(timeout=5)
    with pytest.raises(WorkerDied):
        executor.submit(stage(assets, tmp_path))


def test_the_worker_dies_with_its_parent(assets: tuple[Path, Path], tmp_path: Path) -> None:
    script = textwrap.dedent(
        """
        import sys, time, json
        from curation_env.executor import LocalExecutor, Stage
        executor = LocalExecutor()
        payload = json.loads(sys.argv[1])
        done = executor.submit(Stage("train", payload), on_progress=lambda e: print(executor.pid, flush=True))
        time.sleep(600)
        """
    )
    payload = json.dumps(stage(assets, tmp_path, epochs=10_000).payload)
    parent = subprocess.Popen([sys.executable, "-c", script, payload], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert alive(pid)
    parent.kill()
    parent.wait()
    try:
        assert wait_until(lambda: not alive(pid))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        parent.stdout.close()
