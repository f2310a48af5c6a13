"""Two processes through DeepSpeed take the same steps as one, to rounding."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families_support import make_qwen
from safetensors.torch import load_file
from training_support import make_init, make_pool, make_rows

from curation_env.pool import Pool
from curation_env.training.recipe import Recipe
from curation_env.training.vlm import train


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Results of one process ("0") and of two under ZeRO stage 1 and 2, started once.

    "qwen-0" and "qwen-2" are those of a student whose vision tower trains.
    """
    folder = tmp_path_factory.mktemp("engine")
    init = make_init(folder / "init", width=32, layers=2)
    pool = make_pool(folder / "pool", make_rows(40, text_only_every=2))
    # Small micro-batches: several a window, not equally many on both sides, some without an image.
    recipe = Recipe.load("mini-v1").model_copy(update={"epochs": 2, "tokens_per_micro_batch": 110, "grad_clip": 0.5})
    common: dict[str, Any] = {"init": str(init), "pool": str(pool), "ids": sorted(Pool.open(pool).ids)}
    common |= {"seed": 42, "device": "cpu"}
    results = {"0": train(**common, recipe=recipe, out=folder / "0")}
    for stage in ("1", "2"):
        payload = common | {"recipe": recipe.payload(), "zero_stage": int(stage), "out": str(folder / stage)}
        (folder / f"{stage}.json").write_text(json.dumps(payload))
    (folder / "qwen").mkdir()
    common |= {"init": str(make_qwen(folder / "qwen"))}
    chat = Recipe.load("qwen2.5-vl-3b-v1").chat
    whole = {"chat": chat, "freeze": (), "image_pad": "none", "max_length": 256, "tokens_per_micro_batch": 500}
    recipe = recipe.model_copy(update={"epochs": 1, **whole})
    results["qwen-0"] = train(**common, recipe=recipe, out=folder / "qwen-0")
    payload = common | {"recipe": recipe.payload(), "zero_stage": 2, "out": str(folder / "qwen-2")}
    (folder / "qwen-2.json").write_text(json.dumps(payload))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    jobs = ("1", "2", "qwen-2")
    command += ["-m", "curation_env.training.launch", *(str(folder / f"{job}.json") for job in jobs)]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    with open(folder / "log", "w") as log:
        launcher = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            code = launcher.wait(240)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(launcher.pid, signal.SIGKILL)
    assert code == 0, (folder / "log").read_text()[-3000:]
    for job in jobs:
        results[job] = json.loads((folder / job / "result.json").read_text())
    return results


def log_lines(result: dict[str, Any]) -> list[dict[str, Any]]:
    text = (Path(result["checkpoint"]).parent / "training.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize(
    ("single", "shared", "init", "steps"),
    [("0", "1", "init", 6), ("0", "2", "init", 6), ("qwen-0", "qwen-2", "qwen", 3)],
)
def test_two_processes_equal_one(
    runs: dict[str, dict[str, Any]], single: str, shared: str, init: str, steps: int
) -> None:
    one, two = runs[single], runs[shared]
    assert two["steps"] == one["steps"] == steps
    for alone, together in zip(log_lines(one), log_lines(two), strict=True):
        assert together["tokens"] == alone["tokens"]
        assert together["lr"] == alone["lr"]
        assert together["loss"] == pytest.approx(alone["loss"], rel=1e-5)
        assert together["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-4)
    a, b = (load_file(Path(result["checkpoint"]) / "model.safetensors") for result in (one, two))
    start = load_file(Path(one["checkpoint"]).parent.parent / init / "model.safetensors")
    for name in start:
        moved = (a[name] - start[name]).abs().max()
        assert (a[name] - b[name]).abs().max() <= 0.02 * moved + 1e-9, name
    assert any(not torch.equal(a[name], start[name]) for name in start)
