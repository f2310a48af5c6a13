"""LLaVA-1.5-7B's architecture with random weights, and what a GPU can do at most: for the benchmarks of speed."""

from __future__ import annotations

import time
from typing import Any

import torch

IMAGE_TOKEN, VOCABULARY = 32000, 32064


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


def llava(device: torch.device, layers: int) -> Any:
    """LLaVA-1.5-7B's architecture with random weights in bf16."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    config._attn_implementation = "sdpa"
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            return LlavaForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(torch.float32)
