"""A small student with random weights and a small pool for it, in the real formats: what trainer tests stand on."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 40), "blue": (30, 60, 220), "black": (0, 0, 0)}
WORDS = (
    "USER : ASSISTANT what colour is it ? yes no red green blue black the a is this one two three four five six "
    "answer with the option 's letter from given choices directly . A B C D hello how are you fine thanks say word "
    "question options : please select correct above hint \n , 0 1 2 3 4 5 6 7 8 9 number image show"
)


def make_init(folder: Path, *, width: int = 96, layers: int = 3, seed: int = 0, extra_words: int = 0) -> Path:
    """Write a random-weight checkpoint (weights, tokenizer, image processor) and return its folder."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        PreTrainedTokenizerFast,
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    specials = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
    words = list(dict.fromkeys([*WORDS.split(), *(f"w{k}" for k in range(extra_words))]))
    vocabulary = {word: k for k, word in enumerate([*specials, *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(Regex(r"\s+"), " ")
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            image_size=32,
            patch_size=8,
            projection_dim=width,
        ),
        text_config=LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=width,
            intermediate_size=256 * width // 96,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=256,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
        image_token_index=4,
        vision_feature_layer=-1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(
        size={"shortest_edge": 32},
        crop_size={"height": 32, "width": 32},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    ).save_pretrained(folder)
    return folder


def png(colour: str, k: int = 0, size: tuple[int, int] = (32, 32)) -> bytes:
    """A plain image of a colour; `k` moves its brightness so that images differ."""
    shade = np.clip(np.array(COLOURS[colour]) + k, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(np.broadcast_to(shade, (size[1], size[0], 3)).copy()).save(buffer, "PNG")
    return buffer.getvalue()


def make_rows(n: int, *, text_only_every: int = 5, length: int = 3, seed: int = 0) -> list[dict[str, Any]]:
    """Colour questions over plain images, with a text-only chat row in between."""
    rng = np.random.default_rng(seed)
    names = list(COLOURS)
    rows: list[dict[str, Any]] = []
    for k in range(n):
        colour = names[int(rng.integers(len(names)))]
        filler = " ".join(rng.choice(["one", "two", "three"], int(rng.integers(1, length + 1))))
        if text_only_every and k % text_only_every == 0:
            image, turns = None, [{"user": f"say word {filler}", "assistant": filler}]
        else:
            data = png(colour, int(rng.integers(0, 30)))
            image = {"bytes": data, "path": f"{colour}/{k}.png"}
            turns = [{"user": f"what colour is it ? {filler}", "assistant": f"the colour is {colour}"}]
            if k % 3 == 0:
                turns.append({"user": "is it red ?", "assistant": "yes" if colour == "red" else "no"})
        rows.append({"source": f"s{k % 3}", "image": image, "conversation": turns, "n_tokens": 4})
    return rows


def rows_of_every_kind(init: Path, recipe: Any) -> list[dict[str, Any]]:
    """Rows with and without an image, cut ones, and one that the cut leaves a single target; not a multiple of four."""
    from curation_env.training.data import Encoder

    rows = make_rows(35, text_only_every=2)
    rows[1]["conversation"] = [{"user": "colour ?", "assistant": "the blue " * 40}]
    rows[2]["conversation"] = [{"user": "is it red ?", "assistant": "the blue " * 40}]
    encoder, asked = Encoder.load(init, recipe), "please "
    while True:
        rows[4]["conversation"] = [{"user": asked, "assistant": "yes no"}]
        (row,) = encoder.encode_rows([{"id": "r", **rows[4]}])
        if row.n_supervised == 1:
            return rows
        asked += "please "


def make_pool(folder: Path, rows: list[dict[str, Any]], key: str = "toy") -> Path:
    from curation_env.pool import write_pool

    write_pool(folder, rows, key=key)
    return folder
