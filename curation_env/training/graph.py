"""Whole optimizer steps as one CUDA graph, for students so small that launching their kernels takes longer than running
them: a step of the miniature is about a thousand kernels of a few microseconds each.

A graph replays fixed shapes: every window is laid out as `examples_per_step` rows of `max_length` tokens, padding at
the right, where a causal mask keeps it away from every real token, and without a target. The losses are those of the
packed rows, in another order of summation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from curation_env.training.data import Rectangle, Row
from curation_env.training.engine import Update, adamw, parameter_groups
from curation_env.training.model import Features, Student
from curation_env.training.recipe import Recipe

NO_TARGET = -100
WARM_UP_STEPS = 3  # what PyTorch asks for before a capture: libraries choose and allocate their workspaces


class GraphedProcess:
    """One process, one graph. On a CPU the same step runs without a graph: so it is tested where there is no GPU."""

    def __init__(self, student: Student, recipe: Recipe, rows: list[Row], features: Features) -> None:
        device, n, length = student.device, recipe.examples_per_step, recipe.max_length
        self.student, self.recipe, self.rows = student, recipe, rows
        self.table = _Table(rows, features, length, student)
        self.window = self.table.take(torch.full((n,), len(rows), device=device))
        self.positions = torch.arange(length, device=device).repeat(n)
        self.layout = [Rectangle(n * length, n, length, self.positions)]
        self.scale = torch.zeros((), device=device)  # one over the window's targets
        self.lr = torch.zeros((), device=device)
        groups = parameter_groups(student.model, recipe)
        self.parameters = [p for group in groups for p in group["params"]]
        on_gpu = device.type == "cuda"
        self.optimizer = adamw([group | {"lr": self.lr} for group in groups], recipe, capturable=on_gpu)
        self.graph = torch.cuda.CUDAGraph() if on_gpu else None
        self.result = self._capture() if self.graph is not None else torch.zeros(2)

    @staticmethod
    def fits(student: Student, recipe: Recipe) -> bool:
        """Whether a whole window, padded, is within what the recipe lets a micro-batch hold, and images are alike."""
        window = recipe.examples_per_step * recipe.max_length
        return student.model.config.model_type == "llava" and window <= recipe.tokens_per_micro_batch

    def step(self, window: Sequence[int], lr: float) -> Update:
        missing = self.recipe.examples_per_step - len(window)
        rows = torch.tensor([*window, *[len(self.rows)] * missing]).to(self.student.device)
        self.window.copy_(self.table.take(rows))
        self.scale.fill_(1.0 / sum(self.rows[k].n_supervised for k in window))
        self.lr.fill_(lr)
        if self.graph is not None:
            self.graph.replay()
        else:
            self.result = self._update()
        return Update(*self.result.tolist())

    def whole(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def _capture(self) -> torch.Tensor:
        """Record a step. The steps before it are over empty windows and leave the weights as they are."""
        assert self.graph is not None
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_STEPS):
                self._update()
        torch.cuda.current_stream().wait_stream(side)
        for parameter in self.parameters:
            for state in self.optimizer.state[parameter].values():
                state.zero_()
        with torch.cuda.graph(self.graph):
            return self._update()

    def _update(self) -> torch.Tensor:
        """One step over what lies in `window`: (loss, gradient norm)."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._loss()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.recipe.grad_clip)
        self.optimizer.step()
        return torch.stack([loss.detach(), norm])

    def _loss(self) -> torch.Tensor:
        window, model = self.window, self.student.model
        n, per_image = window.images.shape[:2]
        images = model.model.multi_modal_projector(window.images).flatten(0, 1)
        # Every token takes a slot of its row's image; those that stand for none leave it again. So a slot has its
        # gradient from one token alone, and in which order gradients are added does not matter.
        slots = window.slots + per_image * torch.arange(n, device=images.device)[:, None]
        embedded = torch.where(
            window.is_image.flatten()[:, None],
            images.index_select(0, slots.flatten()),
            model.get_input_embeddings()(window.tokens.flatten()),
        )
        with sdpa_kernel(SDPBackend.MATH):  # a GPU's fused kernels add gradients up in no fixed order
            hidden = self.student.parts.text(
                inputs_embeds=embedded[None],
                position_ids=self.positions[None],
                use_cache=False,
                layout=self.layout,
            ).last_hidden_state[0]
        logits = model.lm_head(hidden).float()
        return F.cross_entropy(logits, window.targets.flatten(), ignore_index=NO_TARGET, reduction="sum") * self.scale


@dataclass(frozen=True)
class _Window:
    """The rows of a step, padded: n rows of `length` tokens.

    Attributes:
        tokens, targets: int64 of shape (n, length); a token's target is the token after it, or NO_TARGET.
        slots: int64 of shape (n, length): which token of its row's image a token stands for.
        is_image: bool of shape (n, length): whether it does.
        images: Features of shape (n, tokens per image, width).
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    slots: torch.Tensor
    is_image: torch.Tensor
    images: torch.Tensor

    def copy_(self, other: _Window) -> None:
        """Write another window of the same shape over this one, where a graph reads it."""
        for field in fields(self):
            getattr(self, field.name).copy_(getattr(other, field.name))


class _Table:
    """All rows of a run on the device, padded to one length; behind them an empty one, for windows that are short."""

    def __init__(self, rows: list[Row], features: Features, length: int, student: Student) -> None:
        shape = (len(rows) + 1, length)
        tokens, targets = np.zeros(shape, np.int64), np.full(shape, NO_TARGET, np.int64)
        for k, row in enumerate(rows):
            n = len(row.tokens)
            tokens[k, :n] = row.tokens
            targets[k, : n - 1][row.supervised[1:]] = row.tokens[1:][row.supervised[1:]]
        is_image = tokens == student.parts.image_token
        keys = {key: k for k, key in enumerate(features)}
        none = torch.zeros_like(next(iter(features.values()))) if features else self._no_image(student)
        self.images = torch.stack([*features.values(), none])
        of_row = [len(keys) if row.image is None else keys[row.image] for row in rows]
        slots = np.where(is_image, is_image.cumsum(1) - 1, np.arange(length)) % len(none)
        self.tokens, self.targets, self.slots, self.is_image, self.image_of = (
            torch.from_numpy(values).to(student.device)
            for values in (tokens, targets, slots, is_image, np.array([*of_row, len(keys)]))
        )

    @staticmethod
    def _no_image(student: Student) -> torch.Tensor:
        """The features of no image at all, where no row has one."""
        return torch.zeros((1, student.parts.values_per_token), device=student.device)

    def take(self, rows: torch.Tensor) -> _Window:
        """The rows `rows`: int64 of shape (n,), the number of rows meaning the empty one."""
        tokens, targets, slots, is_image, image = (
            table.index_select(0, rows)
            for table in (self.tokens, self.targets, self.slots, self.is_image, self.image_of)
        )
        return _Window(tokens, targets, slots, is_image, self.images.index_select(0, image))
