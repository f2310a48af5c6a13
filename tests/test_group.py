"""Processes that share training and evaluation: the environment's scores are those of one, errors keep their cause."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from training_support import make_init, make_pool, make_rows

from curation_env.actions import policy
from curation_env.errors import InvalidSetting, NonFiniteLoss, StageTimeout, WorkerDied
from curation_env.executor import LocalExecutor, Resources, Stage
from curation_env.group import Group, run_group
from curation_env.pool import Pool
from curation_env.training.recipe import Recipe
from curation_env.training.vlm import train

PAIR = list(Group(processes=2))


def ranks(worker: int | None) -> list[int]:
    """The processes that a worker started, by their ids."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((place / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent == worker and b"curation_env.launch" in (place / "cmdline").read_bytes():
                found.append(int(place.name))
        except OSError:
            continue
    return sorted(found)


def gone(pid: int, seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


@pytest.fixture(scope="module")
def executor() -> Iterator[LocalExecutor]:
    with LocalExecutor() as executor:
        yield executor


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("assets")
    return make_init(folder / "init", width=32, layers=2), make_pool(folder / "pool", make_rows(40))


def stage(assets: tuple[Path, Path], out: Path, **changes: Any) -> Stage:
    init, pool = assets
    recipe = Recipe.load("mini-v1").payload() | {"epochs": 1} | changes
    payload = {"init": str(init), "recipe": recipe, "pool": str(pool), "ids": sorted(Pool.open(pool).ids), "seed": 42}
    return Stage("train", {**payload, "device": "cpu", "out": str(out), "group": PAIR})


def test_two_processes_of_an_environment_score_as_one_and_a_killed_one_is_named(
    nano: Callable[..., Any], random_policy: str
) -> None:
    """Training and evaluation are shared; of a killed process nothing is left but the error, after a second attempt."""
    infos, stages, killed = [], set(), []

    def watch(event: dict[str, Any]) -> None:
        stages.add(event["stage"])
        if len(infos) == 2 and event["stage"] == "images":
            killed.append(ranks(env.unwrapped._executor.pid)[0])
            os.kill(killed[-1], signal.SIGKILL)

    for processes in (1, 2):
        env = nano(device="cpu", processes=processes, cache=False, sandbox="none")
        env.unwrapped.on_progress = watch
        _, start = env.reset(seed=0)
        _, _, _, _, scored = env.step(policy(random_policy))
        infos.append([{key: value for key, value in info.items() if key != "commit"} for info in (start, scored)])
    assert infos[0] == infos[1]
    assert infos[1][1]["status"] == "scored"
    assert {"images", "train", "evaluate", "judge"} <= stages
    with pytest.raises(WorkerDied, match=r"train: process [01] of 2 died: signal SIGKILL"):
        env.step(policy(random_policy))
    assert len(killed) >= 2
    assert not ranks(env.unwrapped._executor.pid)


def test_errors_and_time_outs_of_a_group_are_those_of_a_worker_and_leave_nothing(
    executor: LocalExecutor, assets: tuple[Path, Path], tmp_path: Path
) -> None:
    wild = stage(assets, tmp_path, lr=1e38, epochs=4, grad_clip=1e30)
    with pytest.raises(NonFiniteLoss, match="at step") as caught:
        executor.submit(wild).result()
    assert "rows of the window" in caught.value.details
    assert {path.name for path in tmp_path.iterdir()} == {"training.jsonl"}

    future = executor.submit(stage(assets, tmp_path, epochs=10_000), Resources(timeout=3.0))
    while len(started := ranks(executor.pid)) < 2 and not future.done():
        time.sleep(0.05)
    with pytest.raises(StageTimeout):
        future.result()
    assert len(started) == 2
    assert all(gone(pid) for pid in started)
    assert not (tmp_path / "checkpoint").exists()


#: In place of ssh: the other machines are this one.
SSH = """#!/bin/sh
while [ "${1#-}" != "$1" ]; do
  case "$1" in -o|-p|-i) shift 2 ;; *) shift ;; esac
done
shift
exec sh -c "$*"
"""


def test_the_machines_of_a_hostfile_train_as_one_process(
    assets: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed's launcher and pdsh start a process on each of two machines, which find each other."""
    programs, hosts = tmp_path / "bin", tmp_path / "hosts"
    programs.mkdir()
    (programs / "ssh").write_text(SSH)
    (programs / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    hosts.write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    payload = dict(stage(assets, tmp_path / "together").payload)
    del payload["group"]
    events: list[dict[str, Any]] = []
    group = Group.checked(1, hosts, 0)
    together = run_group(group, "train", payload, events.append)
    recipe = Recipe.model_validate(payload["recipe"])
    alone = train(**{**payload, "recipe": recipe, "out": tmp_path / "alone"})
    assert together["final_loss"] == pytest.approx(alone["final_loss"], rel=1e-5)
    assert Path(together["checkpoint"], "model.safetensors").is_file()
    assert {event["stage"] for event in events} >= {"images", "train"}
    (programs / "ssh").write_text("#!/bin/sh\nexit 255\n")
    with pytest.raises(WorkerDied, match="not reachable via ssh"):
        run_group(group, "train", payload, events.append)


def test_settings_are_checked_where_they_are_given(nano: Callable[..., Any], tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("# two machines\nfirst slots=8\nsecond slots=4\n")
    assert Group.checked(1, hosts, 1).processes == 12
    assert Group.checked(1, hosts, 1).shared
    assert not Group.checked(1, None, 2).shared
    wrong = {"processes": 0, "zero_stage": 4, "hostfile": str(tmp_path / "nowhere")}
    for name, value in wrong.items():
        with pytest.raises(InvalidSetting, match=name):
            nano(**{name: value})
    hosts.write_text("first 8\n")
    with pytest.raises(InvalidSetting, match="slots=N"):
        nano(hostfile=hosts)
    with pytest.raises(InvalidSetting, match="not both"):
        nano(hostfile=hosts, processes=2)
