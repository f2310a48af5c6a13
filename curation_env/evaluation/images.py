"""The images of an item as VLMEvalKit hands them to a model: decoded from the TSV and stored as files."""

from __future__ import annotations

import ast
import base64
import io
import mimetypes

from PIL import Image

LOSSY = ("image/jpeg", "image/webp")


class MalformedImage(ValueError):
    """A field of a TSV that holds no images."""


def decode(field: str) -> tuple[bytes, ...]:
    """The encoded images of a field: one in base64, or a list of them.

    Raises:
        MalformedImage: It is neither.
    """
    try:
        parts = ast.literal_eval(field) if field.startswith("[") else [field]
        return tuple(base64.b64decode(part, validate=True) for part in parts)
    except (ValueError, SyntaxError) as error:
        raise MalformedImage(f"an image field is not base64: {error}") from error


def stored(images: tuple[bytes, ...], paths: str, files: dict[str, bytes]) -> tuple[bytes, ...]:
    """The images as a model reads them from the files that `paths` (a name, or a list of names) says.

    A file whose name asks for a lossy format is encoded again, and rows that name one file share its first picture.
    Other files keep every pixel, so their bytes stay as they are.

    Args:
        files: The files of the benchmark so far, by name; those that are new are added.

    Raises:
        MalformedImage: There are not as many names as images, or an image can't be read.
    """
    try:
        names = ast.literal_eval(paths) if paths.startswith("[") else [paths]
    except (ValueError, SyntaxError) as error:
        raise MalformedImage(f"an image_path is no list: {error}") from error
    if len(names) != len(images):
        raise MalformedImage(f"{len(images)} images have {len(names)} names: {paths[:100]}")
    for name, data in zip(names, images, strict=True):
        if name not in files:
            files[name] = _written(name, data)
    return tuple(files[name] for name in names)


def _written(name: str, data: bytes) -> bytes:
    if mimetypes.guess_type(name)[0] not in LOSSY:
        return data
    try:
        with Image.open(io.BytesIO(data)) as image:
            picture = image.convert("RGB") if image.mode in ("RGBA", "P", "LA") else image
            out = io.BytesIO()
            picture.save(out, format=Image.registered_extensions()["." + name.rpartition(".")[2].lower()])
    except (OSError, KeyError) as error:
        raise MalformedImage(f"image {name} can't be stored: {error}") from error
    return out.getvalue()
