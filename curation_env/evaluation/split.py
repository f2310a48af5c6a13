"""The split of a suite's items into feedback and sealed ones: by groups that must stay together, stratified."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from scipy.fft import dctn

from curation_env.evaluation.scorers import make_scorer
from curation_env.evaluation.suite import Item, Part, Suite, read_suite

STOCK_PHRASE = 3  # a question that occurs more often than this in a suite says nothing about an item
HASH_BITS = 4  # perceptual hashes that differ in at most so many of 63 bits are candidates ...
PIXEL_LEVELS = 4.0  # ... and the same picture when their thumbnails differ by at most this many grey levels in the mean
SIDE = 32


def write_split(folder: str | Path, suite: dict[str, Any]) -> None:
    """Split the suite in `folder` and write `split.json` (atomically): `items[benchmark][index] = [part, group]`."""
    path = Path(folder) / "split.json"
    resolved = Suite.model_validate(suite)
    split = split_items(read_suite(folder, resolved), resolved)
    scratch = path.with_name(f".split.{os.getpid()}")
    scratch.write_text(json.dumps({"suite": resolved.name, "items": split}, sort_keys=True))
    scratch.rename(path)


def split_items(items: dict[str, list[Item]], suite: Suite) -> dict[str, dict[str, tuple[Part, str]]]:
    """Return (part, group) of every item, by benchmark and index.

    A group is a connected component over all benchmarks: equal or near-equal images, equal questions that are no stock
    phrase, and the units that a scorer aggregates over. A group that holds an item of a benchmark that is not split is
    feedback as a whole. The others go, largest first and then by hash, to the part that keeps every
    (benchmark, category) nearest to half; ties by the hash.
    """
    flat = [item for rows in items.values() for item in rows]
    groups = connected(len(flat), _keys(flat, suite), _near_images(flat))
    members: dict[int, list[Item]] = defaultdict(list)
    for item, group in zip(flat, groups, strict=True):
        members[group].append(item)
    named = {_group_name(rows): rows for rows in members.values()}
    balance: Counter[tuple[str, str]] = Counter()  # feedback items minus sealed ones, by benchmark and category
    split: dict[str, dict[str, tuple[Part, str]]] = {name: {} for name in items}
    for name, rows in sorted(named.items(), key=lambda pair: (-len(pair[1]), pair[0])):
        strata = Counter((item.benchmark, item.category) for item in rows)
        part: Part = "feedback"
        if all(suite.benchmarks[item.benchmark].sealed for item in rows):
            lean = sum(n * balance[stratum] for stratum, n in strata.items())
            if lean > 0 or (lean == 0 and int(name[:2], 16) % 2):
                part = "sealed"
        for stratum, n in strata.items():
            if suite.benchmarks[stratum[0]].sealed:
                balance[stratum] += n if part == "feedback" else -n
        for item in rows:
            split[item.benchmark][item.index] = (part, name)
    return split


def connected(n: int, keys: Iterable[tuple[Hashable, int]], pairs: Iterable[tuple[int, int]]) -> list[int]:
    """Return the component of each of `n` nodes, given (key, node) of shared keys and pairs of nodes that belong."""
    parent = list(range(n))

    def find(node: int) -> int:
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    first: dict[Hashable, int] = {}
    for key, node in keys:
        parent[find(node)] = find(first.setdefault(key, node))
    for a, b in pairs:
        parent[find(a)] = find(b)
    return [find(node) for node in range(n)]


def _keys(flat: list[Item], suite: Suite) -> Iterable[tuple[Hashable, int]]:
    """What ties items together by equality: image bytes, questions, scorer units."""
    asked = Counter(_normal(item.question) for item in flat)
    scorers = {name: make_scorer(benchmark.scorer) for name, benchmark in suite.benchmarks.items()}
    for k, item in enumerate(flat):
        yield ("unit", item.benchmark, scorers[item.benchmark].unit(item)), k
        if asked[_normal(item.question)] <= STOCK_PHRASE:
            yield ("question", _normal(item.question)), k
        for data in item.images:
            yield ("image", hashlib.blake2b(data, digest_size=16).digest()), k


def _normal(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def _near_images(flat: list[Item]) -> Iterable[tuple[int, int]]:
    """Pairs of items with near-equal pictures; blank pictures are near nothing."""
    owner: dict[bytes, int] = {}
    for k, item in enumerate(flat):
        for data in item.images:
            owner.setdefault(data, k)
    thumbs, owners = [], []
    for data, k in owner.items():
        thumb = _thumbnail(data)
        if thumb is not None and thumb.std() > 4:
            thumbs.append(thumb)
            owners.append(k)
    if not thumbs:
        return
    stack = np.stack(thumbs)
    low = dctn(stack.mean(3), axes=(1, 2), norm="ortho")[:, :8, :8].reshape(len(stack), 64)[:, 1:]
    bits = low > np.median(low, axis=1, keepdims=True)
    signs = np.where(bits, 1.0, -1.0).astype(np.float32)
    for k in range(len(stack)):
        apart = (signs.shape[1] - signs[k + 1 :] @ signs[k]) / 2
        for other in (k + 1 + np.flatnonzero(apart <= HASH_BITS)).tolist():
            if np.abs(stack[k] - stack[other]).mean() <= PIXEL_LEVELS:
                yield owners[k], owners[other]


def _thumbnail(data: bytes) -> np.ndarray | None:
    try:
        with Image.open(io.BytesIO(data)) as image:
            small = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    except (UnidentifiedImageError, OSError):
        return None
    return np.asarray(small, np.float32)


def _group_name(rows: list[Item]) -> str:
    """blake2b of the first member: the same whatever the order of the files."""
    first = min((item.benchmark, item.index) for item in rows)
    return hashlib.blake2b("/".join(first).encode(), digest_size=8).hexdigest()
