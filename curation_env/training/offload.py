"""ZeRO-Offload's way for one process: gradients and moments in the host's memory, where the update is computed, too.

A GPU then holds weights and activations alone. DeepSpeed's own offload keeps moments in the recipe's half precision
with its compiled optimizer only; this is PyTorch's, the same as on the GPU, and needs no compiler.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence

import torch

from curation_env.training.data import Row
from curation_env.training.engine import SingleProcess, Update
from curation_env.training.model import Features, Student
from curation_env.training.recipe import Recipe


class OffloadedProcess(SingleProcess):
    """Plain PyTorch with an optimizer over copies of the weights in the host's memory."""

    def __init__(self, student: Student, recipe: Recipe, rows: list[Row], features: Features) -> None:
        self.on_gpu = student.device.type == "cuda"
        self.copies: dict[torch.nn.Parameter, torch.Tensor] = {}
        # Kept between steps: to ask for memory of this size anew takes longer than to use it.
        self.gradients: dict[torch.nn.Parameter, torch.Tensor] = {}
        widest = max(p.numel() for p in student.model.parameters() if p.requires_grad)
        # Pinned, so that copies to and from the GPU are as fast as the bus.
        self.passage = torch.empty(widest, dtype=student.model.dtype, pin_memory=self.on_gpu)
        super().__init__(student, recipe, rows, features)

    def _updated(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        copy = parameter.detach().to("cpu", copy=True)
        copy.grad = self.gradients[parameter] = torch.zeros_like(copy)
        self.copies[parameter] = copy
        parameter.register_post_accumulate_grad_hook(self._collect)
        return copy

    def _collect(self, parameter: torch.nn.Parameter) -> None:
        """Add a parameter's gradient up on the host as soon as it is there, and free it."""
        assert parameter.grad is not None
        with self._all_cores():
            self.gradients[parameter].add_(self._through(parameter).copy_(parameter.grad))
        parameter.grad = None

    def step(self, window: Sequence[int], lr: float) -> Update:
        with self._all_cores():
            update = super().step(window, lr)
            with torch.no_grad():
                for parameter, copy in self.copies.items():
                    parameter.copy_(self._through(parameter).copy_(copy))
                    copy.grad = self.gradients[parameter].zero_()
        return update

    def _through(self, parameter: torch.Tensor) -> torch.Tensor:
        return self.passage[: parameter.numel()].view_as(parameter)

    @contextlib.contextmanager
    def _all_cores(self) -> Iterator[None]:
        """Compute on the host with all of its cores, beside a GPU; one core elsewhere, for the same bits."""
        before = torch.get_num_threads()
        if self.on_gpu:
            torch.set_num_threads(len(os.sched_getaffinity(0)))
        try:
            yield
        finally:
            if self.on_gpu:
                torch.set_num_threads(before)
