"""Small random-weight students of the real architectures, saved in the real formats."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from training_support import COLOURS, WORDS
from transformers.utils.logging import disable_progress_bar

disable_progress_bar()

QWEN_MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
QWEN_MARKS += ["<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
SMOL_MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<fake_token_around_image>", "<global-img>", "<image>"]
SMOL_MARKS += ["<end_of_utterance>", *(f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7))]
CHAT_WORDS = "system user assistant You are a helpful assistant . User Assistant"


def save_tokenizer(folder: Path, marks: list[str]) -> dict[str, int]:
    """Write a byte-level BPE tokenizer, as Qwen's and SmolLM's are, with a family's special tokens: ids by token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    words = f"{WORDS} {CHAT_WORDS}".split()
    texts = [" ".join(words[k:] + words[:k]) for k in range(0, len(words), 7)]
    backend.train_from_iterator([*texts, "a\nb\n\nc\n\nd"] * 2, trainer)
    backend.add_special_tokens([AddedToken(mark, normalized=False, special=True) for mark in marks])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<|endoftext|>", eos_token="<|im_end|>")
    tokenizer.save_pretrained(folder)
    return {mark: tokenizer.convert_tokens_to_ids(mark) for mark in marks} | {"size": len(tokenizer)}


def sharpened(model: Any) -> Any:
    """Scale the layers up: in a model as it is initialised, hardly anything depends on positions and on images."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and "embed_tokens" not in name and "lm_head" not in name:
                parameter.mul_(8)
    return model


def make_qwen(folder: Path, kind: str = "qwen2_5_vl") -> Path:
    """Write a Qwen2-VL or Qwen2.5-VL (its windows smaller than an image, so that they count) and return its folder."""
    import transformers
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    ids = save_tokenizer(folder, QWEN_MARKS)
    text = {
        "vocab_size": ids["size"],
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
    }
    shared = {"depth": 2, "num_heads": 2, "patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2}
    vision: dict[str, Any] = {**shared, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}
    if kind == "qwen2_5_vl":
        vision = {**shared, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48, "window_size": 16}
        vision["fullatt_block_indexes"] = [1]
    name = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL"}[kind]
    config = getattr(transformers, f"{name}Config")(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    sharpened(getattr(transformers, f"{name}ForConditionalGeneration")(config)).save_pretrained(folder)
    Qwen2VLImageProcessorPil(
        patch_size=4, temporal_patch_size=2, merge_size=2, size={"shortest_edge": 4 * 64, "longest_edge": 30 * 64}
    ).save_pretrained(folder)
    return folder


def make_smolvlm(folder: Path, kind: str = "idefics3") -> Path:
    """Write a SmolVLM whose base checkpoint calls itself `kind`, with tiles of 16 pixels, and return its folder."""
    import transformers
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    ids = save_tokenizer(folder, SMOL_MARKS)
    name = {"idefics3": "Idefics3", "smolvlm": "SmolVLM"}[kind]
    config = getattr(transformers, f"{name}Config")(
        text_config={
            "model_type": "llama",
            "vocab_size": ids["size"],
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "pad_token_id": ids["<|endoftext|>"],
            "bos_token_id": ids["<|im_start|>"],
            "eos_token_id": ids["<|im_end|>"],
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 4,
        },
        scale_factor=2,
        image_token_id=ids["<image>"],
        pad_token_id=ids["<|endoftext|>"],
    )
    torch.manual_seed(0)
    sharpened(getattr(transformers, f"{name}ForConditionalGeneration")(config)).save_pretrained(folder)
    Idefics3ImageProcessorPil(size={"longest_edge": 48}, max_image_size={"longest_edge": 16}).save_pretrained(folder)
    return folder


def picture(k: int, size: tuple[int, int]) -> bytes:
    """A noisy image of its own for every k, with a colour's mean."""
    rng = np.random.default_rng(k)
    colour = list(COLOURS.values())[k % len(COLOURS)]
    noise = np.clip(np.array(colour) + rng.integers(-60, 60, (size[1], size[0], 3)), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()


SIZES = [(40, 24), (16, 48), (33, 33), (64, 20), (9, 13)]


def make_rows(n: int) -> list[dict[str, Any]]:
    """Rows of several turns over images of several shapes, every fourth without one, some long."""
    names = list(COLOURS)
    rows: list[dict[str, Any]] = []
    for k in range(n):
        answer = f"the colour is {names[k % len(names)]}"
        turns = [{"user": "what colour is it ?", "assistant": answer}]
        if k % 3 == 0:
            turns.append({"user": "is it red ?", "assistant": "yes " * (1 + 120 * (k % 9 == 3))})
        image = None if k % 4 == 1 else {"bytes": picture(k % 12, SIZES[k % len(SIZES)]), "path": f"{k % 12}.png"}
        rows.append({"source": f"s{k % 2}", "image": image, "conversation": turns, "n_tokens": 4})
    return rows
