"""The student: a vision-language model that trains on packed rows, over cached image features where they are frozen."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint

from curation_env.errors import MissingAssets
from curation_env.training.data import Packed, Rectangle, Row
from curation_env.training.families import Tensors, parts_of
from curation_env.training.memory import DTYPES, PIXELS_AT_ONCE, TARGETS_AT_ONCE, Load, tower_blocks
from curation_env.training.recipe import Recipe

Features = Mapping[bytes, torch.Tensor]


def resolve_device(device: str, local_rank: int = 0) -> torch.device:
    """Turn "cpu", "cuda" or "auto" (a GPU if there is one) into a device."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        # fp32 is part of the recipe: TF32 products would be another precision.
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        return torch.device("cuda", local_rank)
    return torch.device(device)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    layout: Sequence[Rectangle] | None = None,
    ends: torch.Tensor | None = None,
    longest: int = 0,
    stored: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    present: torch.Tensor | None = None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each packed row: (1, heads, T, width) in, (1, T, heads, width) out.

    In half precision on a GPU a kernel for rows of any length does it, told by `ends` where they end and by `longest`
    what no row exceeds. Elsewhere rows are padded, to the longest of their run in `layout`, and only here: padding lies
    to the right of every row, so a causal mask alone keeps it out, and no other layer computes on it.

    Keys and values are kept in `stored`: those of a cache, (rows, cached, heads, width), and the slots of these tokens
    in it. Where one token a row is decoded, (rows, heads, 1, width) in, `present` says which cached ones each row sees:
    bool of shape (rows, 1, 1, cached).
    """
    if stored is not None:
        kept_keys, kept_values = _store(*stored, key, value)
        if present is not None:
            key, value = kept_keys, kept_values
    if present is not None:
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=present, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
        )
        return out.transpose(1, 2), None
    if ends is not None:
        groups = query.shape[1] // key.shape[1]
        q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
        if groups > 1:
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        attended = varlen_attn(q, k, v, ends, ends, longest, longest, scale=scaling, window_size=(-1, 0))
        assert isinstance(attended, torch.Tensor)
        return attended[None], None
    assert layout is not None
    parts = [states[0].transpose(0, 1).split([r.n for r in layout]) for states in (query, key, value)]
    mixed = []
    for rectangle, *states in zip(layout, *parts, strict=True):
        q, k, v = (_padded(flat, rectangle) for flat in states)
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
        )
        flat = out.transpose(1, 2).flatten(0, 1)
        mixed.append(flat if len(flat) == rectangle.n else flat.index_select(0, rectangle.slots))
    return torch.cat(mixed)[None], None


@torch.compiler.disable
def _store(
    keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write a layer's new keys and values into its cache, which the compiler would copy whole; return all of it."""
    for whole, new in ((keys, key), (values, value)):
        whole.flatten(0, 1).index_copy_(0, slots, new.transpose(1, 2).flatten(0, 1))
    return keys.transpose(1, 2), values.transpose(1, 2)


def _with_its_cache(layer: int, forward: Callable[..., Any], student: Student) -> Callable[..., Any]:
    """A layer's forward pass that finds its own part of the cache, where there is one.

    Compiled, kernels are fused, for packs of any length. What differs between layers is an argument: compiled code that
    saw a layer's number would be made again for each.
    """
    if student.any_length:
        forward = torch.compile(forward, dynamic=True)
    forward = _twice_where_asked(student, forward)

    def call(*args: Any, cache: Any = None, **options: Any) -> Any:
        return forward(*args, **options, **({} if cache is None else {"stored": cache.of(layer)}))

    return call


def _twice_where_asked(student: Student, forward: Callable[..., Any]) -> Callable[..., Any]:
    """A layer's forward pass that keeps what it was given alone, where the student says so: see `Student.twice`."""

    def call(*args: Any, **options: Any) -> Any:
        if student.twice and torch.is_grad_enabled():
            # Nothing here draws random numbers, so there is no state of theirs to keep.
            return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **options)
        return forward(*args, **options)

    return call


def _padded(flat: torch.Tensor, rectangle: Rectangle) -> torch.Tensor:
    """(n, heads, width) of a run of rows to (rows, heads, longest, width)."""
    if len(flat) < rectangle.rows * rectangle.longest:
        empty = flat.new_zeros((rectangle.rows * rectangle.longest, *flat.shape[1:]))
        flat = empty.index_copy(0, rectangle.slots, flat)
    return flat.unflatten(0, (rectangle.rows, rectangle.longest)).transpose(1, 2)


class Student:
    """A model on its device, with what training, generation and signals ask of it.

    Attributes:
        checkpointing: Whether a micro-batch has to compute its layers a second time in the backward pass, for want of
            memory for what they would keep.
        twice: Whether the one that is computed does.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        self.model = model
        self.device = device
        self.checkpointing: Callable[[Load], bool] = lambda load: False
        self.twice = False
        self.parts = parts_of(model)

    @classmethod
    def load(
        cls, folder: str | Path, recipe: Recipe, device: torch.device, attention: Literal["packed", "sdpa"] = "packed"
    ) -> Student:
        """Load a checkpoint in the recipe's precision and freeze what the recipe freezes.

        Args:
            attention: "packed" for losses of packed rows, "sdpa" for padded batches with a cache: nothing trains then.

        Raises:
            MissingAssets: There is no checkpoint at `folder`.
        """
        from transformers import AutoModelForImageTextToText
        from transformers.utils.logging import disable_progress_bar

        if not (Path(folder) / "config.json").is_file():
            raise MissingAssets(f"no checkpoint at {folder}: there is no config.json")
        disable_progress_bar()
        model: Any = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=DTYPES[recipe.precision], local_files_only=True, attn_implementation="sdpa"
        )
        return cls.of(model, recipe, device, attention)

    @classmethod
    def of(cls, model: Any, recipe: Recipe, device: torch.device, attention: str) -> Student:
        """Make a student of a model that is in memory; see `load`."""
        from transformers import AttentionInterface

        AttentionInterface.register("packed", packed_attention)
        model.to(device)
        trains = attention == "packed"
        student = cls(model, device)
        if student.any_length:
            attention = "packed"  # which decodes there, too
        model.set_attn_implementation({"text_config": attention})
        for k, layer in enumerate(student.parts.text.layers):
            layer.forward = _with_its_cache(k, layer.forward, student)
        model.eval()  # the students have no dropout: eval and train modes are the same function
        for name, parameter in model.named_parameters():
            if not trains or any(name.startswith(prefix) for prefix in recipe.freeze):
                parameter.requires_grad_(False)
        for block in tower_blocks(student.parts.tower):
            block.forward = _twice_where_asked(student, block.forward)
        return student

    @property
    def any_length(self) -> bool:
        """Whether one kernel attends within rows of any length: in half precision on a GPU."""
        return self.device.type == "cuda" and self.model.dtype in (torch.bfloat16, torch.float16)

    @functools.cached_property
    def tower_trains(self) -> bool:
        """Whether what the tower says of an image changes with every step: its pixels are kept then, not features."""
        return any(parameter.requires_grad for parameter in self.parts.tower.parameters())

    def see(self, pixels: Tensors) -> Tensors:
        """Return what is kept of images: a frozen tower's features; their pixels, where it trains and sees later."""
        if self.tower_trains:
            return pixels
        found: list[torch.Tensor] = []
        for portion in self._portions(pixels):
            with torch.inference_mode():
                seen = self.parts.see(self._moved(portion))
            # Out of inference mode: training keeps them for the backward pass.
            found += [part.clone() for part in seen]
        return found

    def _portions(self, pixels: Tensors) -> Iterator[Tensors]:
        """Cut images into runs that a GPU's memory holds while the tower computes on them; a CPU gets all of them."""
        start = taken = 0
        for k, part in enumerate(pixels if self.device.type == "cuda" else ()):
            if start < k and taken + part.numel() > PIXELS_AT_ONCE:
                yield pixels[start:k]
                start, taken = k, 0
            taken += part.numel()
        yield pixels[start:]

    def _moved(self, values: Tensors) -> Tensors:
        if isinstance(values, torch.Tensor):
            return values.to(self.device, self.model.dtype, non_blocking=True)
        return [part.to(self.device, self.model.dtype, non_blocking=True) for part in values]

    def embed(self, tokens: torch.Tensor, image_slots: torch.Tensor, images: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return embeddings of a flat run of tokens, (T, width), with those of the images in their slots."""
        embedded = self.model.get_input_embeddings()(tokens)
        if not images:
            return embedded
        seen = self.parts.see(self._moved(images)) if self.tower_trains else images
        return embedded.index_copy(0, image_slots, self.parts.project(seen))

    def layout(self, packed: Packed) -> dict[str, Any]:
        """What `packed_attention` has to know of packed rows."""
        if self.any_length:
            return {"ends": packed.ends, "longest": self.model.config.text_config.max_position_embeddings}
        return {"layout": packed.rectangles}

    def token_losses(self, rows: Sequence[Row], features: Features) -> torch.Tensor:
        """Return the cross-entropy of every supervised token of `rows`, packed: shape (S,), row after row."""
        packed = Packed.of(rows, self.parts.image_token, self.device)
        self.twice = self.checkpointing(Load(len(packed.tokens), len(packed.image_slots), len(packed.targets)))
        embedded = self.embed(packed.tokens, packed.image_slots, [features[key] for key in packed.images])
        hidden = self.parts.text(
            inputs_embeds=embedded[None],
            position_ids=packed.positions.unsqueeze(-2),
            use_cache=False,
            **self.layout(packed),
        ).last_hidden_state[0]
        predicting = hidden.index_select(0, packed.sources)
        if not self.twice:
            return self._losses(predicting, packed.targets)
        parts = zip(predicting.split(TARGETS_AT_ONCE), packed.targets.split(TARGETS_AT_ONCE), strict=True)
        losses = _twice_where_asked(self, self._losses)
        return torch.cat([losses(states, targets) for states, targets in parts])

    def _losses(self, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Cross-entropies, (S,), of the targets, (S,), that hidden states, (S, width), predict."""
        return F.cross_entropy(self.model.lm_head(states).float(), targets, reduction="none")

    def tower_digest(self) -> bytes:
        """Digest of the vision tower's weights: what cached features depend on besides the images."""
        digest = hashlib.blake2b(digest_size=16)
        for name, tensor in sorted(self.parts.tower.state_dict().items()):
            digest.update(name.encode() + tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.digest()

    def save(self, folder: Path, init: str | Path) -> None:
        """Write a checkpoint folder that `from_pretrained` loads, whole or not at all."""
        scratch = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
        shutil.rmtree(scratch, ignore_errors=True)
        self.model.save_pretrained(scratch)
        for file in sorted(Path(init).iterdir()):
            if (
                file.is_file()
                and not (scratch / file.name).exists()
                and not file.name.endswith((".safetensors", ".bin", "SHA256SUMS"))
            ):
                shutil.copy(file, scratch / file.name)
        shutil.rmtree(folder, ignore_errors=True)
        scratch.rename(folder)
