"""Engines: what turns losses into updates. One process needs none of DeepSpeed; more share a step through it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, Protocol

import torch

from curation_env.training.data import Row
from curation_env.training.model import Features, Student
from curation_env.training.recipe import Recipe


class Engine(Protocol):
    def loss(self, rows: list[Row], features: Features) -> torch.Tensor:
        """Return the summed loss over the supervised tokens of a micro-batch."""

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

    def __init__(self, student: Student, recipe: Recipe) -> None:
        self.student = student
        groups = parameter_groups(student.model, recipe)
        self.parameters = [p for group in groups for p in group["params"]]
        self.grad_clip = recipe.grad_clip
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, eps=recipe.eps, fused=True)

    def loss(self, rows: list[Row], features: Features) -> torch.Tensor:
        return self.student.token_losses(rows, features).sum()

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


class _SummedLoss(torch.nn.Module):
    """The forward pass that DeepSpeed wraps: it does its bookkeeping at the start of each."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.model = student.model
        self.student = student

    def forward(self, rows: list[Row], features: Features) -> torch.Tensor:
        # Zero times every trainable parameter keeps each of them in the graph, also where no row has an image or where
        # there is no row, so that all processes exchange the same gradients.
        anchor = sum(
            (p.sum() for p in self.model.parameters() if p.requires_grad), torch.zeros((), device=self.student.device)
        )
        total = 0.0 * anchor
        return total + self.student.token_losses(rows, features).sum() if rows else total


class DeepSpeedEngine:
    """DeepSpeed's ZeRO stage 1 or 2 over the same AdamW: every process holds a share of the moments (and gradients)."""

    def __init__(self, student: Student, recipe: Recipe, world: int, zero_stage: int) -> None:
        import deepspeed

        device = student.device
        if device.type == "cpu":
            # Its shared-memory collectives would be compiled here at run time, for minutes; gloo needs no compiler.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend="gloo" if device.type == "cpu" else "nccl", verbose=False)
        groups = parameter_groups(student.model, recipe)
        self.device, self.world = device, world
        optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, eps=recipe.eps, fused=True)
        config = {
            "train_micro_batch_size_per_gpu": 1,  # counts nothing here: the window decides
            "gradient_accumulation_steps": 1,
            "gradient_clipping": recipe.grad_clip,
            "zero_optimization": {"stage": zero_stage},
            "zero_allow_untested_optimizer": True,
        }
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=_SummedLoss(student), optimizer=optimizer, config=config
        )

    def loss(self, rows: list[Row], features: Features) -> torch.Tensor:
        return self.engine(rows, features)

    def schedule(self, batches: list[list[Row]]) -> Iterator[tuple[list[Row], bool]]:
        """Every process takes part in every exchange of gradients: the others' surplus is met by empty batches."""
        most = torch.tensor(len(batches), device=self.device)
        torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
        for k in range(int(most)):
            yield batches[k] if k < len(batches) else [], k == int(most) - 1

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        # DeepSpeed means over processes; the window's loss is a sum over them.
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * self.world)

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        total = value.clone()
        torch.distributed.all_reduce(total)
        return total

    def step(self, lr: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def finish(self) -> None:
        torch.distributed.barrier()


def make(student: Student, recipe: Recipe, world: int, zero_stage: int) -> Engine:
    """Return the engine for `world` processes."""
    return SingleProcess(student, recipe) if world == 1 else DeepSpeedEngine(student, recipe, world, zero_stage)
