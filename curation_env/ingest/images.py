"""Whether an image file is whole: its header by Pillow, its end by its format's own marker, without decoding it.

A picture that passes may still hold damaged pixels; the audit index decodes every one.
"""

from __future__ import annotations

import io
import struct
import warnings
from pathlib import Path
from typing import NamedTuple

#: File name endings by format, as Pillow names formats.
ENDINGS = {"JPEG": (".jpg", ".jpeg"), "PNG": (".png",), "GIF": (".gif",), "WEBP": (".webp",)}
_STARTS = (b"\xff\xd8", b"\x89PNG", b"GIF8", b"RIFF")
_ALL_ENDINGS = tuple(ending for endings in ENDINGS.values() for ending in endings)


class Check(NamedTuple):
    """What is wrong with an image (`fault`: no row can be made of it) or odd about it (`note`); empty for nothing."""

    fault: str = ""
    note: str = ""


def find_image(root: Path, path: str) -> tuple[bytes | None, Check]:
    """Read an image and check it, under another of the usual endings where it is missing: mirrors of OCR-VQA differ.

    Returns:
        Its bytes, None where no row can be made of it, and what `check_image` says; the faults "missing" and
        "unreadable" and the note "other ending" come besides.
    """
    place = root / path
    try:
        data = place.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        others = (place.with_suffix(ending) for ending in _ALL_ENDINGS)
        other = next((file for file in others if file != place and file.is_file()), None)
        if other is None:
            return None, Check("missing")
        data = other.read_bytes()
        fault, _ = check_image(data, other.name)
        check = Check(fault, "" if fault else f"other ending: found as {other.suffix}")
    except OSError as error:
        return None, Check(f"unreadable: {error.strerror}")
    else:
        check = check_image(data, path)
    return (None if check.fault else data), check


def check_image(data: bytes, path: str) -> Check:
    """Check an image's header, its end marker, and that its content is what its name says.

    Faults begin with "empty", "not an image", "too large" or "truncated"; a note with "mislabelled". Pillow reads by
    content, so a mislabelled image is as good as another.
    """
    from PIL import Image, UnidentifiedImageError

    if not data:
        return Check("empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # large, but not too large
            with Image.open(io.BytesIO(data)) as image:
                kind, (width, height) = image.format or "?", image.size
                kind = "JPEG" if kind == "MPO" else kind  # several JPEGs in a row, of a camera: the first is read
                if kind not in _WHOLE:
                    image.load()
    except UnidentifiedImageError:
        if data.startswith(_STARTS):
            return Check("truncated: no whole header")
        return Check(f"not an image: it begins with {data[:12]!r}")
    except Image.DecompressionBombError:
        return Check("too large: more pixels than Pillow opens")
    except (OSError, ValueError, SyntaxError, IndexError, struct.error) as error:
        return Check(f"truncated: no whole header ({' '.join(str(error).split())[:100]})")
    if width < 1 or height < 1:
        return Check(f"not an image: {width}x{height} pixels")
    if kind in _WHOLE and not _WHOLE[kind](data):
        return Check(f"truncated: the {kind} has no end, {len(data):,} bytes")
    ending = Path(path).suffix.lower()
    if ending not in ENDINGS.get(kind, ()) and Image.registered_extensions().get(ending) != kind:
        return Check(note=f"mislabelled: a {kind} named {ending or 'without an ending'}")
    return Check()


def _whole_jpeg(data: bytes) -> bool:
    """Whether an end marker follows the first scan: the header may hold a thumbnail with an end of its own."""
    place = 2
    while place + 4 <= len(data):
        if data[place] != 0xFF:
            return False
        marker = data[place + 1]
        if marker == 0xFF or marker == 0x01 or 0xD0 <= marker <= 0xD7:  # filling, or a marker without a length
            place += 1 if marker == 0xFF else 2
            continue
        if marker == 0xDA:
            return data.rfind(b"\xff\xd9") > place
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return False


def _whole_png(data: bytes) -> bool:
    return data.rfind(b"IEND\xaeB`\x82") > 0


def _whole_gif(data: bytes) -> bool:
    """Whether the first frame ends; nothing after it is read."""
    place = 13 + _colours(data[10])
    while place < len(data):
        block = data[place]
        if block == 0x21:  # an extension: its label, then sub-blocks
            place = _after_blocks(data, place + 2)
        elif block == 0x2C and place + 10 <= len(data):  # a frame: 10 bytes, colours, size of codes, sub-blocks
            return 0 < _after_blocks(data, place + 11 + _colours(data[place + 9])) <= len(data)
        else:
            return False
        if place <= 0:
            return False
    return False


def _colours(flags: int) -> int:
    """Bytes of the colour table that the flags announce."""
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _after_blocks(data: bytes, place: int) -> int:
    """Where a chain of sub-blocks ends, 0 where it is cut off."""
    while place < len(data):
        if data[place] == 0:
            return place + 1
        place += 1 + data[place]
    return 0


def _whole_webp(data: bytes) -> bool:
    return len(data) >= 8 + int.from_bytes(data[4:8], "little")


_WHOLE = {"JPEG": _whole_jpeg, "PNG": _whole_png, "GIF": _whole_gif, "WEBP": _whole_webp}
