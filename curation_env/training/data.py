"""From pool rows to packed micro-batches: chat text, token spans, truncation, images, packing by tokens."""

from __future__ import annotations

import hashlib
import io
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from curation_env.errors import UnsupervisedRow
from curation_env.pool import Pool
from curation_env.training.families import Images, Layout, Tensors, images_of
from curation_env.training.recipe import Recipe
from curation_env.training.spans import expanded, image_texts, layout_of, supervised_tokens

BLACK = b"black"  # stands for the image of a text-only row where the recipe gives it one


@dataclass(frozen=True)
class Row:
    """One training row as tokens.

    Attributes:
        tokens: int64 of shape (length,), image tokens included.
        supervised: bool of shape (length,): True where the token is a target.
        image: Key of its image in the features (digest), or None.
        positions: int64 of shape (axes, length) where the family's are not simply 0, 1, 2, ...; else None.
    """

    id: str
    tokens: np.ndarray
    supervised: np.ndarray
    image: bytes | None
    image_bytes: bytes | None = field(repr=False, default=None)
    positions: np.ndarray | None = field(repr=False, default=None)

    @property
    def n_supervised(self) -> int:
        """Targets of the row: the first token has none before it, so it never counts."""
        return int(self.supervised[1:].sum())


class Encoder:
    """Turns conversations into tokens and images into pixels, as the recipe says.

    Args:
        tokenizer: A fast tokenizer (character offsets are needed).
        images: How the student's family puts images into rows.
    """

    def __init__(self, tokenizer: Any, images: Images, recipe: Recipe) -> None:
        self.tokenizer = tokenizer
        self.images = images
        self.recipe = recipe

    @classmethod
    def load(cls, folder: str | Path, recipe: Recipe) -> Encoder:
        """Load tokenizer and image processor from a checkpoint folder.

        Raises:
            MissingAssets: There is no checkpoint at `folder`.
            StageFailed: It is of an architecture that no family knows.
        """
        from transformers import AutoTokenizer

        images = images_of(folder)
        return cls(AutoTokenizer.from_pretrained(folder, local_files_only=True), images, recipe)

    @property
    def image_token(self) -> int:
        """Id of the placeholder token in the text."""
        return self.images.token

    def prompt(self, question: str, images: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the tokens after which the student answers a question about images; never truncated.

        Returns:
            int64 of shape (length,), and positions, int64 of shape (axes, length), where the family has its own.
        """
        layouts = [self.layout(data) for data in images]
        text, _ = self.recipe.chat.render([(question, None)], images=image_texts(self.images, self.recipe, layouts))
        ((tokens, _),) = self.tokenize([text], [[]], [layouts])
        return tokens, self.images.positions(tokens, layouts)

    @property
    def end_token(self) -> int:
        """The token that ends an answer."""
        return self.tokenizer.convert_tokens_to_ids(self.recipe.chat.end)

    @property
    def stop_tokens(self) -> list[int]:
        """Further tokens after which the student says nothing that counts."""
        return [self.tokenizer.convert_tokens_to_ids(token) for token in self.recipe.chat.stop]

    def layout(self, data: bytes | None) -> Layout:
        """What an image (None: the black one) becomes in the text."""
        return layout_of(self.images, self.recipe, data)

    def tokenize(
        self,
        texts: Sequence[str],
        spans: Sequence[Sequence[tuple[int, int]]],
        layouts: Sequence[Sequence[Layout]],
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield each text's token ids, image tokens expanded, and which of them lie inside the text's spans.

        Raises:
            StageFailed: A text holds the image's token beside its images.
        """
        found = self.tokenizer(list(texts), return_offsets_mapping=True)
        for ids, offset_mapping, inside, shown in zip(
            found["input_ids"], found["offset_mapping"], spans, layouts, strict=True
        ):
            tokens, offsets = np.asarray(ids, np.int64), np.asarray(offset_mapping, np.int64).reshape(-1, 2)
            yield expanded(tokens, supervised_tokens(offsets, inside), self.image_token, shown)

    def encode_rows(self, rows: Sequence[dict[str, Any]]) -> list[Row]:
        """Encode pool rows: `id`, `image` ({"bytes", ..} or None), `conversation`."""
        black, limit = self.recipe.text_only_image == "black", self.recipe.max_length
        images = [row["image"]["bytes"] if row["image"] is not None else None for row in rows]
        keys = [image_key(data) if data is not None else BLACK if black else None for data in images]
        shown = [[self.layout(data)] if key is not None else [] for key, data in zip(keys, images, strict=True)]
        texts, spans = [], []
        for row, layouts in zip(rows, shown, strict=True):
            turns = [(turn["user"], turn["assistant"]) for turn in row["conversation"]]
            text, inside = self.recipe.chat.render(turns, images=image_texts(self.images, self.recipe, layouts))
            texts.append(text)
            spans.append(inside)
        encoded = []
        for row, key, data, layouts, (tokens, supervised) in zip(
            rows, keys, images, shown, self.tokenize(texts, spans, shown), strict=True
        ):
            positions = self.images.positions(tokens, layouts)
            if positions is not None:
                positions = positions[:, :limit]
            encoded.append(Row(row["id"], tokens[:limit], supervised[:limit], key, data, positions))
        return encoded

    def encode(self, rows: Iterable[dict[str, Any]]) -> list[Row]:
        """Encode rows that train, sorted so that repeats stand together: those are encoded once.

        Raises:
            UnsupervisedRow: A row has no target left after truncation: it would train on nothing, silently.
        """
        groups = [list(group) for _, group in itertools.groupby(rows, key=lambda row: row["id"])]
        encoded = self.encode_rows([group[0] for group in groups])
        empty = [row.id for row in encoded if row.n_supervised == 0]
        if empty:
            raise UnsupervisedRow(
                f"{len(empty)} rows have no supervised token within {self.recipe.max_length} tokens, "
                f"the first is {empty[0]}",
                details="\n".join(empty),
            )
        return [row for row, group in zip(encoded, groups, strict=True) for _ in group]

    def pixels(self, images: Sequence[bytes | None]) -> Tensors:
        """Decode images (None: black) into the tower's input, float32, one entry an image."""
        return self.images.pixels([self._open(data) for data in images])

    def _open(self, data: bytes | None) -> Image.Image:
        if data is None:
            return Image.new("RGB", self.images.black)
        image = Image.open(io.BytesIO(data)).convert("RGB")
        if self.recipe.image_pad == "mean" and image.width != image.height:
            side = max(image.size)
            colour = tuple(int(255 * value) for value in self.images.processor.image_mean)
            square = Image.new("RGB", (side, side), colour)
            square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
            return square
        return image


def image_key(data: bytes) -> bytes:
    """Content address of an image within a run."""
    return hashlib.blake2b(data, digest_size=16).digest()


def read_rows(pool: Pool, ids: Sequence[str], rewrites: dict[str, list[dict[str, str]]]) -> Iterator[dict[str, Any]]:
    """Read the rows `ids` of a pool, with rewritten conversations in place of the pool's."""
    for id_, row in zip(ids, pool.rows(pool.position[id_] for id_ in ids), strict=True):
        yield row | {"conversation": rewrites[id_]} if id_ in rewrites else row


@dataclass(frozen=True)
class Rectangle:
    """A run of packed rows of similar length, for attention: `n` tokens in a (rows, longest) rectangle.

    Attributes:
        slots: int64 of shape (n,): where each token lies in the flattened rectangle.
    """

    n: int
    rows: int
    longest: int
    slots: torch.Tensor


@dataclass(frozen=True)
class Packed:
    """Rows laid end to end: T tokens, S targets, all int64.

    Attributes:
        tokens, places: Shape (T,); places count from 0 at every row.
        positions: Shape (T,) or (axes, T): what the model rotates by; the places, where the family has none of its own.
        ends: int32 of shape (rows + 1,): where each row starts, and where the last one ends.
        rectangles: The rows again, as runs of similar length.
        image_slots: Indices of the image tokens in (T,).
        images: Keys of the images, in the order of their slots.
        sources, targets: Shape (S,): index of the token that predicts, and the token to predict.
    """

    tokens: torch.Tensor
    places: torch.Tensor
    positions: torch.Tensor
    ends: torch.Tensor
    rectangles: list[Rectangle]
    image_slots: torch.Tensor
    images: list[bytes]
    sources: torch.Tensor
    targets: torch.Tensor

    @classmethod
    def of(cls, rows: Sequence[Row], image_token: int, device: torch.device) -> Packed:
        """Pack rows in their order; rows sorted by length make few and tight rectangles."""
        lengths = [len(row.tokens) for row in rows]
        tokens = np.concatenate([row.tokens for row in rows])
        places = np.concatenate([np.arange(n) for n in lengths])
        is_target = np.concatenate([row.supervised for row in rows]) & (places > 0)
        target_at = np.flatnonzero(is_target)

        def tensor(values: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(values).to(device)

        rectangles = []
        for run in runs(lengths):
            longest = max(run)
            slots = np.concatenate([k * longest + np.arange(n) for k, n in enumerate(run)])
            rectangles.append(Rectangle(sum(run), len(run), longest, tensor(slots)))
        return cls(
            tokens=tensor(tokens),
            places=tensor(places),
            positions=tensor(laid_out([row.positions for row in rows], lengths, places)),
            ends=tensor(np.cumsum([0, *lengths], dtype=np.int32)),
            rectangles=rectangles,
            image_slots=tensor(np.flatnonzero(tokens == image_token)),
            images=[row.image for row in rows if row.image is not None],
            sources=tensor(target_at - 1),
            targets=tensor(tokens[target_at]),
        )


def laid_out(positions: Sequence[np.ndarray | None], lengths: Sequence[int], places: np.ndarray) -> np.ndarray:
    """Positions of packed rows, (T,) or (axes, T): where one has its own axes, the others count along each of them."""
    axes = max((len(own) for own in positions if own is not None), default=0)
    if not axes:
        return places
    simple = (np.broadcast_to(np.arange(n), (axes, n)) for n in lengths)
    return np.concatenate([own if own is not None else row for own, row in zip(positions, simple, strict=True)], 1)


def runs(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Cut lengths, in order, into runs whose longest is at most a quarter longer than their first."""
    run: list[int] = []
    for n in lengths:
        if run and not 4 * max(n, run[0]) <= 5 * min(n, run[0]):
            yield run
            run = []
        run.append(n)
    yield run


def micro_batches(rows: Sequence[Row], max_tokens: int) -> list[list[Row]]:
    """Cut rows, in order, into runs of at most `max_tokens` tokens (a longer row stands alone).

    For many rows sorted by length: each run packs tightly.
    """
    batches: list[list[Row]] = []
    used = max_tokens + 1
    for row in rows:
        used += len(row.tokens)
        if used > max_tokens:
            batches.append([])
            used = len(row.tokens)
        batches[-1].append(row)
    return batches


def even_micro_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Share a window's rows out to few micro-batches of at most `max_tokens` tokens (a longer row stands alone).

    They are filled evenly, so that each keeps a GPU as busy as the others.

    Args:
        lengths: Tokens of each row.

    Returns:
        Indices of the rows of each micro-batch, from short to long.
    """
    longest_first = sorted(range(len(lengths)), key=lambda k: (-lengths[k], k))
    n = max(1, math.ceil(sum(lengths) / max_tokens)) if lengths else 0
    while True:
        batches: list[list[int]] = [[] for _ in range(n)]
        used = [0] * n
        for k in longest_first:
            least = min(range(n), key=used.__getitem__)
            if batches[least] and used[least] + lengths[k] > max_tokens:
                break
            batches[least].append(k)
            used[least] += lengths[k]
        else:
            return [sorted(batch, key=lambda k: (lengths[k], k)) for batch in batches if batch]
        n += 1
