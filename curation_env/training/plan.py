"""Which way a training run goes on the GPU that it has: decided before anything is loaded, and recorded.

In this order: as the recipe says; with layers computed again in the backward pass of micro-batches that would not fit
otherwise; in smaller micro-batches; with gradients and moments in the host's memory; else not at all. Neither way is
another recipe: the rows of a step, its loss and its update are the same, but for the order in which sums are taken.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from curation_env.errors import OutOfMemory
from curation_env.students import Card
from curation_env.training.data import Row, even_micro_batches
from curation_env.training.families import parts_of
from curation_env.training.images import CACHE_BYTES
from curation_env.training.memory import Footprint, Load, config_of, skeleton
from curation_env.training.recipe import Recipe

log = logging.getLogger(__name__)
GIB = 1 << 30
#: What cards of a size have at the least, in GiB: A10 and L4, A40 and L40S, A100 and H100.
SIZES = {"24 GB": 22.5, "48 GB": 44.9, "80 GB": 79.1}
INACCURACY = 1.04  # what is computed may be short by this factor: kernels' workspaces, memory in pieces
RESERVE = 768 << 20  # what libraries load onto a card on top of that
CONTEXT = 512 << 20  # what a process takes of a card before it computes anything
SHARED_BUCKET = 500_000_000  # numbers that DeepSpeed gathers before it exchanges them: its default
HOST_COPIES = 4  # of what trains, in the host's memory by offload: weights, gradients, two moments
WAYS = {
    "recipe": "as the recipe says",
    "checkpointing": "with layers computed twice where that is needed (checkpointing)",
    "smaller": "in smaller micro-batches, with checkpointing",
    "offload": "by offload: gradients and moments in the host's memory",
}

Way = Literal["recipe", "checkpointing", "smaller", "offload"]


class Gpu(NamedTuple):
    """A GPU: its name, and bytes that it has and that this process may still take."""

    name: str
    total: int
    free: int


class Machine(NamedTuple):
    """What training may take: bytes of the GPU (as `Gpu.free`) and of the host."""

    free: int
    host: int


class Shares(NamedTuple):
    """How many processes share a step, and by which of ZeRO's stages (0: none)."""

    world: int = 1
    stage: int = 0


ALONE = Shares()


@dataclass(frozen=True)
class Plan:
    """The way of a run.

    Attributes:
        tokens_per_micro_batch: At most; what the recipe says, or less.
        room: Bytes that a micro-batch may take.
        needed: Bytes of the GPU at the peak, computed.
        host: Bytes of the host's memory.
        checkpointed: How many of the run's micro-batches compute layers twice.
    """

    way: Way
    footprint: Footprint
    tokens_per_micro_batch: int
    room: int
    needed: int
    host: int
    checkpointed: int
    micro_batches: int

    def checkpointing(self, load: Load) -> bool:
        """Whether a micro-batch has to compute its layers twice."""
        return self.footprint.activations(load) > self.room

    def applied(self, recipe: Recipe) -> Recipe:
        """The recipe in micro-batches of this size."""
        return recipe.model_copy(update={"tokens_per_micro_batch": self.tokens_per_micro_batch})

    def record(self) -> dict[str, Any]:
        """What a run's journal says of it, as JSON data."""
        return {
            "way": self.way,
            "tokens_per_micro_batch": self.tokens_per_micro_batch,
            "micro_batches": self.micro_batches,
            "checkpointed": self.checkpointed,
            "needed_gib": round(self.needed / GIB, 2),
            "host_gib": round(self.host / GIB, 2),
        }

    def describe(self) -> str:
        text = f"{WAYS[self.way]}: {_gib(self.needed)} at up to {self.tokens_per_micro_batch:,} tokens a micro-batch"
        return text + (f", and {_gib(self.host)} of the host's memory" if self.host else "")


def choose(
    footprint: Footprint,
    tokens_per_micro_batch: int,
    longest: int,
    loads: Callable[[int], Sequence[Load]],
    machine: Machine,
    *,
    features: int = 0,
    seen: int = 0,
    shares: Shares = ALONE,
) -> Plan:
    """Choose the first way that fits.

    Args:
        tokens_per_micro_batch: The recipe's.
        longest: Tokens of the longest row: no micro-batch can be smaller.
        loads: Gives the micro-batches of a run in which none holds more than so many tokens.
        features: Bytes of the features of images that are kept.
        seen: Tokens of images that a frozen tower sees in the course of a step.

    Raises:
        OutOfMemory: None does; says what the least one needs.
    """
    free = int((machine.free - RESERVE) / INACCURACY)
    least = 0
    for offload in (False, True):
        fixed = features + (footprint.weights if offload else _held(footprint, shares))
        # The tower sees images before a step has gradients.
        sight = features + footprint.weights + footprint.seeing(seen) + (0 if offload else 2 * footprint.trained)
        host = HOST_COPIES * footprint.trained if offload else 0
        room = free - fixed
        for tokens in _budgets(tokens_per_micro_batch, longest):
            found = loads(tokens)
            plain = [footprint.activations(load) for load in found]
            heavy = [load for load, taken in zip(found, plain, strict=True) if taken > room]
            again = [footprint.activations(load, checkpointing=True) for load in heavy]
            needed = max(sight, fixed + max([*(taken for taken in plain if taken <= room), *again], default=0))
            least = min(least or needed, needed)
            if needed > free or host > machine.host or (offload and shares.world > 1):
                continue
            way: Way = "checkpointing" if heavy else "recipe"
            if offload or tokens < tokens_per_micro_batch:
                way = "offload" if offload else "smaller"
            return Plan(way, footprint, tokens, room, needed, host, len(heavy), len(found))
    raise OutOfMemory(_refusal(footprint, machine, least))


def of_run(
    init: str | Path,
    recipe: Recipe,
    rows: Sequence[Row],
    windows: Sequence[Sequence[int]],
    machine: Machine,
    shares: Shares = ALONE,
) -> Plan:
    """Choose the way of a run before its weights are loaded; see `choose`.

    Args:
        windows: Indices of the rows that a process has in a step, for every step and process.

    Raises:
        OutOfMemory: There is none.
    """
    from transformers import AutoConfig

    model = skeleton(AutoConfig.from_pretrained(init, local_files_only=True))
    footprint = Footprint.of(model, recipe)
    image_token = parts_of(model).image_token
    each = [Load(len(row.tokens), int((row.tokens == image_token).sum()), row.n_supervised) for row in rows]

    def loads(tokens: int) -> list[Load]:
        return micro_batch_loads([[each[k] for k in window] for window in windows], tokens)

    distinct = {row.image: load.of_images for row, load in zip(rows, each, strict=True) if row.image is not None}
    seen, features = sum(distinct.values()), footprint.features(sum(distinct.values()))
    if features > CACHE_BYTES:
        seen = max(sum(each[k].of_images for k in window) for window in windows)
        features = 2 * footprint.features(seen)  # a step's, and the last one's until they are there
    plan = choose(
        footprint,
        recipe.tokens_per_micro_batch,
        max(load.tokens for load in each),
        loads,
        machine,
        features=features,
        seen=seen,
        shares=shares,
    )
    log.info("training %s", plan.describe())
    return plan


def of_worst(card: Card, recipe: Recipe, machine: Machine) -> Plan:
    """Choose the way of a public student's worst steps, whatever rows are selected; nothing of it need be here.

    Raises:
        OutOfMemory: There is none.
    """
    windows = worst_windows(card, recipe)
    return choose(
        Footprint.of(skeleton(config_of(card)), recipe),
        recipe.tokens_per_micro_batch,
        recipe.max_length,
        lambda tokens: micro_batch_loads(windows, tokens),
        machine,
        seen=recipe.examples_per_step * card.image_tokens,
    )


def worst_windows(card: Card, recipe: Recipe) -> list[list[Load]]:
    """Steps whose rows all have the most tokens: with the largest image each, and, where rows can, without one.

    Every token that is none of the image's is a target.
    """
    images = [card.image_tokens] if recipe.text_only_image == "black" else [card.image_tokens, 0]
    rows = [Load(recipe.max_length, taken, recipe.max_length - taken - 1) for taken in images]
    return [[row] * recipe.examples_per_step for row in rows]


def micro_batch_loads(windows: Sequence[Sequence[Load]], tokens: int) -> list[Load]:
    """What the micro-batches of steps hold, each of at most `tokens` tokens, given what every row does."""
    found = []
    for rows in windows:
        for batch in even_micro_batches([row.tokens for row in rows], tokens):
            found.append(Load(*(sum(values) for values in zip(*(rows[k] for k in batch), strict=True))))
    return found


def _budgets(tokens: int, longest: int) -> list[int]:
    """The recipe's tokens of a micro-batch, its halves, and no less than the longest row."""
    found = [tokens]
    while found[-1] > longest:
        found.append(max(longest, found[-1] // 2))
    return found


def _held(footprint: Footprint, shares: Shares) -> int:
    """Bytes of weights, gradients and moments on one GPU."""
    weights, trained, world = footprint.weights, footprint.trained, shares.world
    if world == 1 or shares.stage == 0:
        return weights + 3 * trained
    # Of the moments, and of the weights that it updates, a process holds its share.
    gradients = trained if shares.stage == 1 else trained // world
    return weights + gradients + 3 * trained // world + 2 * SHARED_BUCKET * footprint.itemsize


def _refusal(footprint: Footprint, machine: Machine, least: int) -> str:
    wanted = int(least * INACCURACY) + RESERVE
    text = f"training takes {_gib(wanted)} of GPU memory at the least, {_gib(machine.free)} are free: "
    if wanted > machine.free:
        return (
            text + "nothing was trained. Free the card of other processes, raise gpu_memory_gib, or use a larger card"
        )
    host = HOST_COPIES * footprint.trained
    return text + f"that way, by offload, takes {_gib(host)} of the host's memory, {_gib(machine.host)} are available"


def _gib(n: int) -> str:
    return f"{n / GIB:.1f} GiB"


def read_gpu(device: torch.device) -> Gpu:
    """What this process may still take of a GPU, within the limit that `limit_gpu` set."""
    gc.collect()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    allowed = int(torch.cuda.get_per_process_memory_fraction(device) * total)
    within = allowed - torch.cuda.memory_reserved(device)
    return Gpu(torch.cuda.get_device_name(device), total, max(0, min(free, within)))


def machine_of(size: str) -> Machine:
    """A card of one of the `SIZES` that nothing else uses, in a host with as much memory as is wanted."""
    return Machine(int(SIZES[size] * GIB) - CONTEXT, 1 << 50)


def read_machine(device: torch.device) -> Machine:
    """What there is to choose by."""
    return Machine(read_gpu(device).free, host_memory())


def host_memory() -> int:
    """Bytes of memory that are available on this machine."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return 0


def limit_gpu(gib: float | None) -> None:
    """Let this process take at most so much of each GPU (None: all of it); what it holds already counts."""
    if torch.cuda.is_available() and (gib is not None or torch.cuda.is_initialized()):
        for k in range(torch.cuda.device_count()):
            total = torch.cuda.get_device_properties(k).total_memory
            torch.cuda.set_per_process_memory_fraction(1.0 if gib is None else min(1.0, gib * GIB / total), k)
