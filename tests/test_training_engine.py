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

# ZeRO stages, in fp32 and in bf16, and with a student whose tower trains.
SHARED = ("1", "2", "half 1", "half 2", "qwen 2")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Results of one process ("0") and of two under ZeRO stage 1 and 2, started once."""
    folder = tmp_path_factory.mktemp("engine")
    init = make_init(folder / "init", width=32, layers=2)
    pool = make_pool(folder / "pool", make_rows(40, text_only_every=2))
    # Small micro-batches: several a window, not equally many on both sides, some without an image.
    recipe = Recipe.load("mini-v1").model_copy(update={"epochs": 2, "tokens_per_micro_batch": 110, "grad_clip": 0.5})
    common: dict[str, Any] = {"init": str(init), "pool": str(pool), "ids": sorted(Pool.open(pool).ids)}
    common |= {"seed": 42, "device": "cpu"}
    half = recipe.model_copy(update={"precision": "bf16", "lr": 2e-5})
    results = {"0": train(**common, recipe=recipe, out=folder / "0")}
    results["half 0"] = train(**common, recipe=half, out=folder / "half 0")
    (folder / "qwen").mkdir()
    chat = Recipe.load("qwen2.5-vl-3b-v1").chat
    whole = {"chat": chat, "freeze": (), "image_pad": "none", "max_length": 256, "tokens_per_micro_batch": 500}
    qwen, of_qwen = recipe.model_copy(update=whole), {"init": str(make_qwen(folder / "qwen"))}
    results["qwen 0"] = train(**(common | of_qwen), recipe=qwen, out=folder / "qwen 0")
    recipes = {"half": half, "qwen": qwen}
    for name in SHARED:
        payload = common | (of_qwen if name.startswith("qwen") else {})
        payload |= {
            "recipe": recipes.get(name[:4], recipe).payload(),
            "zero_stage": int(name[-1]),
            "out": str(folder / name),
        }
        (folder / f"{name}.json").write_text(json.dumps(payload))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "curation_env.training.launch", *(str(folder / f"{name}.json") for name in SHARED)]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    with open(folder / "log", "w") as log:
        launcher = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            code = launcher.wait(240)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(launcher.pid, signal.SIGKILL)
    assert code == 0, (folder / "log").read_text()[-3000:]
    for name in SHARED:
        results[name] = json.loads((folder / name / "result.json").read_text())
    return results


def log_lines(result: dict[str, Any]) -> list[dict[str, Any]]:
    text = (Path(result["checkpoint"]).parent / "training.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize(
    ("alone", "together", "init"), [("0", "1", "init"), ("0", "2", "init"), ("qwen 0", "qwen 2", "qwen")]
)
def test_two_processes_equal_one(runs: dict[str, dict[str, Any]], alone: str, together: str, init: str) -> None:
    one, two = runs[alone], runs[together]
    assert two["steps"] == one["steps"] == 6
    for single, shared in zip(log_lines(one), log_lines(two), strict=True):
        assert shared["tokens"] == single["tokens"]
        assert shared["lr"] == single["lr"]
        assert shared["loss"] == pytest.approx(single["loss"], rel=1e-5)
        assert shared["grad_norm"] == pytest.approx(single["grad_norm"], rel=1e-4)
    a, b = (load_file(Path(result["checkpoint"]) / "model.safetensors") for result in (one, two))
    start = load_file(Path(one["checkpoint"]).parent.parent / init / "model.safetensors")
    for name in start:
        moved = (a[name] - start[name]).abs().max()
        assert (a[name] - b[name]).abs().max() <= 0.02 * moved + 1e-9, name
    assert any(not torch.equal(a[name], start[name]) for name in start)


@pytest.mark.parametrize("stage", ["1", "2"])
def test_half_precision_has_no_copies_in_full_precision(runs: dict[str, dict[str, Any]], stage: str) -> None:
    """Small updates are lost in bf16 weights; copies in fp32 would add them up until more weights change."""
    one, two = runs["half 0"], runs[f"half {stage}"]
    for single, shared in zip(log_lines(one), log_lines(two), strict=True):
        assert shared["loss"] == pytest.approx(single["loss"], rel=0.02)
    a, b = (load_file(Path(result["checkpoint"]) / "model.safetensors") for result in (one, two))
    start = load_file(Path(one["checkpoint"]).parent.parent / "init/model.safetensors")
    changed: dict[str, list[int]] = {"one": [], "two": [], "all": []}
    for name, tensor in start.items():
        if "vision_tower" not in name and tensor.ndim == 2:
            assert a[name].dtype == b[name].dtype == torch.bfloat16
            begun = tensor.to(torch.bfloat16)
            changed["one"].append(int((a[name] != begun).sum()))
            changed["two"].append(int((b[name] != begun).sum()))
            changed["all"].append(begun.numel())
    share_one, share_two = (sum(changed[key]) / sum(changed["all"]) for key in ("one", "two"))
    assert 0.05 < share_one < 0.95
    assert share_two == pytest.approx(share_one, abs=0.03)
