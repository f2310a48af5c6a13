"""Greedy decoding for a GPU: prompts packed without padding, a cache of fixed shape, one CUDA graph a step.

A step of a large model reads all its weights and keys; launching its kernels one by one takes longer than that, so the
step is recorded once for a batch and replayed. Rows that have ended stay until half of the batch has; then the rest
moves into a batch of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from curation_env.evaluation.generate import Prompt, head_width
from curation_env.training.data import Packed, Row
from curation_env.training.model import Features, Student

TOKENS_PER_PREFILL = 16_384


class Cache:
    """Keys and values of a batch, each row's from position 0 on.

    Attributes:
        keys, values: Shape (layers, rows, longest, heads, width): a token's heads lie together.
        lengths: int64 of shape (rows,): tokens of each row.
        shifts: int64 of shape (rows,): how far a row's positions run ahead of its tokens, or (negative) behind.
        slots: int64: where the next pass stores its tokens when a layer's rows are laid end to end.
    """

    def __init__(self, student: Student, rows: int, longest: int) -> None:
        text, device = student.model.config.text_config, student.device
        shape = (text.num_hidden_layers, rows, longest, text.num_key_value_heads, head_width(text))
        self.keys, self.values = (torch.zeros(shape, dtype=student.model.dtype, device=device) for _ in range(2))
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self.shifts = torch.zeros(rows, dtype=torch.int64, device=device)
        self.slots = self.lengths

    @property
    def longest(self) -> int:
        return self.keys.shape[2]

    def store_at(self, rows: torch.Tensor, places: torch.Tensor) -> None:
        """Store the tokens of the next pass at these places."""
        self.slots = rows * self.longest + places

    def of(self, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What `packed_attention` has to know of a layer's cache."""
        return self.keys[layer], self.values[layer], self.slots

    def select(self, rows: torch.Tensor) -> None:
        """Keep these rows alone."""
        self.keys, self.values = self.keys.index_select(1, rows), self.values.index_select(1, rows)
        self.lengths, self.shifts = self.lengths[rows], self.shifts[rows]


class Steps:
    """The step of a batch: the token that follows the last one of every row."""

    def __init__(self, student: Student, cache: Cache, tokens: torch.Tensor) -> None:
        self.student, self.cache = student, cache
        self.tokens = tokens.clone()
        self.graph: torch.cuda.CUDAGraph | None = None
        if student.device.type == "cuda":
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self._next()  # writes what the first real step will write again
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.chosen = self._next()

    def next(self) -> torch.Tensor:
        """Append `tokens` to the rows and return what follows, int64 of shape (rows,)."""
        if self.graph is not None:
            self.graph.replay()
        else:
            self.chosen = self._next()
        self.cache.lengths += 1
        self.tokens.copy_(self.chosen)
        return self.tokens

    def _next(self) -> torch.Tensor:
        model, cache = self.student.model, self.cache
        device = self.tokens.device
        present = torch.arange(cache.longest, device=device) <= cache.lengths[:, None]
        cache.store_at(torch.arange(len(self.tokens), device=device), cache.lengths)
        hidden = self.student.parts.text(
            inputs_embeds=model.get_input_embeddings()(self.tokens[:, None]),
            position_ids=(cache.lengths + cache.shifts)[:, None],
            use_cache=False,
            cache=cache,
            present=present[:, None, None],
        ).last_hidden_state
        return model.lm_head(hidden[:, -1]).argmax(-1)


def decode(student: Student, prompts: list[Prompt], features: Features, ends: list[int]) -> list[list[int]]:
    """Return the greedy answers to a batch of prompts, end tokens left out."""
    longest = max(len(p.tokens) for p in prompts) + max(p.max_new_tokens for p in prompts)
    cache = Cache(student, len(prompts), longest)
    chosen = _prefill(student, cache, prompts, features)
    steps: Steps | None = None
    answers: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # which prompt each row of the batch belongs to
    going = set(rows)
    while True:
        for row, token in zip(rows, chosen.tolist(), strict=True):
            if row not in going:
                continue
            if token not in ends:
                answers[row].append(token)
            if token in ends or len(answers[row]) == prompts[row].max_new_tokens:
                going.remove(row)
        if not going:
            return answers
        if 2 * len(going) <= len(rows):
            keep = torch.tensor([k for k, row in enumerate(rows) if row in going], device=student.device)
            rows = [row for row in rows if row in going]
            cache.select(keep)
            chosen, steps = chosen[keep], None
        if steps is None:
            steps = Steps(student, cache, chosen)
        chosen = steps.next()


def _prefill(student: Student, cache: Cache, prompts: Sequence[Prompt], features: Features) -> torch.Tensor:
    """Fill the cache with the prompts and return the first token of every answer, int64 of shape (prompts,)."""
    firsts = []
    start = 0
    while start < len(prompts):
        stop, used = start, 0
        while stop < len(prompts) and (stop == start or used + len(prompts[stop].tokens) <= TOKENS_PER_PREFILL):
            used += len(prompts[stop].tokens)
            stop += 1
        chunk = prompts[start:stop]
        rows = [Row("", p.tokens, np.zeros(len(p.tokens), bool), None, positions=p.positions) for p in chunk]
        packed = Packed.of(rows, student.parts.image_token, student.device)
        images = [features[key] for p in chunk for key in p.images]
        of_row = torch.arange(start, stop).repeat_interleave(torch.tensor([len(p.tokens) for p in chunk]))
        cache.store_at(of_row.to(student.device), packed.places)
        hidden = student.parts.text(
            inputs_embeds=student.embed(packed.tokens, packed.image_slots, images)[None],
            position_ids=packed.positions.unsqueeze(-2),
            use_cache=False,
            cache=cache,
            **student.layout(packed),
        ).last_hidden_state[0]
        firsts.append(student.model.lm_head(hidden.index_select(0, packed.ends[1:].long() - 1)).argmax(-1))
        start = stop
    cache.lengths.copy_(torch.tensor([len(p.tokens) for p in prompts]))
    cache.shifts.copy_(torch.tensor([p.next_position - len(p.tokens) for p in prompts]))
    return torch.cat(firsts)
