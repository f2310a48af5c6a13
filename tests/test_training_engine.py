"""Two processes through DeepSpeed take the same steps as one, to rounding."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_support import make_init, make_pool, make_rows

from curation_env.pool import Pool
from curation_env.training.recipe import Recipe
from curation_env.training.vlm import train


@pytest.mark.parametrize("zero_stage", [1, 2])
def test_two_processes_equal_one(zero_stage: int, tmp_path: Path) -> None:
    init = make_init(tmp_path / "init", width=32, layers=2)
    pool = make_pool(tmp_path / "pool", make_rows(40, text_only_every=2))
    ids = sorted(Pool.open(pool).ids)
    # Small micro-batches: several a window, not equally many on both sides, some without an image.
    recipe = Recipe.load("mini-v1").model_copy(update={"epochs": 2, "tokens_per_micro_batch": 110, "grad_clip": 0.5})
    one = train(init=init, recipe=recipe, pool=pool, ids=ids, seed=42, out=tmp_path / "one", device="cpu")
    payload = {
        "init": str(init),
        "recipe": recipe.payload(),
        "pool": str(pool),
        "ids": ids,
        "seed": 42,
        "device": "cpu",
        "out": str(tmp_path / "two"),
        "zero_stage": zero_stage,
    }
    (tmp_path / "payload.json").write_text(json.dumps(payload))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    module = ["-m", "curation_env.training.launch", str(tmp_path / "payload.json"), str(tmp_path / "result.json")]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    with open(tmp_path / "log", "w") as log:
        run = subprocess.Popen([*launcher, *module], env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            code = run.wait(180)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGKILL)
    assert code == 0, (tmp_path / "log").read_text()[-3000:]
    two = json.loads((tmp_path / "result.json").read_text())
    assert two["steps"] == one["steps"] == 6
    logs = [[json.loads(line) for line in (tmp_path / name / "training.jsonl").open()] for name in ("one", "two")]
    for single, shared in zip(*logs, strict=True):
        assert shared["tokens"] == single["tokens"]
        assert shared["lr"] == single["lr"]
        assert shared["loss"] == pytest.approx(single["loss"], rel=1e-4)
        assert shared["grad_norm"] == pytest.approx(single["grad_norm"], rel=1e-3)
    start = load_file(init / "model.safetensors")
    a, b = (load_file(Path(result["checkpoint"]) / "model.safetensors") for result in (one, two))
    for name in start:
        moved = (a[name] - start[name]).abs().max()
        assert (a[name] - b[name]).abs().max() <= 0.02 * moved + 1e-9, name
    assert any(not torch.equal(a[name], start[name]) for name in start)
