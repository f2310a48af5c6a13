"""Generation speed of LLaVA-1.5-7B on a GPU: the real architecture with random weights, answers of a forced length.

    python experiments/benchmarks/generate_gpu.py

Prompts of about 656 tokens with an image each go through the vision tower and the engine that evaluation uses, with 16
and with 128 new tokens. Random weights never end an answer, so every answer has the length that it is given. Prints
questions a second, the first pass (which allocates and records) left out.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
from random_student import IMAGE_TOKEN, LLAVA, random_student

from curation_env.evaluation.generate import Prompt, batch_limits, generate
from curation_env.training.model import Student
from curation_env.training.recipe import Recipe


def make_prompts(n: int, new_tokens: int) -> list[Prompt]:
    """Prompts of 576 image tokens and 40 to 120 text tokens."""
    rng = np.random.default_rng(0)
    prompts = []
    for k in range(n):
        tokens = rng.integers(10, 31_000, 576 + int(rng.integers(40, 120)))
        tokens[5:581] = IMAGE_TOKEN
        prompts.append(Prompt(tokens, (str(k).encode(),), new_tokens))
    return prompts


def measure(student: Student, n: int, new_tokens: int) -> tuple[float, float]:
    """Seconds of the vision tower and of everything, for `n` questions."""
    prompts = make_prompts(n, new_tokens)
    pixels = torch.randn(64, 3, 336, 336)
    torch.cuda.synchronize()
    started = time.perf_counter()
    features = {}
    for start in range(0, n, 64):
        keys = [prompt.images[0] for prompt in prompts[start : start + 64]]
        features.update(zip(keys, student.see(pixels[: len(keys)]), strict=True))
    torch.cuda.synchronize()
    tower = time.perf_counter() - started
    answers = generate(student, prompts, features, end_token=-1)
    torch.cuda.synchronize()
    assert all(len(answer) == new_tokens for answer in answers)
    return tower, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=512)
    parser.add_argument("--layers", type=int, default=32)
    arguments = parser.parse_args()
    device = torch.device("cuda")
    student = Student.of(
        random_student(LLAVA, device, arguments.layers), Recipe.load("llava-1.5-7b-v1"), device, "sdpa"
    )
    rows, tokens = batch_limits(student)
    table = Table("new tokens", "questions/s", "tower s", "all s", "peak GiB", title=torch.cuda.get_device_name())
    for new_tokens in (16, 128):
        measure(student, 64, new_tokens)
        torch.cuda.reset_peak_memory_stats()
        tower, whole = measure(student, arguments.questions, new_tokens)
        peak = torch.cuda.max_memory_allocated() / 2**30
        table.add_row(
            str(new_tokens), f"{arguments.questions / whole:.1f}", f"{tower:.1f}", f"{whole:.1f}", f"{peak:.0f}"
        )
    console = Console(width=100)
    console.print(table)
    console.print(f"a batch: at most {rows} rows and {tokens:,} tokens")


if __name__ == "__main__":
    main()
