"""A folder of public files as small as it can be, with everything in it that the real ones have been seen to have."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

FOLDERS = {
    "coco": "coco/train2017",
    "gqa": "gqa/images",
    "ocr_vqa": "ocr_vqa/images",
    "textvqa": "textvqa/train_images",
    "vg": "vg/VG_100K",
}


def picture(seed: int, kind: str = "JPEG", side: int = 24) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def record(number: int, image: str | None, *texts: str, **more: Any) -> dict[str, Any]:
    """One of LLaVA's records; texts are of human and gpt by turns, the mark is put where LLaVA has it."""
    turns = [{"from": "human" if k % 2 == 0 else "gpt", "value": text} for k, text in enumerate(texts)]
    if image is not None:
        turns[0]["value"] = f"<image>\n{turns[0]['value']}"
    return {"id": f"{number:012d}", **({"image": image} if image is not None else {}), "conversations": turns, **more}


def words(number: int) -> tuple[str, str]:
    """A question and an answer in the miniature's vocabulary, others for each number."""
    colors = ("red", "blue", "green", "yellow")
    shapes = ("circle", "square", "triangle")
    places = ("left", "right", "top", "bottom")
    color, shape, place = colors[number % 4], shapes[number // 4 % 3], places[number // 12 % 4]
    return f"what color is the {shape} on the {place} ?", color


def make_source(folder: Path, rows: int = 60) -> list[dict[str, Any]]:
    """Write `llava_v1_5_mix665k.json` and images, nothing wrong with any; every sixth record has no image."""
    records = []
    for number in range(rows):
        where = [*FOLDERS.values(), None][number % 6]
        image = None if where is None else f"{where}/{number:06d}.jpg"
        if image is not None:
            put(folder, image, picture(number))
        records.append(record(number, image, *words(number)))
    write_records(folder, records)
    return records


def put(folder: Path, image: str, data: bytes) -> None:
    (folder / image).parent.mkdir(parents=True, exist_ok=True)
    (folder / image).write_bytes(data)


def write_records(folder: Path, records: list[Any], name: str = "llava_v1_5_mix665k.json") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(records))
