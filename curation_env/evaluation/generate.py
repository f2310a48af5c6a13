"""Batched greedy decoding: left padding, a key-value cache, finished rows leave the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from curation_env.training.model import Features, Student

ROWS_PER_BATCH = 128
TOKENS_PER_BATCH = 16_384


class Prompt(NamedTuple):
    """Tokens with expanded image tokens, keys of the images in order, and the most tokens to answer with."""

    tokens: np.ndarray
    images: tuple[bytes, ...]
    max_new_tokens: int


def generate(
    student: Student,
    prompts: Sequence[Prompt],
    features: Features,
    *,
    end_token: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """Return the tokens that the student answers each prompt with, the end token left out.

    Batches hold prompts of similar length, so the answers come out of order; they are returned in the prompts' order. A
    prompt's answer does not depend on its neighbours.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    done = 0
    for batch in batches(prompts):
        with torch.inference_mode():
            for index, tokens in zip(
                batch, _decode(student, [prompts[k] for k in batch], features, end_token), strict=True
            ):
                answers[index] = tokens
        done += len(batch)
        if on_progress:
            on_progress(done, len(prompts))
    return answers


def batches(prompts: Sequence[Prompt]) -> Iterator[list[int]]:
    """Yield indices of prompts with one answer limit and similar lengths, bounded by rows and by padded tokens."""
    order = sorted(range(len(prompts)), key=lambda k: (prompts[k].max_new_tokens, len(prompts[k].tokens), k))
    batch: list[int] = []
    for k in order:
        limit = prompts[k].max_new_tokens
        padded = (len(batch) + 1) * (len(prompts[k].tokens) + limit)
        full = len(batch) == ROWS_PER_BATCH or padded > TOKENS_PER_BATCH
        if batch and (full or prompts[batch[-1]].max_new_tokens != limit):
            yield batch
            batch = []
        batch.append(k)
    if batch:
        yield batch


def _decode(student: Student, prompts: list[Prompt], features: Features, end_token: int) -> list[list[int]]:
    from transformers import DynamicCache

    longest = max(len(prompt.tokens) for prompt in prompts)
    limit = prompts[0].max_new_tokens
    tokens = np.full((len(prompts), longest), end_token)
    present = np.zeros((len(prompts), longest), np.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt.tokens) :] = prompt.tokens
        present[row, longest - len(prompt.tokens) :] = 1
    mask = torch.from_numpy(present).to(student.device)
    text: Any = student.model.model.language_model
    cache = DynamicCache(config=text.config)
    hidden = text(
        inputs_embeds=_embed(student, torch.from_numpy(tokens), prompts, features),
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp_min(0),
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state[:, -1]

    answers: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # which prompt each row of the shrinking batch belongs to
    lengths = mask.sum(1)
    for step in range(limit):
        chosen = student.model.lm_head(hidden).argmax(-1)
        listed = chosen.tolist()
        for row, token in zip(rows, listed, strict=True):
            if token != end_token:
                answers[row].append(token)
        going = [k for k, token in enumerate(listed) if token != end_token]
        if not going or step + 1 == limit:
            break
        if len(going) < len(rows):
            rows = [rows[k] for k in going]
            keep = torch.tensor(going, device=student.device)
            chosen, mask, lengths = chosen[keep], mask[keep], lengths[keep]
            cache.batch_select_indices(keep)
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
        hidden = text(
            inputs_embeds=student.model.get_input_embeddings()(chosen[:, None]),
            attention_mask=mask,
            position_ids=lengths[:, None],
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
        lengths = lengths + 1
    return answers


def _embed(student: Student, tokens: torch.Tensor, prompts: list[Prompt], features: Features) -> torch.Tensor:
    slots = (tokens.flatten() == student.model.config.image_token_index).nonzero()[:, 0]
    keys = [key for prompt in prompts for key in prompt.images]
    images = torch.stack([features[key] for key in keys]) if keys else None
    flat = student.embed(tokens.flatten().to(student.device), slots.to(student.device), images)
    return flat.view(*tokens.shape, -1)
