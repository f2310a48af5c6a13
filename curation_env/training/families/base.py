"""What every family of students says of itself."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from curation_env.errors import MissingAssets

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image


#: One tensor an image: stacked where all have one shape.
Tensors: TypeAlias = "torch.Tensor | Sequence[torch.Tensor]"


class Layout(NamedTuple):
    """What an image becomes in the text of a row.

    Attributes:
        text: What stands in place of the recipe's placeholder: placeholders, and marks of the family.
        repeats: How many tokens each placeholder in `text` stands for.
        grid: Rows and columns of its tokens, where positions follow them.
    """

    text: str
    repeats: tuple[int, ...]
    grid: tuple[int, int] | None = None


class Images(ABC):
    """How images enter a row: its text, its positions, the model's pixels.

    Attributes:
        placeholder: The token that stands for an image in a recipe's chat text.
        token: Its id.
        fixed: The layout of every image, where their size does not matter.
        black: Width and height of the image that stands for none.
    """

    placeholder: str
    token: int
    fixed: Layout | None = None
    black: tuple[int, int] = (336, 336)

    def layout(self, width: int, height: int) -> Layout:
        """The layout of an image of this size, in pixels.

        Raises:
            StageFailed: The family takes no image of that shape.
        """
        assert self.fixed is not None
        return self.fixed

    def positions(self, tokens: np.ndarray, layouts: Sequence[Layout]) -> np.ndarray | None:
        """Positions of a row's tokens, int64 of shape (axes, length), where they are not simply 0, 1, 2, ..."""
        return None

    @property
    @abstractmethod
    def processor(self) -> Any:
        """The checkpoint's image processor, in its Pillow form: the same pixels with and without torchvision."""

    @abstractmethod
    def pixels(self, images: Sequence[Image]) -> Tensors:
        """What the vision tower takes, float32, one entry an image."""


class Parts(ABC):
    """Where a model keeps its parts.

    Attributes:
        text, tower: The language model, without its head; the vision tower.
        image_token: Id of the placeholder token.
        values_per_token: Numbers that the tower's features hold for every image token.
        pixels_per_token: Numbers that the pixels hold for every image token.
    """

    text: Any
    tower: Any
    image_token: int
    values_per_token: int
    pixels_per_token: int

    def __init__(self, model: Any) -> None:
        self.model = model

    @abstractmethod
    def see(self, pixels: Tensors) -> Tensors:
        """The tower's features of each image, in any number of dimensions."""

    @abstractmethod
    def project(self, features: Tensors) -> torch.Tensor:
        """Embeddings of all image tokens, (tokens, width), of the tower's features of each image, in order."""


def read_processor(folder: Path) -> dict[str, Any]:
    """Settings of a checkpoint's image processor.

    Raises:
        MissingAssets: The checkpoint has none.
    """
    for name, key in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        path = folder / name
        if path.is_file():
            found = json.loads(path.read_text())
            if key is None or key in found:
                return found if key is None else found[key]
    raise MissingAssets(f"{folder} has no preprocessor_config.json: the image processor's settings are missing")
