"""SmolVLM (and Idefics3, whose architecture its base checkpoints have): images are cut into square tiles.

Every tile, and the whole image scaled to one, takes the same number of tokens, with marks of row and column before
them. The SigLIP tower is frozen; what trains of the way from it is one linear layer after the pixel shuffle.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curation_env.training.families.base import Images, Layout, Parts, Tensors, read_processor

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

LONGEST_EDGE = 4096  # the processor scales no image beyond it


def of_folder(folder: Path, config: dict[str, Any]) -> TiledImages:
    """Images of a checkpoint folder."""
    vision, scale = config["vision_config"], config["scale_factor"]
    n = (vision["image_size"] // vision["patch_size"]) ** 2 // scale**2
    return TiledImages(config["image_token_id"], n, read_processor(folder), folder)


class TiledImages(Images):
    """One placeholder a tile.

    Args:
        tokens_per_tile: What each placeholder stands for.
        settings: Of the image processor.
    """

    placeholder = "<image>"

    def __init__(self, token: int, tokens_per_tile: int, settings: dict[str, Any], folder: Path) -> None:
        self.token = token
        self._tokens_per_tile = tokens_per_tile
        self._folder = folder
        self._tile = settings["max_image_size"]["longest_edge"]
        self._longest = settings["size"]["longest_edge"]
        self._split = settings.get("do_image_splitting", True)
        self.black = (self._tile, self._tile)

    def layout(self, width: int, height: int) -> Layout:
        rows, columns = self._grid(width, height)
        around, whole = "<fake_token_around_image>", f"<global-img>{self.placeholder}"
        if not rows:
            return Layout(f"{around}{whole}{around}", (self._tokens_per_tile,))
        tiles = "".join(
            "".join(f"{around}<row_{r + 1}_col_{c + 1}>{self.placeholder}" for c in range(columns)) + "\n"
            for r in range(rows)
        )
        return Layout(f"{tiles}\n{around}{whole}{around}", (self._tokens_per_tile,) * (rows * columns + 1))

    def _grid(self, width: int, height: int) -> tuple[int, int]:
        """Rows and columns of tiles; zeros for an image that is one tile."""
        if not self._split:
            return 0, 0
        tile, longest = self._tile, self._longest
        shape = width / height
        # First to the longest edge, even on the other one; then to whole tiles, the longer edge leading.
        if width >= height:
            width, height = longest, int(longest / shape)
            height += height % 2
        else:
            width, height = int(longest * shape), longest
            width += width % 2
        width, height = max(width, 1), max(height, 1)
        shape = width / height
        if width >= height and width > LONGEST_EDGE:
            width, height = LONGEST_EDGE, max(int(LONGEST_EDGE / shape), 1)
        elif height > width and height > LONGEST_EDGE:
            width, height = max(int(LONGEST_EDGE * shape), 1), LONGEST_EDGE
        shape = width / height
        if width >= height:
            columns = math.ceil(width / tile)
            rows = math.ceil(int(columns * tile / shape) / tile)
        else:
            rows = math.ceil(height / tile)
            columns = math.ceil(int(rows * tile * shape) / tile)
        return (rows, columns) if rows > 1 or columns > 1 else (0, 0)

    @cached_property
    def processor(self) -> Any:
        from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

        return Idefics3ImageProcessorPil.from_pretrained(self._folder, local_files_only=True)

    def pixels(self, images: Sequence[Image]) -> list[torch.Tensor]:
        """Tiles of shape (tiles, 3, edge, edge), the whole image last."""
        # One at a time: the processor pads several images to the most tiles.
        return [self.processor([[image]], return_tensors="pt")["pixel_values"][0] for image in images]


class ModelParts(Parts):
    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.text, self.tower = model.model.text_model, model.model.vision_model
        self.image_token = model.config.image_token_id
        vision, scale = model.config.vision_config, model.config.scale_factor
        self.values_per_token = vision.hidden_size * scale**2
        self.pixels_per_token = 3 * vision.patch_size**2 * scale**2

    def see(self, pixels: Tensors) -> list[torch.Tensor]:
        """Features of each image, (tiles, patches, width), of its tiles, (tiles, 3, edge, edge)."""
        import torch

        states = self.tower(pixel_values=torch.cat(tuple(pixels))).last_hidden_state
        return list(states.split([len(part) for part in pixels]))

    def project(self, features: Tensors) -> torch.Tensor:
        import torch

        return self.model.model.connector(torch.cat(tuple(features))).flatten(0, 1)
