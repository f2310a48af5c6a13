"""Engines: what turns windows of rows into updates. Several processes share a step through DeepSpeed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Container, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from curation_env.training.data import Row
from curation_env.training.model import Features, Student
from curation_env.training.plan import Plan
from curation_env.training.recipe import Recipe
from curation_env.training.share import MicroBatch, even_shares, packed, share

REDUCE_BUCKET = 200_000_000  # parameters whose gradients are exchanged at a time


class Update(NamedTuple):
    """What a step did: the token mean of the loss over the whole window, and the gradient's norm before clipping."""

    loss: float
    grad_norm: float


class Engine(Protocol):
    def step(self, window: Sequence[int], lr: float) -> Update:
        """Take one optimizer step over the rows `window` (indices); every process is given the whole window."""

    def whole(self) -> contextlib.AbstractContextManager[None]:
        """Hold the weights whole, on every process: all of them enter, and leave together."""


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of processes, as a launcher sets them."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def join(device: torch.device) -> None:
    """Join the processes that share this run."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    if device.type == "cpu":
        # Its shared-memory collectives would be compiled here at run time, for minutes; gloo needs no compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    else:
        torch.cuda.set_device(device)
    deepspeed.init_distributed(dist_backend="gloo" if device.type == "cpu" else "nccl", verbose=False)


def least(values: Sequence[int], device: torch.device) -> list[int]:
    """The least of what each process has, one by one; the values themselves where there is one process."""
    if rank_and_world()[1] == 1:
        return list(values)
    together = torch.tensor(list(values), device=device)
    torch.distributed.all_reduce(together, op=torch.distributed.ReduceOp.MIN)
    return together.tolist()


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
        total = self._gradients(window)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.recipe.grad_clip)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return Update(*torch.stack([total, norm.to(total.device)]).tolist())

    def _gradients(self, window: Sequence[int]) -> torch.Tensor:
        """Leave every parameter with its gradient over the window, and return the window's loss."""
        tokens = sum(self.rows[k].n_supervised for k in window)
        total = torch.zeros((), device=self.student.device)
        for batch in self._micro_batches(window):
            loss = self.student.token_losses(batch, self.features).sum() / tokens
            loss.backward()
            total += loss.detach()
        for parameter in self.parameters:
            if parameter.grad is None:  # the projector's, in a window without an image: zero, as for the other engines
                parameter.grad = torch.zeros_like(parameter)
        return total

    def _micro_batches(self, window: Sequence[int]) -> Iterable[list[Row]]:
        """Rows of each forward pass."""
        return packed(self.rows, window, self.recipe)

    def whole(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


class Replicas(SingleProcess):
    """Data parallelism: every process has weights and moments whole, and trains on its share of a window's rows.

    Gradients are summed up once a step, a parameter at a time, while the last micro-batch is still on its way back.
    """

    def __init__(
        self, student: Student, recipe: Recipe, rows: list[Row], features: Features, rank: int, world: int
    ) -> None:
        super().__init__(student, recipe, rows, features)
        self.rank, self.world = rank, world
        # All processes must sum up in one order. Gradients are there from the last parameter to the first, but for what
        # a process's rows leave out.
        self._order = [p for p in student.model.parameters() if p.requires_grad][::-1]
        self._sums: list[torch.distributed.Work] = []
        self._there: set[torch.nn.Parameter] = set()
        self._last = False
        for parameter in self._order:
            parameter.register_post_accumulate_grad_hook(self._collect)

    def _micro_batches(self, window: Sequence[int]) -> Iterator[list[Row]]:
        own = even_shares(self.rows, window, self.world)[self.rank]
        batches = list(super()._micro_batches(own))
        for k, batch in enumerate(batches):
            self._last = k == len(batches) - 1
            yield batch

    def _collect(self, parameter: torch.nn.Parameter) -> None:
        if self._last:
            self._there.add(parameter)
            self._sum_up(self._there)

    def _sum_up(self, there: Container[torch.nn.Parameter]) -> None:
        """Start the sums of the parameters that are next in the order, as far as their gradients are there."""
        while len(self._sums) < len(self._order) and (parameter := self._order[len(self._sums)]) in there:
            self._sums.append(torch.distributed.all_reduce(parameter.grad, async_op=True))

    def _gradients(self, window: Sequence[int]) -> torch.Tensor:
        self._sums, self._last = [], False
        self._there.clear()
        total = super()._gradients(window)
        self._sum_up(set(self._order))
        torch.distributed.all_reduce(total)
        for each in self._sums:
            each.wait()
        return total


class _SummedLoss(torch.nn.Module):
    """The forward pass that the processes' exchange is wrapped around: it does its bookkeeping at the start of each.

    It holds what trains. A frozen tower stays whole on every process, which runs it when it needs its images.
    """

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.trained = torch.nn.ModuleList(_trained(student.model))
        self.student = student

    def forward(self, batch: MicroBatch, features: Features) -> torch.Tensor:
        losses = self.student.token_losses(batch.rows, features)
        return losses[: batch.targets].sum() + 0.0 * losses[batch.targets :].sum()


def _trained(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The largest parts of a module all of whose parameters train."""
    trains = [parameter.requires_grad for parameter in module.parameters()]
    if trains and all(trains):
        yield module
    elif any(trains):
        for child in module.children():
            yield from _trained(child)


class DeepSpeedEngine:
    """DeepSpeed's ZeRO over the same AdamW, for processes that have joined (`join`).

    Every process holds a share of the moments (stage 1), of the gradients too (2), of the weights too (3). Stage 1
    exchanges gradients once a step, during the last micro-batch; the others with every micro-batch.
    """

    def __init__(
        self, student: Student, recipe: Recipe, rows: list[Row], features: Features, rank: int, world: int, stage: int
    ) -> None:
        import deepspeed

        device = student.device
        self.device, self.rank, self.world, self.stage = device, rank, world, stage
        self.recipe, self.rows, self.features = recipe, rows, features
        self.parameters = [p for group in parameter_groups(student.model, recipe) for p in group["params"]]
        zero: dict[str, Any] = {"stage": stage, "overlap_comm": device.type == "cuda"}
        if stage == 3:  # vectors stay whole: gathering them anew would cost more than it saves
            zero["stage3_param_persistence_threshold"] = max(p.numel() for p in self.parameters if p.ndim < 2)
        else:
            zero["reduce_bucket_size"] = REDUCE_BUCKET
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,  # counts nothing here: the window decides
            "gradient_accumulation_steps": 1,
            "gradient_clipping": recipe.grad_clip,
            "zero_optimization": zero,
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
        batches = share(self.rows, window, self.recipe, self.rank, self.world)
        for k, batch in enumerate(batches):
            loss = self.engine(batch, self.features) / tokens
            self.engine.set_gradient_accumulation_boundary(k == len(batches) - 1)
            # DeepSpeed means over processes; the window's loss is a sum over them.
            self.engine.backward(loss * self.world)
            total += loss.detach()
        torch.distributed.all_reduce(total)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()
        return Update(float(total), float(self.engine.get_global_grad_norm()))

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        import deepspeed

        with deepspeed.zero.GatheredParameters(self.parameters, enabled=self.stage == 3):
            yield
        torch.distributed.barrier()


def make(
    student: Student, recipe: Recipe, rows: list[Row], features: Features, zero_stage: int, plan: Plan | None = None
) -> Engine:
    """Return the engine for this device and the number of processes that a launcher started.

    Args:
        recipe: With micro-batches as the plan has them.
        plan: The way that the run takes on a GPU.
    """
    from curation_env.training.graph import GraphedProcess
    from curation_env.training.offload import OffloadedProcess

    rank, world = rank_and_world()
    if plan is not None and (world == 1 or zero_stage < 3):
        student.checkpointing = plan.checkpointing
    elif plan is not None:  # all processes gather weights in the same order, so all of them do it, or none
        whole = plan.checkpointed > 0
        student.checkpointing = lambda load: whole
    if world > 1 and zero_stage == 0:
        return Replicas(student, recipe, rows, features, rank, world)
    if world > 1:
        return DeepSpeedEngine(student, recipe, rows, features, rank, world, zero_stage)
    if plan is not None and plan.way == "offload":
        return OffloadedProcess(student, recipe, rows, features)
    graphed = plan is not None and plan.way == "recipe" and GraphedProcess.fits(student, recipe)
    if graphed and isinstance(features, dict):
        return GraphedProcess(student, recipe, rows, features)
    return SingleProcess(student, recipe, rows, features)
