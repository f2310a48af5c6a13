"""What training takes of a GPU's memory: computed for every public student and size of card, and measured on a card.

    python experiments/benchmarks/memory.py                      # the table, by calculation, anywhere
    python experiments/benchmarks/memory.py --measure            # on a GPU: every case, one after the other
    python experiments/benchmarks/memory.py --measure --students smolvlm-500m llava-1.5-7b --cards "24 GB"

The worst step has rows of 2,048 tokens alone, with the largest image each, or, where the recipe gives none to a row
without one, no image at all; every other token is a target. A measured case builds the real architecture with random
weights, takes two such steps of each kind through the fixed trainer's engine, and prints the peak beside what was
computed. PyTorch is held to the memory of the smaller card. A case that fails is printed, and the others go on.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
from random_student import random_student

from curation_env.errors import OutOfMemory
from curation_env.students import card_of, student_names
from curation_env.training import engine as engines
from curation_env.training import plan as plans
from curation_env.training.data import Row
from curation_env.training.families.base import Layout
from curation_env.training.families.qwen_vl import QwenImages
from curation_env.training.memory import Footprint, Load, config_of, skeleton
from curation_env.training.model import Student
from curation_env.training.recipe import Recipe

STUDENTS = [name for name in student_names() if card_of(name) is not None]
STEPS = 2
PEAK = "peak_gib"


def computed(name: str, size: str) -> str:
    """The way of a student on a card, and what it needs."""
    card = card_of(name)
    assert card is not None
    try:
        return plans.of_worst(card, Recipe.load(f"{name}-v1"), plans.machine_of(size)).describe()
    except OutOfMemory as error:
        return f"not at all: {error}"


def peak_of_speed_run() -> float:
    """GiB of the run of `train_gpu.py` that docs/performance.md has the peak of, by its largest micro-batch."""
    card = card_of("llava-1.5-7b")
    assert card is not None
    footprint = Footprint.of(skeleton(config_of(card)), Recipe.load("llava-1.5-7b-v1"))
    peak = footprint.weights + 3 * footprint.trained + footprint.activations(Load(3495, 4 * 576, 534))
    return peak / plans.GIB


def make_rows(student: Student, windows: list[list[Load]]) -> list[Row]:
    """Rows of random tokens, as long as they are said to be; the image's tokens lie at the front."""
    rng = np.random.default_rng(0)
    rows = []
    for load in (load for window in windows for load in window):
        tokens = rng.integers(10, 30_000, load.tokens)
        tokens[1 : 1 + load.of_images] = student.parts.image_token
        supervised = np.arange(load.tokens) >= load.tokens - load.targets
        positions = None
        if student.model.config.model_type.startswith("qwen") and load.of_images:
            layout = Layout("", (load.of_images,), shape_of(load.of_images))
            positions = QwenImages(student.parts.image_token, {}, Path()).positions(tokens, [layout])
        key = len(rows).to_bytes(4, "big") if load.of_images else None
        rows.append(Row(str(len(rows)), tokens, supervised, key, positions=positions))
    return rows


def shape_of(tokens: int) -> tuple[int, int]:
    """Rows and columns of so many tokens, as near to a square as they can be."""
    rows = next(k for k in range(int(tokens**0.5), 0, -1) if tokens % k == 0)
    return rows, tokens // rows


def random_pixels(student: Student, tokens: int) -> torch.Tensor:
    """An image of so many tokens as the student's tower takes it."""
    vision, kind = student.model.config.vision_config, student.model.config.model_type
    if kind.startswith("qwen"):
        rows, columns = (2 * n for n in shape_of(tokens))
        return torch.randn(rows, columns, student.parts.pixels_per_token // 4)
    if kind == "llava":
        return torch.randn(3, vision.image_size, vision.image_size)
    tile = (vision.image_size // vision.patch_size // student.model.config.scale_factor) ** 2
    return torch.randn(tokens // tile, 3, vision.image_size, vision.image_size)


def measure(name: str, size: str, device: torch.device) -> dict[str, Any]:
    """Take worst steps in the memory of a card of this size."""
    card, recipe = card_of(name), Recipe.load(f"{name}-v1")
    assert card is not None
    plans.limit_gpu(plans.machine_of(size).free / plans.GIB)
    found = plans.of_worst(card, recipe, plans.read_machine(device))
    started = time.perf_counter()
    student = Student.of(random_student(name, device), recipe, device, "packed")
    windows = plans.worst_windows(card, recipe)
    rows = make_rows(student, windows)
    shown = {row.image for row in rows if row.image is not None}
    pixels = {key: random_pixels(student, card.image_tokens) for key in shown}
    # What is kept of a frozen tower's images is seen at each step, as where those of a run are too many to keep.
    features: dict[bytes, torch.Tensor] = dict(pixels)
    engine = engines.make(student, found.applied(recipe), rows, features, 1, found)
    torch.cuda.reset_peak_memory_stats()
    losses, start = [], 0
    for window in windows:
        chosen = list(range(start, start + len(window)))
        start += len(window)
        for _ in range(STEPS):
            keys = [key for k in chosen if (key := rows[k].image) is not None]
            if not student.tower_trains:
                images = [pixels[key] for key in keys]
                stacked = torch.stack(images) if student.model.config.model_type == "llava" else images
                features.update(zip(keys, student.see(stacked), strict=True))
            losses.append(engine.step(chosen, recipe.lr).loss)
    torch.cuda.synchronize()
    return {
        "plan": found.record(),
        "way": found.describe(),
        PEAK: torch.cuda.max_memory_allocated() / plans.GIB,
        "reserved_gib": torch.cuda.max_memory_reserved() / plans.GIB,
        "seconds": time.perf_counter() - started,
        "losses": losses,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="on this machine's GPU")
    parser.add_argument("--students", nargs="+", choices=STUDENTS, default=STUDENTS)
    parser.add_argument("--cards", nargs="+", choices=list(plans.SIZES), default=list(plans.SIZES))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    console = Console(width=180)
    if not arguments.measure:
        table = Table("student", *arguments.cards, title="computed", show_lines=True)
        for name in arguments.students:
            table.add_row(name, *(computed(name, size) for size in arguments.cards))
        console.print(table)
        console.print(f"the run of train_gpu.py --steps 10, computed: {peak_of_speed_run():.1f} GiB")
        return
    device = torch.device("cuda", 0)
    results: dict[str, Any] = {"card": torch.cuda.get_device_name(device)}
    table = Table("student", "card", "way", "computed GiB", "measured GiB", "computed / measured", "reserved GiB", "s")
    for name in arguments.students:
        for size in arguments.cards:
            try:
                result = measure(name, size, device)
                needed, peak = result["plan"]["needed_gib"], result[PEAK]
                numbers = (needed, peak, needed / peak, result["reserved_gib"], result["seconds"])
                cells = [result["plan"]["way"], *(f"{value:.2f}" for value in numbers)]
            except Exception as error:  # the other cases still say something
                traceback.print_exc()
                result, cells = {"error": str(error)}, [f"{type(error).__name__}: {str(error)[:150]}"]
            results[f"{name}, {size}"] = result
            table.add_row(name, size, *cells)
            console.print(f"{name}, {size}: {result}")
            gc.collect()
            torch.compiler.reset()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            if arguments.out:
                arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    console.print(table)
    console.print(results["card"])


if __name__ == "__main__":
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as the project's workers have it
    main()
