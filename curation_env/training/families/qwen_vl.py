"""Qwen2-VL and Qwen2.5-VL: images keep their shape, their tokens have positions in three dimensions.

The tower and its merger are one module: what it says of an image is the embeddings of its tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from curation_env.errors import StageFailed
from curation_env.training.families.base import Images, Layout, Parts, Tensors, read_processor

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

LONGEST_SHAPE = 200  # the processor takes no image that is longer than this many times its width


def of_folder(folder: Path, config: dict[str, Any]) -> QwenImages:
    """Images of a checkpoint folder."""
    return QwenImages(config["image_token_id"], read_processor(folder), folder)


class QwenImages(Images):
    """One placeholder an image, which stands for as many tokens as its shape and the processor's limits make.

    Args:
        settings: Of the image processor.
    """

    placeholder = "<|image_pad|>"

    def __init__(self, token: int, settings: dict[str, Any], folder: Path) -> None:
        self.token = token
        self._folder = folder
        size = settings.get("size") or {}
        self._least = settings.get("min_pixels") or size.get("shortest_edge") or 56 * 56
        self._most = settings.get("max_pixels") or size.get("longest_edge") or 28 * 28 * 1280
        self._side = settings.get("patch_size", 14) * settings.get("merge_size", 2)  # pixels of a token

    def layout(self, width: int, height: int) -> Layout:
        if max(width, height) > LONGEST_SHAPE * min(width, height):
            raise StageFailed(f"an image of {width} x {height} pixels: Qwen takes none longer than 200 times its width")
        rows, columns = self._grid(height, width)
        return Layout(self.placeholder, (rows * columns,), (rows, columns))

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens: the nearest whole ones, or the shape scaled into the processor's limits."""
        side = self._side
        rows, columns = round(height / side), round(width / side)
        pixels = rows * columns * side**2
        if pixels > self._most:
            scale = math.sqrt(height * width / self._most)
            rows, columns = (max(1, math.floor(edge / scale / side)) for edge in (height, width))
        elif pixels < self._least:
            scale = math.sqrt(self._least / (height * width))
            rows, columns = (math.ceil(edge * scale / side) for edge in (height, width))
        return rows, columns

    def positions(self, tokens: np.ndarray, layouts: Sequence[Layout]) -> np.ndarray | None:
        """Text counts on along all three axes; an image's tokens lie in a plane, text goes on after its longer edge."""
        if not layouts:
            return None
        axes = np.empty((3, len(tokens)), np.int64)
        at = position = 0
        starts = np.flatnonzero(tokens == self.token)
        for layout in layouts:
            assert layout.grid is not None
            rows, columns = layout.grid
            start = starts[0]
            axes[:, at:start] = np.arange(position, position + start - at)
            position += start - at
            at = start + rows * columns
            axes[0, start:at] = position
            axes[1, start:at] = position + np.repeat(np.arange(rows), columns)
            axes[2, start:at] = position + np.tile(np.arange(columns), rows)
            position += max(rows, columns)
            starts = starts[starts >= at]
        axes[:, at:] = np.arange(position, position + len(tokens) - at)
        return axes

    @cached_property
    def processor(self) -> Any:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        return Qwen2VLImageProcessorPil.from_pretrained(self._folder, local_files_only=True)

    def pixels(self, images: Sequence[Image]) -> list[torch.Tensor]:
        """Patches, in the processor's order, of shape (rows, columns, values): the first two say the image's shape."""
        found = self.processor(list(images), return_tensors="pt")
        grids = found["image_grid_thw"].tolist()
        parts = found["pixel_values"].split([rows * columns for _, rows, columns in grids])
        return [part.unflatten(0, (rows, columns)) for part, (_, rows, columns) in zip(parts, grids, strict=True)]


class ModelParts(Parts):
    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.text, self.tower = model.model.language_model, model.model.visual
        self.image_token = model.config.image_token_id
        vision = model.config.vision_config
        self.values_per_token = model.config.text_config.hidden_size
        patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        self.pixels_per_token = vision.spatial_merge_size**2 * patch

    def see(self, pixels: Tensors) -> list[torch.Tensor]:
        """Embeddings of each image's tokens, (tokens, width), of its patches, (rows, columns, values)."""
        import torch

        shapes = [(1, *part.shape[:2]) for part in pixels]
        flat = torch.cat([part.flatten(0, 1) for part in pixels])
        merged = self.tower(flat, grid_thw=torch.tensor(shapes, device=flat.device)).pooler_output
        per_token = self.model.config.vision_config.spatial_merge_size**2
        return list(merged.split([rows * columns // per_token for _, rows, columns in shapes]))

    def project(self, features: Tensors) -> torch.Tensor:
        import torch

        return torch.cat(tuple(features))
