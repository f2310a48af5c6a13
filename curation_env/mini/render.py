"""Pictures of the miniature: 32x32 pixels, 4x4 patches of 8, four kinds that are drawn, and clip art.

A picture is a small frozen record of what is to be seen; `pixels` turns it into an image and `patches` says what covers
each patch (what the vision tower is supervised with). Both depend on the record alone, so a picture renders the same
everywhere. Shapes are drawn from formulas; only the letters of signs go through Pillow (FreeType) and shipped fonts.
Clip art is shipped as thumbnails and scaled in integers; pools show it, benchmarks and the init's lessons do not.
"""

from __future__ import annotations

import functools
import io
import random
import struct
import zlib
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np

SIDE, PATCH, CELL = 32, 8, 16
GRID = SIDE // PATCH
COLORS = {
    "red": (225, 45, 40), "green": (40, 190, 70), "blue": (55, 95, 240),
    "yellow": (240, 215, 50), "purple": (175, 60, 215), "white": (245, 245, 245),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "cross", "diamond")
SIZES = ("small", "large")
LETTERS = tuple("EFHKLMNPRSTUXZ")
PLACES = ("top left", "top right", "bottom left", "bottom right")
LEVELS = 7  # heights of bars, 4 pixels each
FONTS = ("DejaVuSans-Bold.ttf", "DejaVuSerif-Bold.ttf", "DejaVuSansMono-Bold.ttf")
CONTENTS = ("nothing", *SHAPES, *LETTERS, *(f"digit {d}" for d in range(10)), "bar")
EXTENTS = ("nothing", *SIZES, *(f"level {k}" for k in range(1, LEVELS + 1)))


@dataclass(frozen=True)
class Look:
    """What varies without changing what is shown: corner brightness of the background, colour jitter, offsets."""

    corners: tuple[int, int, int, int]
    tint: tuple[int, int, int]
    shifts: tuple[int, ...]  # four integers in -1..1, used by whatever is drawn
    font: int = 0
    size: int = 18

    @classmethod
    def draw(cls, rng: random.Random) -> Look:
        corners = tuple(rng.randrange(0, 96) for _ in range(4))
        tint = tuple(rng.randrange(-12, 13) for _ in range(3))
        shifts = tuple(rng.randrange(-1, 2) for _ in range(4))
        return cls(corners, tint, shifts, rng.randrange(len(FONTS)), rng.randrange(17, 20))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Thing:
    shape: str
    color: str
    size: str


@dataclass(frozen=True)
class Scene:
    """A 2x2 grid; `cells` follows PLACES, None where nothing is."""

    cells: tuple[Thing | None, ...]
    look: Look


@dataclass(frozen=True)
class Sign:
    """Two letters; `drop` moves each up or down by pixels."""

    letters: tuple[str, str]
    color: str
    drop: tuple[int, int]
    look: Look


@dataclass(frozen=True)
class Digits:
    """Two handwritten digits: indices into the shipped set."""

    samples: tuple[int, int]
    color: str
    drop: tuple[int, int]
    look: Look

    @property
    def values(self) -> tuple[int, int]:
        labels = digit_set()[1]
        return int(labels[self.samples[0]]), int(labels[self.samples[1]])


@dataclass(frozen=True)
class Chart:
    """Up to four bars: (colour, level 1..7), left to right."""

    bars: tuple[tuple[str, int], ...]
    look: Look


Picture = Scene | Sign | Digits | Chart


@dataclass(frozen=True)
class ClipArt:
    """A thumbnail of the shipped set: its number, how large it is shown, where, which way round and on what colour."""

    sample: int
    side: int
    top: int
    left: int
    flipped: bool
    ground: tuple[int, int, int]

    @property
    def word(self) -> str:
        return clip_art_set()[1][self.sample]


@functools.cache
def clip_art_set() -> tuple[np.ndarray, tuple[str, ...]]:
    """Images (n, 32, 32, 4) of uint8, colour times opacity and opacity, and the word that names each."""
    with (files("curation_env.mini") / "assets" / "clip_art.npz").open("rb") as file:
        data = np.load(file)
        return data["images"], tuple(data["words"].tolist())


@functools.cache
def digit_set() -> tuple[np.ndarray, np.ndarray]:
    """Images (1797, 8, 8) of 0..16 and labels (1797,)."""
    with (files("curation_env.mini") / "assets" / "digits.npz").open("rb") as file:
        data = np.load(file)
        return data["images"], data["labels"]


@functools.cache
def _shape_mask(shape: str, size: str) -> np.ndarray:
    """Coverage of a 16x16 cell in 0..1, four samples a pixel side."""
    side = (np.arange(CELL * 4) + 0.5) / 4 - CELL / 2
    y, x = np.meshgrid(side, side, indexing="ij")
    r = 4.0 if size == "small" else 7.0
    inside = {
        "circle": x * x + y * y <= r * r,
        "square": (abs(x) <= r * 0.9) & (abs(y) <= r * 0.9),
        "triangle": (y <= r * 0.9) & (y >= -r + 2 * abs(x) * 0.95),
        "cross": ((abs(x) <= r * 0.33) | (abs(y) <= r * 0.33)) & (abs(x) <= r) & (abs(y) <= r),
        "diamond": abs(x) + abs(y) <= r,
    }[shape]
    return inside.reshape(CELL, 4, CELL, 4).mean(axis=(1, 3))


@functools.cache
def _font(name: int, size: int) -> Any:
    from PIL import ImageFont

    data = (files("curation_env.mini") / "assets" / "fonts" / FONTS[name]).read_bytes()
    return ImageFont.truetype(io.BytesIO(data), size, layout_engine=ImageFont.Layout.BASIC)


@functools.cache
def _letter_mask(letter: str, font: int, size: int) -> np.ndarray:
    """Coverage of a 16x20 box in 0..1, the letter in its middle."""
    from PIL import Image, ImageDraw

    image = Image.new("L", (CELL, 20), 0)
    ImageDraw.Draw(image).text((CELL / 2, 10), letter, fill=255, font=_font(font, size), anchor="mm")
    return np.asarray(image, np.float64) / 255


@functools.cache
def _digit_mask(sample: int) -> np.ndarray:
    return np.kron(digit_set()[0][sample].astype(np.float64) / 16, np.ones((2, 2)))


def _layers(picture: Picture) -> list[tuple[np.ndarray, int, int, str, str, str]]:
    """What is drawn: (coverage mask, top, left, content class, colour, extent class)."""
    shift = picture.look.shifts
    if isinstance(picture, Scene):
        layers = []
        for k, thing in enumerate(picture.cells):
            if thing is not None:
                mask = _shape_mask(thing.shape, thing.size)
                top, left = CELL * (k // 2) + shift[k], CELL * (k % 2) + shift[(k + 1) % 4]
                layers.append((mask, top, left, thing.shape, thing.color, thing.size))
        return layers
    if isinstance(picture, Sign):
        return [
            (
                _letter_mask(c, picture.look.font, picture.look.size),
                6 + picture.drop[k],
                CELL * k,
                c,
                picture.color,
                "nothing",
            )
            for k, c in enumerate(picture.letters)
        ]
    if isinstance(picture, Digits):
        return [
            (_digit_mask(s), 8 + picture.drop[k], CELL * k, f"digit {picture.values[k]}", picture.color, "nothing")
            for k, s in enumerate(picture.samples)
        ]
    return [
        (np.ones((4 * level, 6)), SIDE - 4 * level, PATCH * k + 1, "bar", color, f"level {level}")
        for k, (color, level) in enumerate(picture.bars)
    ]


def _clip(mask: np.ndarray, top: int, left: int) -> tuple[np.ndarray, slice, slice]:
    y0, x0 = max(top, 0), max(left, 0)
    y1, x1 = min(top + mask.shape[0], SIDE), min(left + mask.shape[1], SIDE)
    return mask[y0 - top : y1 - top, x0 - left : x1 - left], slice(y0, y1), slice(x0, x1)


def area_weights(old: int, new: int) -> np.ndarray:
    """How much of each old pixel lies under each new one when a side of `old` becomes one of `new`: (new, old)."""
    ends = np.minimum.outer((np.arange(new) + 1) * old, (np.arange(old) + 1) * new)
    return np.maximum(ends - np.maximum.outer(np.arange(new) * old, np.arange(old) * new), 0)


def resample(image: np.ndarray, height: int, width: int, unit: int = 1) -> np.ndarray:
    """Scale by areas and divide by `unit`, in integers: the same under every version of every library."""
    old_height, old_width = image.shape[:2]
    rows = np.tensordot(area_weights(old_height, height), image.astype(np.int64), (1, 0))
    summed = np.tensordot(area_weights(old_width, width), rows, (1, 1)).swapaxes(0, 1)
    whole = old_height * old_width * unit
    return ((2 * summed + whole) // (2 * whole)).astype(np.uint8)


def _clip_art_pixels(picture: ClipArt) -> np.ndarray:
    thumbnail = clip_art_set()[0][picture.sample]
    scaled = resample(thumbnail[:, ::-1] if picture.flipped else thumbnail, picture.side, picture.side).astype(int)
    ground = np.array(picture.ground)
    image = np.broadcast_to(ground, (SIDE, SIDE, 3)).copy()
    part = image[picture.top : picture.top + picture.side, picture.left : picture.left + picture.side]
    part[:] = scaled[..., :3] + (ground * (255 - scaled[..., 3:]) + 127) // 255
    return np.minimum(image, 255).astype(np.uint8)


_RAMP = (np.arange(SIDE) + 0.5) / SIDE


def pixels(picture: Picture | ClipArt) -> np.ndarray:
    """Return the picture as uint8 of shape (32, 32, 3)."""
    if isinstance(picture, ClipArt):
        return _clip_art_pixels(picture)
    a, b, c, d = picture.look.corners
    top, bottom = a + (b - a) * _RAMP, c + (d - c) * _RAMP
    ground = top[None, :] + (bottom - top)[None, :] * _RAMP[:, None]
    image = np.repeat(ground[:, :, None], 3, axis=2)
    for mask, y, x, _, color, _ in _layers(picture):
        part, rows, columns = _clip(mask, y, x)
        paint = np.clip(np.add(COLORS[color], picture.look.tint), 0, 255)
        image[rows, columns] += part[:, :, None] * (paint - image[rows, columns])
    return np.rint(image).astype(np.uint8)


def patches(picture: Picture) -> np.ndarray:
    """Return what covers each patch: int8 of shape (16, 3), indices into CONTENTS, ("nothing", *COLORS) and EXTENTS."""
    colors = ("nothing", *COLORS)
    labels = np.zeros((GRID, GRID, 3), np.int8)
    most = np.full((GRID, GRID), 2.0)  # under two pixels of 64 a patch counts as empty
    for mask, y, x, content, color, extent in _layers(picture):
        cover = np.zeros((SIDE, SIDE))
        part, rows, columns = _clip(mask, y, x)
        cover[rows, columns] = part
        amount = cover.reshape(GRID, PATCH, GRID, PATCH).sum(axis=(1, 3))
        wins = amount > most
        labels[wins] = (CONTENTS.index(content), colors.index(color), EXTENTS.index(extent))
        most = np.maximum(most, amount)
    return labels.reshape(-1, 3)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def encode_png(image: np.ndarray) -> bytes:
    """Return uint8 (height, width, 3) as PNG with one stored block: the same bytes under every version of zlib."""
    height, width, _ = image.shape
    raw = np.zeros((height, 1 + 3 * width), np.uint8)
    raw[:, 1:] = image.reshape(height, -1)
    data = raw.tobytes()
    assert len(data) < 65536, "one stored block holds 65535 bytes"
    stored = (
        b"\x78\x01\x01"
        + struct.pack("<HH", len(data), len(data) ^ 0xFFFF)
        + data
        + struct.pack(">I", zlib.adler32(data))
    )
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", stored) + _chunk(b"IEND", b"")


def alter(image: np.ndarray, kind: str, rng: random.Random) -> np.ndarray:
    """Return a near-duplicate: "reencoded" (through JPEG), "cropped" (by a pixel, scaled back) or "recolored"."""
    from PIL import Image

    if kind == "reencoded":
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=rng.randrange(80, 93))
        return np.asarray(Image.open(buffer).convert("RGB"))
    if kind == "cropped":
        left, top = rng.randrange(2), rng.randrange(2)
        box = (left, top, SIDE - 1 + left, SIDE - 1 + top)
        return np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BILINEAR, box=box))
    if kind == "recolored":
        gain = np.array([0.88 + 0.2 * rng.random() for _ in range(3)])
        return np.clip(np.rint(image * gain + rng.randrange(-8, 9)), 0, 255).astype(np.uint8)
    raise ValueError(f"no alteration called {kind!r}")
