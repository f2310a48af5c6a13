"""Training speed of LLaVA-1.5-7B on a GPU: the real architecture, random weights, rows of the real length distribution.

    python experiments/benchmarks/train_gpu.py                        # the fixed trainer's step
    python experiments/benchmarks/train_gpu.py --published 4  # and four steps of the published recipe, in the same run

Text lengths are log-normal with a mean of 207 tokens beside the 576 of an image, up to 2,048 in all; images are JPEGs
of 640 x 480 pixels that go through the real processor and tower. Prints tokens a second, the useful rate (6 x
parameters of the language model x tokens, no credit for padding or recomputation), its share of a large bf16 matrix
product's rate on the same card, the peak of memory, and the seconds from the start of the process to the end of the
first step.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
from random_student import IMAGE_TOKEN, LLAVA, matrix_rate, random_student

from curation_env.training.data import Encoder, Row, image_key
from curation_env.training.engine import SingleProcess
from curation_env.training.families.llava import LlavaImages
from curation_env.training.images import StreamedFeatures
from curation_env.training.model import Student
from curation_env.training.recipe import Recipe
from curation_env.training.vlm import windows


def make_rows(n: int, seed: int = 0) -> list[Row]:
    """Rows of the real length distribution; about 45% of the text tokens are answers."""
    rng = np.random.default_rng(seed)
    pictures = []
    for k in range(min(n, 64)):
        noise = np.random.default_rng(k).integers(0, 255, (60, 80, 3), np.uint8)
        stream = io.BytesIO()
        Image.fromarray(noise).resize((640, 480)).save(stream, "JPEG")
        pictures.append(stream.getvalue())
    rows = []
    for k in range(n):
        text = int(np.clip(rng.lognormal(np.log(207) - 0.5 * 0.9**2, 0.9), 12, 2048 - 576))
        tokens = rng.integers(10, 31_000, 576 + text)
        tokens[5:581] = IMAGE_TOKEN
        supervised = np.zeros(len(tokens), bool)
        supervised[-max(2, int(0.45 * text)) :] = True
        data = pictures[k % len(pictures)]
        rows.append(Row(str(k), tokens, supervised, image_key(data), data))
    return rows


def ours(model: Any, recipe: Recipe, rows: list[Row], device: torch.device, warm: int) -> dict[str, Any]:
    """Seconds of the fixed trainer's steps."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    student = Student.of(model, recipe, device, "packed")
    processor = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    with tempfile.TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
        images_of_rows = LlavaImages(IMAGE_TOKEN, 576, Path(folder))
        assert images_of_rows.processor is not None  # read before the folder goes
    encoder = Encoder(None, images_of_rows, recipe)
    steps = list(windows(len(rows), recipe, 42))
    images = {row.image: row.image_bytes for row in rows if row.image is not None}
    shown = [[key for k in window if (key := rows[k].image) is not None] for window in steps]
    with StreamedFeatures(student, encoder, images, shown) as features:
        engine = SingleProcess(student, recipe, rows, features)
        return timed(lambda window: engine.step(window, 1e-5).loss, steps, rows, warm)


def published(model: Any, recipe: Recipe, rows: list[Row], device: torch.device, warm: int) -> dict[str, Any]:
    """Seconds of the published recipe's steps: one row at a time, checkpointing, SDPA, the tower in every pass."""
    model.set_attn_implementation("sdpa")
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith("model.vision_tower"))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0, fused=True)
    pixels = torch.randn(1, 3, 336, 336, device=device, dtype=torch.bfloat16)

    def step(window: list[int]) -> float:
        total = 0.0
        n = sum(rows[k].n_supervised for k in window)
        for k in window:
            tokens = torch.from_numpy(rows[k].tokens)[None].to(device)
            labels = torch.where(torch.from_numpy(rows[k].supervised)[None].to(device), tokens, -100)
            loss = model(input_ids=tokens, pixel_values=pixels, labels=labels).loss * rows[k].n_supervised / n
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(trained, recipe.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    return timed(step, list(windows(len(rows), recipe, 42)), rows, warm)


def timed(step: Any, steps: list[list[int]], rows: list[Row], warm: int) -> dict[str, Any]:
    first, seconds, tokens, losses = 0.0, [], [], []
    torch.cuda.reset_peak_memory_stats()
    for k, window in enumerate(steps):
        started = time.perf_counter()
        losses.append(step(window))
        torch.cuda.synchronize()
        if k == 0:
            first = time.time() - Path("/proc/self").stat().st_ctime  # since the process started, imports included
        if k >= warm:
            seconds.append(time.perf_counter() - started)
            tokens.append(sum(len(rows[i].tokens) for i in window))
    rates = np.array(tokens) / np.array(seconds)
    return {
        "tokens_per_second": sum(tokens) / sum(seconds),
        "slowest": rates.min(),
        "fastest": rates.max(),
        "tokens_per_row": sum(tokens) / sum(len(window) for window in steps[warm:]),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "first_step": first,
        "losses": [round(loss, 4) for loss in losses[:3]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="timed steps, after the warm ones")
    parser.add_argument("--warm", type=int, default=4, help="steps before")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--micro-batch", type=int, help="tokens of a micro-batch, where not the recipe's")
    parser.add_argument("--published", type=int, default=0, help="timed steps of the published recipe, in the same run")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = torch.device("cuda")
    recipe = Recipe.load("llava-1.5-7b-v1")
    if arguments.micro_batch:
        recipe = recipe.model_copy(update={"tokens_per_micro_batch": arguments.micro_batch})
    rows = make_rows(recipe.examples_per_step * (arguments.warm + arguments.steps))
    rate = matrix_rate(device)
    found = {}
    for name in ["ours", "published"][: 1 + bool(arguments.published)]:
        model = random_student(LLAVA, device, arguments.layers)
        text = model.model.language_model
        parameters = sum(p.numel() for p in text.layers.parameters()) + model.lm_head.weight.numel()
        if name == "ours":
            found[name] = ours(model, recipe, rows, device, arguments.warm)
        else:
            few = rows[: recipe.examples_per_step * (1 + arguments.published)]
            found[name] = published(model, recipe, few, device, 1)
        found[name]["parameters"] = parameters
        del model, text
        torch.cuda.empty_cache()
    card = torch.cuda.get_device_name()
    table = Table(
        "path", "tokens/s", "slowest", "fastest", "TFLOP/s", "of matrix rate", "peak GiB", "first step s", title=card
    )
    for name, row in found.items():
        useful = 6 * row["parameters"] * row["tokens_per_second"]
        cells = [f"{row[key]:,.0f}" for key in ("tokens_per_second", "slowest", "fastest")]
        cells += [f"{useful / 1e12:.0f}", f"{useful / rate:.1%}", f"{row['peak_gib']:.1f}", f"{row['first_step']:.0f}"]
        table.add_row(name, *cells)
    console = Console(width=110)
    console.print(table)
    per_row = found["ours"]["tokens_per_row"]
    console.print(f"{per_row:.0f} tokens a row; matrix product {rate / 1e12:.0f} TFLOP/s")
    if "published" in found:
        faster = found["ours"]["tokens_per_second"] / found["published"]["tokens_per_second"]
        console.print(f"{faster:.1f} times as fast as the published recipe")
    console.print({name: row["losses"] for name, row in found.items()})
    if arguments.out:
        arguments.out.write_text(json.dumps({"card": card, "matrix_rate": rate, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
