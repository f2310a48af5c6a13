"""Public students' architectures with random weights, and what a GPU can do at most: for the benchmarks of speed."""

from __future__ import annotations

import time
from typing import Any

import torch

from curation_env.students import card_of
from curation_env.training.memory import DTYPES, config_of
from curation_env.training.recipe import Recipe

LLAVA = "llava-1.5-7b"
IMAGE_TOKEN, VOCABULARY = 32000, 32064  # of LLaVA-1.5


def matrix_rate(device: torch.device, n: int = 8192, repeats: int = 20) -> float:
    """FLOP/s of a square bf16 matrix product of random numbers."""
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        a @ b
    torch.cuda.synchronize()
    return 2 * n**3 * repeats / (time.perf_counter() - started)


def random_student(name: str, device: torch.device, layers: int | None = None) -> Any:
    """A student's architecture with random weights in its recipe's precision, made where it will be used.

    Args:
        name: Of a public student.
        layers: Of its language model; None: as many as it has.
    """
    from transformers import AutoModelForImageTextToText

    card = card_of(name)
    assert card is not None
    config = config_of(card)
    if layers is not None:
        config.text_config.num_hidden_layers = layers
    torch.set_default_dtype(DTYPES[Recipe.load(f"{name}-v1").precision])
    try:
        with device:
            return AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa")
    finally:
        torch.set_default_dtype(torch.float32)
