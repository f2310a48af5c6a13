"""How training speed grows with GPUs: LLaVA-1.5-7B with random weights, one process and one a GPU.

    python experiments/benchmarks/scaling_gpu.py                # ZeRO-1, as the environment does it
    python experiments/benchmarks/scaling_gpu.py --zero 1 2 3

Every measurement is a fresh group of processes with the engine that training uses and the rows of train_gpu.py, at an
equal number of steps. Prints tokens a second, the factor over one process, and the peak of memory of the first GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
from random_student import LLAVA, random_student
from train_gpu import make_rows

from curation_env.training import engine as engines
from curation_env.training.images import KeptFeatures
from curation_env.training.model import Student
from curation_env.training.recipe import Recipe
from curation_env.training.vlm import windows


def work(zero: int, warm: int, steps: int, layers: int, out: Path) -> None:
    """One process: `steps` timed steps after `warm` ones; the first writes what they took."""
    rank, world = engines.rank_and_world()
    device = torch.device("cuda", rank)
    if world > 1:
        engines.join(device)
    recipe = Recipe.load("llava-1.5-7b-v1")
    torch.manual_seed(0)
    student = Student.of(random_student(LLAVA, device, layers), recipe, device, "packed")
    rows = make_rows(recipe.examples_per_step * (warm + steps))
    # Features as the tower makes them; what it takes is in train_gpu.py's figures.
    one = torch.randn(576, student.parts.values_per_token, device=device, dtype=torch.bfloat16)
    features = KeptFeatures({row.image: one for row in rows if row.image is not None})
    engine = engines.make(student, recipe, rows, features, zero)
    seconds, tokens = 0.0, 0
    for k, window in enumerate(windows(len(rows), recipe, 42)):
        torch.cuda.synchronize()
        started = time.perf_counter()
        engine.step(window, 1e-5)
        torch.cuda.synchronize()
        if k >= warm:
            seconds += time.perf_counter() - started
            tokens += sum(len(rows[i].tokens) for i in window)
    if rank == 0:
        peak = torch.cuda.max_memory_allocated() / 2**30
        out.write_text(json.dumps({"tokens_per_second": tokens / seconds, "peak_gib": peak}))
    if world > 1:
        torch.distributed.destroy_process_group()


def measure(processes: int, zero: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run a group of processes; an error of theirs is part of the answer."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command += [__file__, "--worker", str(zero), "--out", str(out), "--layers", str(arguments.layers)]
        command += ["--warm", str(arguments.warm), "--steps", str(arguments.steps)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return {"error": done.stderr[-3000:]}
        return json.loads(out.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zero", type=int, nargs="+", default=[1], help="stages to measure with all GPUs")
    parser.add_argument("--steps", type=int, default=8, help="timed steps")
    parser.add_argument("--warm", type=int, default=3, help="steps before")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        work(arguments.worker, arguments.warm, arguments.steps, arguments.layers, arguments.out)
        return
    gpus = torch.cuda.device_count()
    found = {"one process": measure(1, 0, arguments)}
    for zero in arguments.zero:
        found[f"{gpus} processes, ZeRO-{zero}"] = measure(gpus, zero, arguments)
    alone = found["one process"].get("tokens_per_second", float("nan"))
    table = Table("processes", "tokens/s", "factor", "peak GiB", title=torch.cuda.get_device_name())
    for name, result in found.items():
        if "error" in result:
            table.add_row(name, "failed")
            print(f"{name}: {result['error']}")
        else:
            rate = result["tokens_per_second"]
            table.add_row(name, f"{rate:,.0f}", f"{rate / alone:.2f}", f"{result['peak_gib']:.1f}")
    Console(width=100).print(table)
    if arguments.out:
        arguments.out.write_text(json.dumps({"card": torch.cuda.get_device_name(), **found}, indent=1) + "\n")


if __name__ == "__main__":
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as the project's workers have it
    main()
