"""Image matching: copies of a picture are found, look-alikes and blanks are not."""

from __future__ import annotations

from collections.abc import Callable

import imagehash
import numpy as np
import pytest
from audit_support import blank, encoded, picture
from PIL import Image, ImageDraw

from curation_env.audit.image import ImageIndex, perceptual_hashes, thumbnail
from curation_env.audit.rules import ImageRules


def recolor(image: Image.Image) -> Image.Image:
    red, green, blue = image.split()
    return Image.merge("RGB", (red.point(lambda v: 0.9 * v + 5), green.point(lambda v: 1.0 * v - 4), blue))


COPIES: dict[str, tuple[str, Callable[[Image.Image], bytes]]] = {
    "same bytes": ("bytes", encoded),
    "lossless in another format": ("pixels", lambda image: encoded(image, "BMP")),
    "JPEG": ("near", lambda image: encoded(image, "JPEG", quality=80)),
    "resized": ("near", lambda image: encoded(image.resize((48, 48), Image.Resampling.LANCZOS))),
    "a pixel of 32 cropped": ("near", lambda image: encoded(image.crop((2, 2, 64, 64)))),
    "recolored": ("near", lambda image: encoded(recolor(image))),
}


@pytest.fixture(scope="module")
def index() -> ImageIndex:
    return ImageIndex([(seed, encoded(picture(seed))) for seed in range(40)], ImageRules())


@pytest.mark.parametrize("how", list(COPIES))
def test_copies_are_found(index: ImageIndex, how: str) -> None:
    expected, copy = COPIES[how]
    images = [copy(picture(seed)) for seed in range(40)]
    matches = index.match(images)
    assert [[(match.item, match.how) for match in found] for found in matches] == [[(k, expected)] for k in range(40)]


def test_other_pictures_are_not_found(index: ImageIndex) -> None:
    assert not any(index.match([encoded(picture(seed)) for seed in range(100, 400)]))


def test_the_same_layout_with_another_colour_is_another_picture() -> None:
    scenes = []
    for color in ("red", "green", "blue", "yellow"):
        image = Image.new("RGB", (32, 32), (40, 40, 40))
        ImageDraw.Draw(image).ellipse((6, 6, 22, 22), fill=color)
        scenes.append(encoded(image))
    assert ImageIndex([(0, scenes[0])], ImageRules()).match(scenes)[1:] == [[], [], []]


def test_blank_and_broken_images_match_nothing() -> None:
    pictures = [(0, blank(0)), (1, blank(255)), (2, b"none"), (3, encoded(picture(1)))]
    index = ImageIndex(pictures, ImageRules())
    assert index.match([blank(0), blank(255), blank(254), b"none", b""]) == [[], [], [], [], []]


def test_hashes_are_imagehashs() -> None:
    thumbs = [thumbnail(picture(seed)) for seed in range(200)] + [thumbnail(picture(1).crop((0, 0, 9, 60)))]
    expected = [np.packbits(imagehash.phash(Image.fromarray(thumb)).hash) for thumb in thumbs]
    assert (perceptual_hashes(np.stack(thumbs)) == np.stack(expected)).all()


def test_one_picture_of_several_items() -> None:
    data = encoded(picture(5))
    found = ImageIndex([(0, data), (1, encoded(picture(5), "BMP")), (2, encoded(picture(6)))], ImageRules()).match(
        [data]
    )
    assert sorted(match.item for match in found[0]) == [0, 1]


def test_nothing_to_compare() -> None:
    assert ImageIndex([], ImageRules()).match([encoded(picture(1))]) == [[]]
    assert ImageIndex([(0, encoded(picture(1)))], ImageRules()).match([]) == []
