"""From a conversation's text to its tokens: what its images take, which of them are supervised. Without torch."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from curation_env.errors import StageFailed
from curation_env.training.families import Images, Layout
from curation_env.training.recipe import Recipe


def layout_of(images: Images, recipe: Recipe, data: bytes | None) -> Layout:
    """What an image (None: the black one) becomes in the text: of encoded bytes, only the header is read."""
    if images.fixed is not None:
        return images.fixed
    size = images.black if data is None else Image.open(io.BytesIO(data)).size
    if recipe.image_pad == "mean":
        size = (max(size), max(size))
    return images.layout(*size)


def image_texts(images: Images, recipe: Recipe, layouts: Sequence[Layout]) -> list[str]:
    """The texts of a row's images."""
    return [recipe.chat.image.replace(images.placeholder, layout.text) for layout in layouts]


def supervised_tokens(offsets: np.ndarray, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """Which tokens, at character offsets of shape (length, 2), lie inside a text's spans: bool of shape (length,)."""
    supervised = np.zeros(len(offsets), bool)
    for start, end in spans:
        supervised |= (offsets[:, 0] >= start) & (offsets[:, 1] <= end) & (offsets[:, 1] > offsets[:, 0])
    return supervised


def expanded(
    tokens: np.ndarray, supervised: np.ndarray, image_token: int, layouts: Sequence[Layout]
) -> tuple[np.ndarray, np.ndarray]:
    """Repeat each image token, and its mark, as often as its layout says.

    Raises:
        StageFailed: There are more image tokens than the images have, or fewer.
    """
    repeats = [n for layout in layouts for n in layout.repeats]
    times = np.ones(len(tokens), np.int64)
    is_image = tokens == image_token
    if is_image.sum() != len(repeats):
        raise StageFailed(f"a text holds {is_image.sum()} image tokens, its images {len(repeats)}: it spells one out")
    times[is_image] = repeats
    return np.repeat(tokens, times), np.repeat(supervised, times)
