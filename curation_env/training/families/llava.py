"""LLaVA-1.5: a square image of fixed size, a frozen CLIP tower, a projector of two layers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curation_env.training.families.base import Images, Layout, Parts, Tensors

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image


def of_folder(folder: Path, config: dict[str, Any]) -> LlavaImages:
    """Images of a checkpoint folder."""
    vision = config["vision_config"]
    n = (vision["image_size"] // vision["patch_size"]) ** 2 + (config["vision_feature_select_strategy"] == "full")
    return LlavaImages(config["image_token_index"], n, folder)


class LlavaImages(Images):
    """One placeholder an image, which stands for a fixed number of tokens."""

    placeholder = "<image>"

    def __init__(self, token: int, tokens_per_image: int, folder: Path) -> None:
        self.token = token
        self.fixed = Layout(self.placeholder, (tokens_per_image,))
        self._folder = folder

    @cached_property
    def processor(self) -> Any:
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        return CLIPImageProcessorPil.from_pretrained(self._folder, local_files_only=True)

    @property
    def black(self) -> tuple[int, int]:  # type: ignore[override]
        size = self.processor.crop_size
        return size["width"], size["height"]

    def pixels(self, images: Sequence[Image]) -> torch.Tensor:
        """Pixels of shape (n, 3, height, width)."""
        return self.processor(list(images), return_tensors="pt")["pixel_values"]


class ModelParts(Parts):
    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.text, self.tower = model.model.language_model, model.model.vision_tower
        self.image_token = model.config.image_token_index
        vision = model.config.vision_config
        self.values_per_token = vision.hidden_size
        self.pixels_per_token = 3 * vision.patch_size**2

    def see(self, pixels: Tensors) -> torch.Tensor:
        """Features, (n, tokens, width), of pixels, (n, 3, height, width)."""
        config = self.model.config
        chosen = self.tower(pixels, output_hidden_states=True).hidden_states[config.vision_feature_layer]
        if config.vision_feature_select_strategy == "default":
            chosen = chosen[:, 1:]
        return chosen

    def project(self, features: Tensors) -> torch.Tensor:
        import torch

        return self.model.model.multi_modal_projector(torch.stack(tuple(features))).flatten(0, 1)
