"""Same-picture search between a pool's images and the items' images of a suite.

Three steps, each cheaper to fool than the next: equal bytes or equal decoded pixels; candidates by perceptual hash
(pHash, exact Hamming search in faiss) over the item's picture and slightly cropped copies of it; and a comparison of
the decoded pixels, which look-alike scenes fail. The comparison fits one gain and offset per colour channel within
bounds (a recoloured copy is the same picture, a blue circle in the place of a red one is not) and then looks at what is
left, in lightness finely and in colour coarsely, as JPEG keeps them.

Pictures without content (blank, nearly blank) never match: they would match each other.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from curation_env.audit.rules import ImageRules

SIDE, BLOCK = 32, 4  # pictures are compared at 32x32 pixels; colours on 8x8 blocks of it
#: Windows of an item's picture (left, top, right, bottom as shares) that are searched for: all of it, and a pixel off.
_EDGE = 1 / SIDE
WINDOWS = (
    (0.0, 0.0, 1.0, 1.0),
    (0.0, 0.0, 1 - _EDGE, 1 - _EDGE),
    (_EDGE, 0.0, 1.0, 1 - _EDGE),
    (0.0, _EDGE, 1 - _EDGE, 1.0),
    (_EDGE, _EDGE, 1.0, 1.0),
)
LUMA = np.array([0.299, 0.587, 0.114], np.float32)
CHUNK = 2048  # pairs compared at a time: 25 MB

How = Literal["bytes", "pixels", "near"]


def decode(data: bytes) -> Image.Image | None:
    """Decode to RGB; None for what is no image (some suites write "none" in place of one)."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError):
        return None


def pixel_digest(image: Image.Image) -> bytes:
    """Digest of size and decoded pixels: equal for lossless copies in any format."""
    return hashlib.blake2b(image.tobytes(), digest_size=16, key=repr(image.size).encode()).digest()


def thumbnail(image: Image.Image, window: tuple[float, float, float, float] = WINDOWS[0]) -> np.ndarray:
    """Return the window at the size of comparison: uint8 of shape (32, 32, 3)."""
    width, height = image.size
    if (width, height) == (SIDE, SIDE) and window == WINDOWS[0]:
        return np.asarray(image)
    left, top, right, bottom = window
    box = (left * width, top * height, right * width, bottom * height)
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box=box))


def perceptual_hashes(thumbs: np.ndarray) -> np.ndarray:
    """pHash of thumbnails, uint8 (n, 32, 32, 3) to 64 bits as uint8 (n, 8).

    Bit for bit what `imagehash.phash` gives (a test compares them), for many pictures at once: ten times faster.
    """
    from scipy.fft import dct

    red, green, blue = (thumbs[..., k].astype(np.uint32) for k in range(3))
    grey = ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16).astype(np.float64)  # Pillow's "L"
    low = dct(dct(grey, axis=1), axis=2)[:, :8, :8].reshape(-1, 64)
    return np.packbits(low > np.median(low, axis=1, keepdims=True), axis=1)


def contrasts(thumbs: np.ndarray) -> np.ndarray:
    """Standard deviation of the lightness of thumbnails, in grey levels: (n, 32, 32, 3) to (n,)."""
    return (thumbs.astype(np.float32) @ LUMA).std(axis=(1, 2))


class Thumbs(NamedTuple):
    """Thumbnails and the mean colours of their blocks: uint8 (n, 32, 32, 3) and float32 (n, 3, 64)."""

    pixels: np.ndarray
    blocks: np.ndarray

    @classmethod
    def of(cls, thumbs: Sequence[np.ndarray]) -> Thumbs:
        pixels = np.stack(thumbs) if thumbs else np.zeros((0, SIDE, SIDE, 3), np.uint8)
        side = SIDE // BLOCK
        means = pixels.reshape(-1, side, BLOCK, side, BLOCK, 3).mean(axis=(2, 4), dtype=np.float32)
        return cls(pixels, np.ascontiguousarray(means.reshape(-1, side * side, 3).transpose(0, 2, 1)))

    def take(self, index: np.ndarray) -> Thumbs:
        return Thumbs(self.pixels[index], self.blocks[index])


def compare(items: Thumbs, rows: Thumbs, rules: ImageRules) -> np.ndarray:
    """Say for each pair of thumbnails whether both show the same picture.

    Args:
        items: Pictures of items, as many as pairs.
        rows: Pictures of rows, as many.
        rules: Bounds of gain and offset, and the largest differences.

    Returns:
        Boolean array of shape (pairs,).
    """
    mean_x, mean_y = items.blocks.mean(axis=2, keepdims=True), rows.blocks.mean(axis=2, keepdims=True)
    x, y = items.blocks - mean_x, rows.blocks - mean_y
    gain = (x * y).mean(axis=2, keepdims=True) / ((x * x).mean(axis=2, keepdims=True) + 1e-3)
    gain = np.clip(gain, 1 / rules.gain, rules.gain)
    offset = np.clip(mean_y - gain * mean_x, -rules.offset, rules.offset)
    same = np.abs(rows.blocks - gain * items.blocks - offset).max(axis=(1, 2)) <= rules.colour
    left = np.flatnonzero(same)
    if len(left):
        gain, offset = gain[left].transpose(0, 2, 1)[:, None], offset[left].transpose(0, 2, 1)[:, None]
        light = _smooth(rows.pixels[left].astype(np.float32) @ LUMA)
        fitted = np.clip(items.pixels[left] * gain + offset, 0, 255) @ LUMA
        rest = np.sqrt(((light - _smooth(fitted)) ** 2).mean(axis=(1, 2)))
        same[left] = rest <= np.minimum(rules.lightness, rules.share * light.std(axis=(1, 2)))
    return same


@dataclass(frozen=True)
class ImageMatch:
    item: int
    how: How


class ImageIndex:
    """The items' pictures, ready to be searched.

    Args:
        pictures: (item number, image bytes) pairs; an item may have several images, an image several items.
        rules: Thresholds.
    """

    def __init__(self, pictures: Sequence[tuple[int, bytes]], rules: ImageRules) -> None:
        import faiss

        self.rules = rules
        self._items: list[list[int]] = []  # of each distinct picture
        self._bytes: dict[bytes, int] = {}
        self._pixels: dict[bytes, int] = {}
        thumbs: list[np.ndarray] = []
        for item, data in pictures:
            picture = self._add(data, thumbs)
            if picture is not None and item not in self._items[picture]:
                self._items[picture].append(item)
        self._thumbs = Thumbs.of(thumbs)
        self._hashes = faiss.IndexBinaryFlat(64)
        if thumbs:
            self._hashes.add(perceptual_hashes(self._thumbs.pixels))

    def _add(self, data: bytes, thumbs: list[np.ndarray]) -> int | None:
        digest = hashlib.blake2b(data, digest_size=16).digest()
        if digest in self._bytes:
            return self._bytes[digest]
        image = decode(data)
        if image is None or contrasts(thumbnail(image)[None])[0] < self.rules.floor:
            return None
        pixels = pixel_digest(image)
        picture = self._pixels.setdefault(pixels, len(self._items))
        self._bytes[digest] = picture
        if picture == len(self._items):
            self._items.append([])
            thumbs.extend(thumbnail(image, window) for window in WINDOWS)
        return picture

    def match(self, images: Sequence[bytes]) -> list[list[ImageMatch]]:
        """Return for each image the items whose picture it is, exact matches first."""
        found: list[dict[int, How]] = [{} for _ in images]
        thumbs: list[np.ndarray] = []
        owners: list[int] = []
        for k, data in enumerate(images):
            known = self._bytes.get(hashlib.blake2b(data, digest_size=16).digest())
            if known is not None:
                found[k][known] = "bytes"
            image = decode(data)
            if image is None:
                continue
            same = self._pixels.get(pixel_digest(image))
            if same is not None:
                found[k].setdefault(same, "pixels")
            thumbs.append(thumbnail(image))
            owners.append(k)
        for k, picture in self._near(thumbs, owners):
            found[k].setdefault(picture, "near")
        return [
            [ImageMatch(item, how) for picture, how in pictures.items() for item in self._items[picture]]
            for pictures in found
        ]

    def _near(self, thumbs: list[np.ndarray], owners: list[int]) -> Iterator[tuple[int, int]]:
        if not thumbs or not self._items:
            return
        stack = Thumbs.of(thumbs)
        content = np.flatnonzero(contrasts(stack.pixels) >= self.rules.floor)
        queries = perceptual_hashes(stack.pixels[content])
        limits, _, windows = self._hashes.range_search(queries, self.rules.radius + 1)
        rows = content[np.repeat(np.arange(len(content)), (limits[1:] - limits[:-1]).astype(np.int64))]
        for start in range(0, len(rows), CHUNK):
            row, window = rows[start : start + CHUNK], windows[start : start + CHUNK]
            same = compare(self._thumbs.take(window), stack.take(row), self.rules)
            for k in np.flatnonzero(same):
                yield owners[row[k]], int(window[k]) // len(WINDOWS)


def _smooth(x: np.ndarray) -> np.ndarray:
    """Mean over 3x3 pixels, edges repeated: (n, 32, 32) to the same."""
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1)), mode="edge")
    rows = padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]
    return (rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]) / 9
