"""How much memory of a GPU a student's training takes, from its architecture alone: counted, not tried.

What is counted is what autograd keeps of one token in one layer, the logits of the tokens that are targets, and the
weights with their gradients and moments. `tests/test_memory.py` holds the counts to what autograd does keep;
`experiments/benchmarks/memory.py --measure` holds the sums to the peaks of a card.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from curation_env.students import Card
from curation_env.training.families import parts_of
from curation_env.training.recipe import Recipe

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LOGIT_BYTES = 12  # of a target and a word, at most: log-probabilities, and two gradients of them, in fp32
#: Numbers of pixels that a frozen tower sees at a time on a GPU: what it computes on the way is not kept, but large.
PIXELS_AT_ONCE = 1 << 24
#: Targets whose logits are in memory at a time, where they are computed twice.
TARGETS_AT_ONCE = 512


class Load(NamedTuple):
    """What a micro-batch holds: tokens, those of them that stand for images, and those that are targets."""

    tokens: int
    of_images: int
    targets: int


@dataclass(frozen=True)
class Layer:
    """What a transformer layer is made of, as its modules say.

    Attributes:
        width, attention, inner: Numbers a token has between layers, in all heads of the queries, and inside the MLP.
        parameters: Of one layer.
        rms: Whether its norms compute in fp32 (RMSNorm); the others are LayerNorm.
        gated: Whether its MLP is (two matrices lead into it).
        fused: Whether queries, keys and values are one matrix' product.
    """

    width: int
    attention: int
    inner: int
    parameters: int
    rms: bool
    gated: bool
    fused: bool

    @classmethod
    def of(cls, module: nn.Module) -> Layer:
        linear = [
            (name.rpartition(".")[2], part) for name, part in module.named_modules() if isinstance(part, nn.Linear)
        ]
        out = next(part for name, part in linear if name in ("o_proj", "out_proj", "proj"))
        inner = max(part.in_features for _, part in linear)
        return cls(
            width=out.out_features,
            attention=out.in_features,
            inner=inner,
            parameters=sum(p.numel() for p in module.parameters()),
            rms=any("RMSNorm" in type(part).__name__ for part in module.modules()),
            gated=sum(part.out_features == inner for _, part in linear) > 1,
            fused=any(name == "qkv" for name, _ in linear),
        )

    def kept(self, itemsize: int, *, compiled: bool) -> int:
        """Bytes that autograd keeps of a token, with the kernels that attend without keeping their scores.

        Compiled, elementwise products are computed again in the backward pass: what is kept is both residuals, what
        the matrices multiply, and what attention reads and gives. Heads of keys and values are counted as those of the
        queries, which the kernel on a GPU repeats them to.
        """
        if compiled:
            return itemsize * (4 * self.width + 4 * self.attention + (3 if self.gated else 2) * self.inner)
        # The fp32 copy that an RMSNorm in half precision works on takes two numbers' room.
        norm = (2 + 4 // itemsize if self.rms else 2) * self.width
        # Queries, keys, values; the result, and again as the next matrix takes it. A fused product stays as well.
        attention = (7 if self.fused else 5) * self.attention
        return itemsize * (2 * norm + attention + (4 if self.gated else 3) * self.inner)

    def passing(self, itemsize: int) -> int:
        """Bytes of a token that a layer's backward pass takes beside what was kept: gradients of what lies between."""
        return itemsize * (4 * self.width + (4 if self.gated else 2) * self.inner)


@dataclass(frozen=True)
class Footprint:
    """What a student's training under a recipe takes: a fixed part, and what a micro-batch adds.

    Attributes:
        weights, trained: Bytes of all weights, and of those that train (their gradients take as much again, each of
            the two moments too).
        text, layers: The language model's layer and how many there are of it.
        tower, blocks: The vision tower's, likewise.
        patches: Patches of an image that become one token.
        vocabulary: Words that a target is one of.
        tied: Whether the embeddings are the head's matrix.
        tower_trains: Whether the tower does, and not only what follows it.
        feature_bytes: What a frozen tower's features take of a token of an image.
        pixels: Numbers of a patch.
        itemsize: Bytes of a number.
        compiled: Whether the layers of the language model are, as they are in half precision on a GPU.
    """

    weights: int
    trained: int
    text: Layer
    layers: int
    tower: Layer
    blocks: int
    patches: int
    vocabulary: int
    tied: bool
    tower_trains: bool
    feature_bytes: int
    pixels: int
    itemsize: int
    compiled: bool

    @classmethod
    def of(cls, model: Any, recipe: Recipe) -> Footprint:
        """Of a model in memory, or of its skeleton on the `meta` device."""
        itemsize = DTYPES[recipe.precision].itemsize
        parts = parts_of(model)
        parameters = dict(model.named_parameters())  # of those that are tied, one
        frozen = {name for name in parameters if name.startswith(recipe.freeze)}
        blocks = tower_blocks(parts.tower)
        in_tower = {id(p) for p in parts.tower.parameters()}
        embedding = next(m for m in parts.tower.modules() if isinstance(m, nn.Conv2d | nn.Conv3d | nn.Linear))
        pixels = embedding.weight[0].numel()
        return cls(
            weights=itemsize * sum(p.numel() for p in parameters.values()),
            trained=itemsize * sum(p.numel() for name, p in parameters.items() if name not in frozen),
            text=Layer.of(parts.text.layers[0]),
            layers=len(parts.text.layers),
            tower=Layer.of(blocks[0]),
            blocks=len(blocks),
            patches=parts.pixels_per_token // pixels,
            vocabulary=model.lm_head.out_features,
            tied=model.lm_head.weight is model.get_input_embeddings().weight,
            tower_trains=any(id(p) in in_tower for name, p in parameters.items() if name not in frozen),
            feature_bytes=itemsize * parts.values_per_token,
            pixels=pixels,
            itemsize=itemsize,
            compiled=recipe.precision == "bf16",
        )

    def activations(self, load: Load, *, checkpointing: bool = False) -> int:
        """Bytes that a micro-batch adds at the most: what its forward pass keeps, and what the backward pass takes.

        With checkpointing, a layer keeps what it was given; the rest is computed again, one layer at a time, and so
        are logits, some targets at a time.
        """
        text, size = self.text, self.itemsize
        kept = text.kept(size, compiled=self.compiled)
        at_once = load.tokens * text.passing(size) + size * text.parameters
        # Around the layers: their input, the last norm (in fp32, not compiled), what predicts targets.
        around = size * text.width * (5 * load.tokens + load.targets)
        if checkpointing:
            around += self.layers * load.tokens * size * text.width
            at_once += load.tokens * kept
        else:
            around += self.layers * load.tokens * kept
        around += self._tower(load, checkpointing)
        head = size * self.vocabulary * text.width  # the gradient of its matrix, before it is added up
        logits = self.vocabulary * LOGIT_BYTES * load.targets
        if checkpointing:
            logits = head + min(logits, self.vocabulary * LOGIT_BYTES * TARGETS_AT_ONCE)
        return around + max(logits, head + at_once) + (head if self.tied else 0)

    def _tower(self, load: Load, checkpointing: bool) -> int:
        """Bytes kept on the way from pixels to embeddings."""
        if not self.tower_trains:
            return load.of_images * (self.feature_bytes + 6 * self.itemsize * self.text.width)
        n, size = load.of_images * self.patches, self.itemsize
        kept = n * self.tower.kept(size, compiled=False)
        merging = n * size * (self.pixels + 5 * self.tower.width)
        return merging + (self.blocks * n * size * self.tower.width + kept if checkpointing else self.blocks * kept)

    def features(self, tokens: int) -> int:
        """Bytes of what a frozen tower's features of so many tokens of images take; none of one that trains."""
        return 0 if self.tower_trains else tokens * self.feature_bytes

    def seeing(self, tokens: int) -> int:
        """Bytes that a frozen tower takes while it sees images of so many tokens, a part of them at a time."""
        if self.tower_trains:
            return 0
        patches = min(tokens * self.patches, PIXELS_AT_ONCE // self.pixels + 1)
        # A layer's MLP and what lies around it; every layer's result, which LLaVA's chosen one is taken from.
        return patches * self.itemsize * (3 * self.tower.inner + (6 + self.blocks) * self.tower.width)


def tower_blocks(tower: nn.Module) -> nn.ModuleList:
    """The layers of a vision tower: the one list of modules that all of them have."""
    return next(module for module in tower.modules() if isinstance(module, nn.ModuleList))


def config_of(card: Card) -> Any:
    """A public student's configuration, as far as the library's defaults and its card say it."""
    from transformers import AutoConfig

    settings = {**card.architecture, "text_config": {**card.architecture["text_config"], **card.shape}}
    return AutoConfig.for_model(card.model_type, **settings)


def skeleton(config: Any) -> Any:
    """An architecture without weights, on the `meta` device."""
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    model.tie_weights()
    return model
