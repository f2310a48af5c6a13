"""Engines: what turns losses into updates. One process needs none of DeepSpeed; more share a step through it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, Protocol

import torch

from curation_env.training.data import Row
from curation_env.training.recipe import Recipe


class Engine(Protocol):
    def schedule(self, batches: list[list[Row]]) -> Iterator[tuple[list[Row], bool]]:
        """Yield this process's micro-batches of a window and whether each is its last."""

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Add the gradients of a share of the window's loss (its sum over batches and processes is the loss)."""

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """Return the sum of `value` over all processes."""

    def step(self, lr: float) -> float:
        """Clip, update, clear the gradients; return the gradient norm before clipping."""

    def finish(self) -> None:
        """Wait until every process is done with the weights."""


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of processes, as a launcher sets them."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def parameter_groups(model: torch.nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Trainable parameters: matrices decay, vectors (biases, norms) do not."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]


class SingleProcess:
    """Plain PyTorch: fused AdamW in the precision of the weights."""

    def __init__(self, model: torch.nn.Module, recipe: Recipe) -> None:
        groups = parameter_groups(model, recipe)
        self.parameters = [p for group in groups for p in group["params"]]
        self.grad_clip = recipe.grad_clip
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, eps=recipe.eps, fused=True)

    def schedule(self, batches: list[list[Row]]) -> Iterator[tuple[list[Row], bool]]:
        for k, batch in enumerate(batches):
            yield batch, k == len(batches) - 1

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        loss.backward()

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        return value

    def step(self, lr: float) -> float:
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.grad_clip)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def finish(self) -> None:
        pass


def make(model: torch.nn.Module, recipe: Recipe, world: int) -> Engine:
    """Return the engine for `world` processes."""
    return SingleProcess(model, recipe)
