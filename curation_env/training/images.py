"""Image features where a run has more images than memory: computed a step ahead of their use, window by window."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from curation_env.training.data import Encoder
from curation_env.training.families import Tensors
from curation_env.training.model import Student

CACHE_BYTES = 1 << 30  # features of all images up to here are kept, not computed again
IMAGES_PER_BATCH = 64
WINDOWS_AHEAD = 4
DECODERS = min(WINDOWS_AHEAD, len(os.sched_getaffinity(0)))  # threads; decoding releases the interpreter's lock


class KeptFeatures(dict[bytes, torch.Tensor]):
    """Features of all images by key, at once."""

    def __enter__(self) -> KeptFeatures:
        return self

    def __exit__(self, *exception: object) -> None:
        pass


class StreamedFeatures(Mapping[bytes, torch.Tensor]):
    """Features by image key, of one window at a time: asking for a key of the next window moves on to it.

    Args:
        images: Encoded bytes by key; None is a black image.
        windows: Keys of the images of every step, in the order of the steps.
    """

    def __init__(
        self,
        student: Student,
        encoder: Encoder,
        images: Mapping[bytes, bytes | None],
        windows: Sequence[Sequence[bytes]],
    ) -> None:
        self._student, self._encoder, self._images = student, encoder, images
        self._left = iter([sorted(set(keys)) for keys in windows])
        self._threads = ThreadPoolExecutor(DECODERS)
        self._ahead: deque[tuple[list[bytes], Future[Tensors]]] = deque()
        self._now: dict[bytes, torch.Tensor] = {}
        for _ in range(WINDOWS_AHEAD):
            self._decode_next()

    def __getitem__(self, key: bytes) -> torch.Tensor:
        while key not in self._now:
            if not self._ahead:
                raise KeyError(f"no window that is left shows {key.hex()}")
            keys, pixels = self._ahead.popleft()
            self._decode_next()
            self._now = dict(zip(keys, self._student.see(pixels.result()), strict=True)) if keys else {}
        return self._now[key]

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._images)

    def __len__(self) -> int:
        return len(self._images)

    def __enter__(self) -> StreamedFeatures:
        return self

    def __exit__(self, *exception: object) -> None:
        """Stop decoding."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _decode_next(self) -> None:
        keys = next(self._left, None)
        if keys is not None:
            self._ahead.append((keys, self._threads.submit(self._pixels, keys)))

    def _pixels(self, keys: list[bytes]) -> Tensors:
        if not keys:
            return []
        pixels = self._encoder.pixels([self._images[key] for key in keys])
        if self._student.device.type != "cuda":
            return pixels
        return pixels.pin_memory() if isinstance(pixels, torch.Tensor) else [part.pin_memory() for part in pixels]


def image_features(
    student: Student,
    encoder: Encoder,
    images: Mapping[bytes, bytes | None],
    on_progress: Callable[[int, int], None] | None = None,
) -> KeptFeatures:
    """Return what is kept of all images (encoded bytes by key) by key; see `Student.see`.

    The order of the batches depends on the set of images alone, so the result does too.
    """
    keys = sorted(images)
    batches = [keys[start : start + IMAGES_PER_BATCH] for start in range(0, len(keys), IMAGES_PER_BATCH)]
    kept = KeptFeatures()
    with StreamedFeatures(student, encoder, images, batches) as ahead:
        for batch in batches:
            kept |= {key: ahead[key] for key in batch}
            if on_progress:
                on_progress(len(kept), len(keys))
    return kept


def make_features(
    student: Student,
    encoder: Encoder,
    images: Mapping[bytes, bytes | None],
    rows: Iterable[tuple[tuple[bytes, ...], np.ndarray]],
    windows: Callable[[], Sequence[Sequence[bytes]]],
    limit: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> KeptFeatures | StreamedFeatures:
    """Return the features of images: all of them where they fit, else those of a window at a time.

    Args:
        images: Encoded bytes by key; None is a black image.
        rows: (keys of images, tokens) of every row that shows some.
        windows: Gives the keys of the images of every step, in the order of the steps.
        limit: Bytes up to which all are kept.
    """
    if bytes_kept(student, image_tokens(rows, encoder.image_token)) <= limit:
        return image_features(student, encoder, images, on_progress)
    return StreamedFeatures(student, encoder, images, windows())


def bytes_kept(student: Student, n_tokens: int) -> int:
    """Bytes of what is kept of images that take `n_tokens` tokens together."""
    if student.tower_trains:
        return n_tokens * student.parts.pixels_per_token * torch.float32.itemsize
    return n_tokens * student.parts.values_per_token * student.model.dtype.itemsize


def image_tokens(rows: Iterable[tuple[tuple[bytes, ...], np.ndarray]], image_token: int) -> int:
    """How many tokens the distinct images of rows, (images, tokens) each, take; rows of the same images count once."""
    return sum(int((tokens == image_token).sum()) for tokens in dict(rows).values())
