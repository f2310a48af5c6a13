"""Four processes through DeepSpeed take the same steps as one, to rounding."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families_support import make_qwen
from safetensors.torch import load_file
from training_support import make_init, make_pool, rows_of_every_kind

from curation_env.pool import Pool
from curation_env.training.data import Encoder, read_rows
from curation_env.training.recipe import Recipe
from curation_env.training.share import share
from curation_env.training.vlm import train, windows

WORLD = 4
# Replicas and ZeRO's stages, in fp32 and in bf16, and with a student whose tower trains.
SHARED = ("all 0", "half all 0", "qwen all 0", "1", "2", "3", "half 1", "half 2", "half 3", "qwen 2", "qwen 3")


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    """Small micro-batches: several a window, not equally many everywhere, some without an image."""
    changes = {"epochs": 2, "tokens_per_micro_batch": 60, "grad_clip": 0.5, "max_length": 48}
    return Recipe.load("mini-v1").model_copy(update=changes)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Results of one process ("0") and of four under each ZeRO stage, started once."""
    folder = tmp_path_factory.mktemp("engine")
    init = make_init(folder / "init", width=32, layers=2)
    pool = make_pool(folder / "pool", rows_of_every_kind(init, recipe))
    common: dict[str, Any] = {"init": str(init), "pool": str(pool), "ids": sorted(Pool.open(pool).ids)}
    common |= {"seed": 42, "device": "cpu"}
    half = recipe.model_copy(update={"precision": "bf16", "lr": 2e-5})
    results = {"0": train(**common, recipe=recipe, out=folder / "0")}
    results["half 0"] = train(**common, recipe=half, out=folder / "half 0")
    (folder / "qwen").mkdir()
    chat = Recipe.load("qwen2.5-vl-3b-v1").chat
    whole = {"chat": chat, "freeze": (), "image_pad": "none", "max_length": 256, "tokens_per_micro_batch": 250}
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
        (folder / name).mkdir()
        request = {"stage": "train", "payload": payload, "environment": {}, "watched": False, "gpu_memory_gib": None}
        (folder / name / "request.json").write_text(json.dumps(request))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(WORLD)]
    command += ["-m", "curation_env.launch", *(str(folder / name) for name in SHARED)]
    with open(folder / "log", "w") as log:
        launcher = subprocess.Popen(
            command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log, start_new_session=True
        )
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
    ("kind", "stage"),
    [(kind, stage) for kind in ("", "qwen ") for stage in ("all 0", "1", "2", "3") if f"{kind}{stage}" in SHARED],
)
def test_four_processes_equal_one(runs: dict[str, dict[str, Any]], kind: str, stage: str) -> None:
    one, two = runs[f"{kind}0"], runs[f"{kind}{stage}"]
    init = kind.strip() or "init"
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


@pytest.mark.parametrize("stage", ["all 0", "1", "2", "3"])
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


def test_windows_are_shared_out_evenly_and_processes_fit_each_other(tmp_path: Path, recipe: Recipe) -> None:
    init = make_init(tmp_path / "init", width=32, layers=2)
    pool = Pool.open(make_pool(tmp_path / "pool", rows_of_every_kind(init, recipe)))
    rows = Encoder.load(init, recipe).encode(read_rows(pool, sorted(pool.ids), {}))
    assert min(row.n_supervised for row in rows) == 1
    assert sum(len(row.tokens) == recipe.max_length for row in rows) >= 2
    steps = list(windows(len(rows), recipe, 42))
    assert len(steps[-1]) < WORLD
    spares = 0
    for window in steps:
        of_ranks = [share(rows, window, recipe, rank, WORLD) for rank in range(WORLD)]
        counted = [row.id for own in of_ranks for batch in own for row in batch.rows[: batch.counted]]
        assert sorted(counted) == sorted(rows[k].id for k in window)
        used = [sum(len(row.tokens) for batch in own for row in batch.rows[: batch.counted]) for own in of_ranks]
        if len(window) > WORLD:
            assert max(used) < 1.2 * np.mean(used)
        for together in zip(*of_ranks, strict=True):  # equally many micro-batches
            assert len({any(row.image is not None for row in batch.rows) for batch in together}) == 1
            assert all(batch.rows for batch in together)
            spares += sum(len(batch.rows) > batch.counted for batch in together)
    assert spares
