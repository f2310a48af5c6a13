"""Greedy decoding for a GPU: prompts packed without padding, a cache of fixed shape, one CUDA graph a step.

A step of a large model reads all its weights and keys; launching its kernels one by one takes longer than that, so the
step is recorded and replayed. A recording is of one shape, so batches come in few shapes: their rows are padded to a
multiple of `LENGTH_STEP` tokens, and where rows are too few idle ones fill up. Rows that have ended stay until half of
the batch has; then the rest moves into a batch of half the rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from curation_env.evaluation.generate import Prompt, head_width, padded_length
from curation_env.training.data import Packed, Row, micro_batches
from curation_env.training.model import Features, Student

TOKENS_PER_PREFILL = 16_384


class Decoder:
    """Answers batches of prompts, one after the other, with one cache and the recordings that are made on the way.

    Args:
        batches: What it will be given: the cache has room for the largest.
    """

    def __init__(self, student: Student, batches: Iterable[Sequence[Prompt]]) -> None:
        self.student = student
        self._capacity = max((len(batch) * _longest(batch) for batch in batches), default=0)
        text = student.model.config.text_config
        shape = (text.num_hidden_layers, self._capacity, text.num_key_value_heads, head_width(text))
        self._keys, self._values = (
            torch.zeros(shape, dtype=student.model.dtype, device=student.device) for _ in range(2)
        )
        self._batches: dict[tuple[int, int], Batch] = {}

    def decode(self, prompts: Sequence[Prompt], features: Features, ends: Sequence[int]) -> list[list[int]]:
        """Return the greedy answers to a batch of prompts, end tokens left out."""
        longest = _longest(prompts)
        batch = self._batch(len(prompts), longest)
        batch.fill(prompts, features)
        answers: list[list[int]] = [[] for _ in prompts]
        rows = list(range(len(prompts)))  # which prompt each row of the batch belongs to
        going = set(rows)
        while True:
            for row, token in zip(rows, batch.tokens[: len(rows)].tolist(), strict=True):
                if row not in going:
                    continue
                if token not in ends:
                    answers[row].append(token)
                if token in ends or len(answers[row]) == prompts[row].max_new_tokens:
                    going.remove(row)
            if not going:
                return answers
            if 2 * len(going) <= batch.rows:
                keep = [k for k, row in enumerate(rows) if row in going]
                rows = [rows[k] for k in keep]
                smaller = self._batch(len(rows), longest)
                smaller.take(batch, keep)
                batch = smaller
            batch.step()

    def _batch(self, rows: int, longest: int) -> Batch:
        """The batch of rows of `longest` tokens that has room for `rows`, and for less than twice as many."""
        room = self._capacity // longest
        while room // 2 >= rows:
            room //= 2
        if (room, longest) not in self._batches:
            self._batches[room, longest] = Batch(self.student, self._keys, self._values, room, longest)
        return self._batches[room, longest]


class Batch:
    """Rows of one shape in a cache.

    Attributes:
        keys, values: Shape (layers, rows, longest, heads, width), each row's from position 0 on: a token's heads lie
            together.
        tokens: int64 of shape (rows,): the last token of each row, not yet in the cache.
        lengths: int64 of shape (rows,): tokens of each row in the cache.
        shifts: int64 of shape (rows,): how far a row's positions run ahead of its tokens, or (negative) behind.
        slots: int64: where the next pass stores its tokens when a layer's rows are laid end to end.
    """

    def __init__(self, student: Student, keys: torch.Tensor, values: torch.Tensor, rows: int, longest: int) -> None:
        self.student, self.rows, self.longest = student, rows, longest
        self.keys, self.values = (kept[:, : rows * longest].unflatten(1, (rows, longest)) for kept in (keys, values))
        self.tokens, self.lengths, self.shifts = (
            torch.zeros(rows, dtype=torch.int64, device=student.device) for _ in range(3)
        )
        self.slots = self.lengths
        self._graph: torch.cuda.CUDAGraph | None = None

    def of(self, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What `packed_attention` has to know of a layer's cache."""
        return self.keys[layer], self.values[layer], self.slots

    def fill(self, prompts: Sequence[Prompt], features: Features) -> None:
        """Read the prompts; `tokens` then are the first ones of the answers."""
        rows = [Row("", p.tokens, np.zeros(len(p.tokens), bool), None, positions=p.positions) for p in prompts]
        first = 0
        for chunk in micro_batches(rows, TOKENS_PER_PREFILL):
            stop = first + len(chunk)
            images = [features[key] for p in prompts[first:stop] for key in p.images]
            self.tokens[first:stop] = self._read(chunk, images, first)
            first = stop
        self._set(self.lengths, [len(p.tokens) for p in prompts])
        self._set(self.shifts, [p.next_position - len(p.tokens) for p in prompts])

    def take(self, other: Batch, rows: Sequence[int]) -> None:
        """Go on with these rows (in ascending order) of another batch in the same cache, whose rows are as long."""
        keep = torch.tensor(rows, device=self.tokens.device)
        for kept in (other.keys, other.values):
            for layer in kept:
                layer[: len(rows)] = layer.index_select(0, keep)
        for own, others in ((self.tokens, other.tokens), (self.lengths, other.lengths), (self.shifts, other.shifts)):
            own.zero_()
            own[: len(rows)] = others[keep]

    def step(self) -> None:
        """Append `tokens` to the rows and put what follows in their place."""
        if self.student.device.type != "cuda":
            self._step()
            return
        if self._graph is None:
            self._graph = self._record()
        self._graph.replay()

    def _record(self) -> torch.cuda.CUDAGraph:
        before = [state.clone() for state in (self.tokens, self.lengths)]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._step()  # what it stores will be stored again
        torch.cuda.current_stream().wait_stream(side)
        for state, value in zip((self.tokens, self.lengths), before, strict=True):
            state.copy_(value)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        return graph

    def _step(self) -> None:
        model, device = self.student.model, self.tokens.device
        present = torch.arange(self.longest, device=device) <= self.lengths[:, None]
        self.slots = torch.arange(self.rows, device=device) * self.longest + self.lengths
        hidden = self.student.parts.text(
            inputs_embeds=model.get_input_embeddings()(self.tokens[:, None]),
            position_ids=(self.lengths + self.shifts)[:, None],
            use_cache=False,
            cache=self,
            present=present[:, None, None],
        ).last_hidden_state
        self.tokens.copy_(model.lm_head(hidden[:, -1]).argmax(-1))
        self.lengths += 1

    def _read(self, rows: Sequence[Row], images: Sequence[torch.Tensor], first: int) -> torch.Tensor:
        """Store prompts as the rows from `first` on and return what follows each, int64 of shape (prompts,)."""
        student = self.student
        packed = Packed.of(rows, student.parts.image_token, student.device)
        of_row = torch.arange(first, first + len(rows)).repeat_interleave(torch.tensor([len(r.tokens) for r in rows]))
        self.slots = of_row.to(student.device) * self.longest + packed.places
        hidden = student.parts.text(
            inputs_embeds=student.embed(packed.tokens, packed.image_slots, images)[None],
            position_ids=packed.positions.unsqueeze(-2),
            use_cache=False,
            cache=self,
            **student.layout(packed),
        ).last_hidden_state[0]
        return student.model.lm_head(hidden.index_select(0, packed.ends[1:].long() - 1)).argmax(-1)

    @staticmethod
    def _set(state: torch.Tensor, values: list[int]) -> None:
        """Write the state of the first rows; the others are idle."""
        state.zero_()
        state[: len(values)] = torch.tensor(values, device=state.device)


def _longest(batch: Sequence[Prompt]) -> int:
    """Tokens of each row of a batch, answers included."""
    return max(padded_length(len(p.tokens)) for p in batch) + max(p.max_new_tokens for p in batch)
