"""Engines: what turns windows of rows into updates. Several processes share a step through DeepSpeed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from curation_env.training.data import Row, even_micro_batches
from curation_env.training.model import Features, Student
from curation_env.training.plan import Plan
from curation_env.training.recipe import Recipe


class Update(NamedTuple):
    """What a step did: the token mean of the loss over the whole window, and the gradient's norm before clipping."""

    loss: float
    grad_norm: float


class Engine(Protocol):
    def step(self, window: Sequence[int], lr: float) -> Update:
        """Take one optimizer step over the rows `window` (indices); every process is given the whole window."""

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


def adamw(groups: list[dict[str, Any]], recipe: Recipe, **options: Any) -> torch.optim.AdamW:
    """The recipe's optimizer over parameter groups, in the precision of the weights."""
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, eps=recipe.eps, fused=True, **options)


class SingleProcess:
    """Plain PyTorch, one micro-batch after the other."""

    def __init__(self, student: Student, recipe: Recipe, rows: list[Row], features: Features) -> None:
        self.student, self.recipe, self.rows, self.features = student, recipe, rows, features
        groups = parameter_groups(student.model, recipe)
        for group in groups:
            group["params"] = [self._updated(parameter) for parameter in group["params"]]
        self.parameters = [p for group in groups for p in group["params"]]
        self.optimizer = adamw(groups, recipe)

    def _updated(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """What the optimizer updates in a parameter's place."""
        return parameter

    def step(self, window: Sequence[int], lr: float) -> Update:
        tokens = sum(self.rows[k].n_supervised for k in window)
        total = torch.zeros((), device=self.student.device)
        for batch in _batches(self.rows, window, self.recipe):
            loss = self.student.token_losses(batch, self.features).sum() / tokens
            loss.backward()
            total += loss.detach()
        for parameter in self.parameters:
            if parameter.grad is None:  # the projector's, in a window without an image: zero, as for the other engines
                parameter.grad = torch.zeros_like(parameter)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.recipe.grad_clip)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return Update(*torch.stack([total, norm.to(total.device)]).tolist())

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

    def __init__(
        self, student: Student, recipe: Recipe, rows: list[Row], features: Features, rank: int, world: int, stage: int
    ) -> None:
        import deepspeed

        device = student.device
        if device.type == "cpu":
            # Its shared-memory collectives would be compiled here at run time, for minutes; gloo needs no compiler.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend="gloo" if device.type == "cpu" else "nccl", verbose=False)
        self.device, self.rank, self.world = device, rank, world
        self.recipe, self.rows, self.features = recipe, rows, features
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,  # counts nothing here: the window decides
            "gradient_accumulation_steps": 1,
            "gradient_clipping": recipe.grad_clip,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
        }
        if student.model.dtype == torch.bfloat16:
            # Its default keeps fp32 copies of the weights: more of them then change, which is another recipe.
            config["bf16"] = {
                "enabled": True,
                "bf16_master_weights_and_grads": True,
                "bf16_optimizer_states": True,
            }
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=_SummedLoss(student), optimizer=adamw(parameter_groups(student.model, recipe), recipe), config=config
        )

    def step(self, window: Sequence[int], lr: float) -> Update:
        tokens = sum(self.rows[k].n_supervised for k in window)
        total = torch.zeros((), device=self.device)
        for batch, last in self._shared(_batches(self.rows, window[self.rank :: self.world], self.recipe)):
            loss = self.engine(batch, self.features) / tokens
            self.engine.set_gradient_accumulation_boundary(last)
            # DeepSpeed means over processes; the window's loss is a sum over them.
            self.engine.backward(loss * self.world)
            total += loss.detach()
        torch.distributed.all_reduce(total)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()
        return Update(float(total), float(self.engine.get_global_grad_norm()))

    def _shared(self, batches: list[list[Row]]) -> Iterator[tuple[list[Row], bool]]:
        """Yield this process's micro-batches, and whether each is the last of the window.

        Every process takes part in every exchange of gradients: the others' surplus is met by empty batches.
        """
        most = torch.tensor(len(batches), device=self.device)
        torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
        for k in range(int(most)):
            yield batches[k] if k < len(batches) else [], k == int(most) - 1

    def finish(self) -> None:
        torch.distributed.barrier()


def _batches(rows: list[Row], window: Sequence[int], recipe: Recipe) -> list[list[Row]]:
    """The micro-batches of a window; within one, rows go by length, so that they pack tightly."""
    lengths = [len(rows[k].tokens) for k in window]
    return [[rows[window[k]] for k in batch] for batch in even_micro_batches(lengths, recipe.tokens_per_micro_batch)]


def make(
    student: Student, recipe: Recipe, rows: list[Row], features: Features, zero_stage: int, plan: Plan | None = None
) -> Engine:
    """Return the engine for this device and the number of processes that a launcher started.

    Args:
        plan: The way that the run takes on a GPU.
    """
    from curation_env.training.graph import GraphedProcess
    from curation_env.training.offload import OffloadedProcess

    rank, world = rank_and_world()
    if plan is not None:
        recipe = recipe.model_copy(update={"tokens_per_micro_batch": plan.tokens_per_micro_batch})
        student.checkpointing = plan.checkpointing
    if world > 1:
        return DeepSpeedEngine(student, recipe, rows, features, rank, world, zero_stage)
    if plan is not None and plan.way == "offload":
        return OffloadedProcess(student, recipe, rows, features)
    graphed = plan is not None and plan.way == "recipe" and GraphedProcess.fits(student, recipe)
    if graphed and isinstance(features, dict):
        return GraphedProcess(student, recipe, rows, features)
    return SingleProcess(student, recipe, rows, features)
