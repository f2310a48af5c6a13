"""Batched greedy decoding: left padding, a key-value cache, finished rows leave the batch."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from curation_env.training.data import Encoder
from curation_env.training.images import KeptFeatures, StreamedFeatures, make_features
from curation_env.training.model import Features, Student
from curation_env.training.plan import read_gpu

ROWS_PER_BATCH = {"cpu": 128, "cuda": 2048}
TOKENS_PER_BATCH = 16_384  # on a CPU: what its caches like
FEATURE_BYTES = 16 << 30  # features of a suite's images up to here are kept, for the next checkpoint with this tower
PROMPTS_PER_WINDOW = 16  # whose images are in memory at a time, where those of the suite are not
LENGTH_STEP = 64  # a GPU's batches are as long as a multiple of this: few shapes, so few recordings
CACHE_SHARE = 0.7  # of a GPU's free memory, for the keys and values of a batch


class Prompt(NamedTuple):
    """Tokens with expanded image tokens, keys of the images in order, and the most tokens to answer with.

    `positions` are the family's own, int64 of shape (axes, length), or None where they count 0, 1, 2, ...
    """

    tokens: np.ndarray
    images: tuple[bytes, ...]
    max_new_tokens: int
    positions: np.ndarray | None = None

    @property
    def next_position(self) -> int:
        """The position of the first token of the answer, along every axis."""
        return len(self.tokens) if self.positions is None else int(self.positions.max()) + 1


def generate(
    student: Student,
    prompts: Sequence[Prompt],
    features: Features,
    *,
    end_token: int,
    stop_tokens: Sequence[int] = (),
    on_progress: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """Return the tokens that the student answers each prompt with, without the end (or stop) token and what follows.

    Batches hold prompts of similar length, so the answers come out of order; they are returned in the prompts' order. A
    prompt's answer does not depend on its neighbours.
    """
    from curation_env.evaluation import static

    ends = [end_token, *stop_tokens]
    answers: list[list[int]] = [[] for _ in prompts]
    cut = list(batches(prompts, *batch_limits(student), LENGTH_STEP if student.any_length else 1))
    parts = [[prompts[k] for k in batch] for batch in cut]
    decode = static.Decoder(student, parts).decode if student.any_length else functools.partial(_decode, student)
    done = 0
    for batch, part in zip(cut, parts, strict=True):
        with torch.inference_mode():
            for index, tokens in zip(batch, decode(part, features, ends), strict=True):
                answers[index] = tokens
        done += len(batch)
        if on_progress:
            on_progress(done, len(prompts))
    return answers


def suite_features(
    student: Student,
    encoder: Encoder,
    prompts: Sequence[Prompt],
    images: Mapping[bytes, bytes | None],
    on_progress: Callable[[int, int], None] | None = None,
) -> KeptFeatures | StreamedFeatures:
    """Return the features of all images of prompts; where those don't fit, they are computed as they are needed.

    Args:
        images: Encoded bytes by key.
    """

    def windows() -> list[list[bytes]]:
        # In the order in which prompts are answered, however they are batched.
        together = batches(prompts, PROMPTS_PER_WINDOW, max_tokens=sys.maxsize)
        return [[key for k in window for key in prompts[k].images] for window in together]

    rows = ((prompt.images, prompt.tokens) for prompt in prompts)
    return make_features(student, encoder, images, rows, windows, FEATURE_BYTES, on_progress)


def batch_limits(student: Student) -> tuple[int, int]:
    """The most rows and padded tokens of a batch, answers included."""
    kind = student.device.type
    if kind == "cpu":
        return ROWS_PER_BATCH[kind], TOKENS_PER_BATCH
    text = student.model.config.text_config
    per_token = 2 * text.num_hidden_layers * text.num_key_value_heads * head_width(text) * student.model.dtype.itemsize
    return ROWS_PER_BATCH[kind], int(CACHE_SHARE * read_gpu(student.device).free) // per_token


def head_width(text: Any) -> int:
    """Width of an attention head; not every configuration says it."""
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def by_length(prompts: Sequence[Prompt]) -> list[int]:
    """Indices of prompts, those with similar answer limits and lengths beside each other."""
    return sorted(range(len(prompts)), key=lambda k: (prompts[k].max_new_tokens, len(prompts[k].tokens), k))


def padded_length(n: int, step: int = LENGTH_STEP) -> int:
    """Tokens that a prompt of `n` takes in a batch: the next multiple of `step`."""
    return -(-n // step) * step


def batches(prompts: Sequence[Prompt], max_rows: int, max_tokens: int, step: int = 1) -> Iterator[list[int]]:
    """Yield indices of prompts with similar answer limits and lengths; one that is too long stands alone.

    Args:
        max_tokens: Of a batch, its prompts padded to a multiple of `step` and answers included.
    """
    batch: list[int] = []
    longest = 0
    for k in by_length(prompts):
        longest = max(longest, padded_length(len(prompts[k].tokens), step))
        padded = (len(batch) + 1) * (longest + prompts[k].max_new_tokens)
        if batch and (len(batch) == max_rows or padded > max_tokens):
            yield batch
            batch, longest = [], padded_length(len(prompts[k].tokens), step)
        batch.append(k)
    if batch:
        yield batch


def _decode(student: Student, prompts: Sequence[Prompt], features: Features, ends: Sequence[int]) -> list[list[int]]:
    from transformers import DynamicCache

    longest = max(len(prompt.tokens) for prompt in prompts)
    tokens = np.full((len(prompts), longest), ends[0])
    present = np.zeros((len(prompts), longest), np.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt.tokens) :] = prompt.tokens
        present[row, longest - len(prompt.tokens) :] = 1
    mask = torch.from_numpy(present).to(student.device)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    if any(prompt.positions is not None for prompt in prompts):
        positions = positions.expand(3, -1, -1).clone()
        for row, prompt in enumerate(prompts):
            if prompt.positions is not None:
                positions[:, row, longest - len(prompt.tokens) :] = torch.from_numpy(prompt.positions)
    text: Any = student.parts.text
    cache = DynamicCache(config=text.config)
    hidden = text(
        inputs_embeds=_embed(student, torch.from_numpy(tokens), prompts, features),
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state[:, -1]

    answers: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # which prompt each row of the shrinking batch belongs to
    following = torch.tensor([prompt.next_position for prompt in prompts], device=student.device)
    while True:
        chosen = student.model.lm_head(hidden).argmax(-1)
        going = []
        for k, (row, token) in enumerate(zip(rows, chosen.tolist(), strict=True)):
            if token not in ends:
                answers[row].append(token)
                if len(answers[row]) < prompts[row].max_new_tokens:
                    going.append(k)
        if not going:
            return answers
        if len(going) < len(rows):
            rows = [rows[k] for k in going]
            keep = torch.tensor(going, device=student.device)
            chosen, mask, following = chosen[keep], mask[keep], following[keep]
            cache.batch_select_indices(keep)
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
        hidden = text(
            inputs_embeds=student.model.get_input_embeddings()(chosen[:, None]),
            attention_mask=mask,
            position_ids=following[:, None],
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
        following = following + 1


def _embed(student: Student, tokens: torch.Tensor, prompts: Sequence[Prompt], features: Features) -> torch.Tensor:
    slots = (tokens.flatten() == student.parts.image_token).nonzero()[:, 0]
    images = [features[key] for prompt in prompts for key in prompt.images]
    flat = student.embed(tokens.flatten().to(student.device), slots.to(student.device), images)
    return flat.view(*tokens.shape, -1)
