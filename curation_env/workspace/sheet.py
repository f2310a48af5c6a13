"""A contact sheet: rows of the pool as one PNG, each with its image, id, source and conversation."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

CELL, IMAGE, MARGIN, LINE = 300, 200, 10, 14
TEXT_LINES, LINE_CHARS = 12, 46
MAX_ROWS = 60


def contact_sheet(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw `rows` (at most `MAX_ROWS`) to the PNG `path`, four in a line.

    Raises:
        ValueError: No row, or too many for one sheet.
    """
    if not 0 < len(rows) <= MAX_ROWS:
        raise ValueError(f"a sheet shows 1 to {MAX_ROWS} rows, not {len(rows)}")
    from PIL import Image, ImageDraw, ImageFont

    columns = min(4, len(rows))
    texts = [_lines(row["conversation"]) for row in rows]
    height = IMAGE + (max(map(len, texts)) + 2) * LINE + 3 * MARGIN
    sheet = Image.new("RGB", (columns * CELL, -(-len(rows) // columns) * height), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=11)
    for number, row in enumerate(rows):
        left, top = (number % columns) * CELL, (number // columns) * height
        draw.rectangle((left, top, left + CELL - 1, top + height - 1), outline="lightgray")
        picture = _picture(row["image"])
        if picture is None:
            draw.text((left + MARGIN, top + MARGIN), "(no image)", fill="gray", font=font)
        else:
            sheet.paste(picture, (left + (CELL - picture.width) // 2, top + MARGIN))
        caption = top + MARGIN + IMAGE + 4
        draw.text((left + MARGIN, caption), f"{row['id']}", fill="black", font=font)
        draw.text((left + MARGIN, caption + LINE), f"{row['source']}", fill="darkblue", font=font)
        for index, line in enumerate(texts[number]):
            draw.text((left + MARGIN, caption + (index + 2) * LINE), line, fill="black", font=font)
    sheet.save(path, format="PNG")


def _picture(image: dict[str, Any] | None) -> Image.Image | None:
    if image is None:
        return None
    from PIL import Image

    picture = Image.open(io.BytesIO(image["bytes"])).convert("RGB")
    scale = min((CELL - 2 * MARGIN) / picture.width, IMAGE / picture.height)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    # Small images are shown in whole pixels, so that what the student sees can be counted.
    return picture.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


def _lines(conversation: Sequence[dict[str, str]]) -> list[str]:
    lines = []
    for turn in conversation:
        for mark, text in (("Q: ", turn["user"]), ("A: ", turn["assistant"])):
            lines += textwrap.wrap(mark + text[:4000], LINE_CHARS, subsequent_indent="   ") or [mark]
    if len(lines) > TEXT_LINES:
        lines = [*lines[: TEXT_LINES - 1], "..."]
    return lines
