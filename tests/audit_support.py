"""A small pool and suite in the real file formats: natural sentences, so that text matches can be told from chance."""

from __future__ import annotations

import base64
import csv
import io
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from curation_env.audit.rules import KINDS, AuditRules
from curation_env.pool import Pool, write_pool

BENCHMARKS = ("BenchOpen", "BenchChoice")
SUITE = {"benchmarks": {name: {"file": f"{name}.tsv"} for name in BENCHMARKS}}
BLOCK_ALL = AuditRules(
    name="test", version=1, benchmarks={name: {kind: "block" for kind in KINDS} for name in BENCHMARKS}
)


def picture(seed: int, size: int = 64) -> Image.Image:
    """A picture with its own layout and colours."""
    rng = random.Random(seed)
    image = Image.new("RGB", (size, size), tuple(rng.randrange(256) for _ in range(3)))
    draw = ImageDraw.Draw(image)
    for _ in range(6):
        x, y = rng.randrange(size), rng.randrange(size)
        box = (x, y, x + rng.randrange(8, size // 2), y + rng.randrange(8, size // 2))
        shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
        shape(box, fill=tuple(rng.randrange(256) for _ in range(3)))
    return image


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turn(user: str, assistant: str) -> dict[str, str]:
    return {"user": user, "assistant": assistant}


def row(*turns: dict[str, str], image: bytes | None = None, source: str = "s") -> dict[str, Any]:
    stored = {"bytes": image, "path": f"{source}/0.png"} if image is not None else None
    return {"source": source, "image": stored, "conversation": list(turns), "n_tokens": 5}


_NOUNS = tuple(
    word
    for line in (
        "harbor lantern orchard violin glacier kettle meadow pilot quarry ribbon saddle tunnel canyon anchor barrel",
        "candle ferry garden hammer island jacket kitchen ladder market needle oven palace rocket shelter window",
    )
    for word in line.split()
)
_VERBS = ("hold", "cross", "mend", "carry", "paint", "watch", "open", "lift", "follow", "visit", "guard", "measure")


def chatter(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """Clean rows: small talk over their own pictures (every second one) and stock questions."""
    rng = random.Random(seed)
    rows = []
    for k in range(n):
        a, b, c = rng.sample(_NOUNS, 3)
        image = encoded(picture(10_000 + seed * n + k)) if k % 2 else None
        user = rng.choice((f"What color is the {a}?", f"How do I {rng.choice(_VERBS)} the {a}?", "Describe the image."))
        answer = f"The {a} stands near the {b}, so you can {rng.choice(_VERBS)} it with a {c}."
        rows.append(row(turn(user, answer), image=image))
    return rows


def write_suite(folder: Path, items: Mapping[str, Sequence[Mapping[str, Any]]]) -> Path:
    """Write VLMEvalKit TSV files; an item's `image` is bytes, or the index of the row that holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in BENCHMARKS:
        table = [dict(item) for item in items.get(name, ())]
        for item in table:
            if isinstance(item["image"], bytes):
                item["image"] = base64.b64encode(item["image"]).decode()
        columns = ["index", "image", "question", "A", "B", "C", "D", "answer"]
        with open(folder / f"{name}.tsv", "w", newline="") as stream:
            writer = csv.DictWriter(stream, columns, delimiter="\t", restval="")
            writer.writeheader()
            writer.writerows(table)
    return folder


def make_pool(path: Path, rows: Sequence[Mapping[str, Any]]) -> Pool:
    write_pool(path, [dict(r) for r in rows], key=path.name)
    return Pool.open(path)


def blank(level: int) -> bytes:
    return encoded(Image.fromarray(np.full((32, 32, 3), level, np.uint8)))
