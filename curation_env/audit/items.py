"""The items of a suite as the audit needs them: texts and images out of VLMEvalKit's TSV files."""

from __future__ import annotations

import ast
import base64
import binascii
import csv
import hashlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curation_env.audit.text import ItemText, words
from curation_env.errors import MissingAssets

_LETTERS = "ABCDEFGH"


@dataclass(frozen=True)
class Item:
    """One evaluation item; `benchmark` and `index` name it in host-side files only."""

    number: int
    benchmark: str
    index: str
    text: ItemText
    images: tuple[bytes, ...]


def suite_files(suite: Mapping[str, Any], folder: Path) -> dict[str, Path]:
    """Map each benchmark of a suite to its TSV file.

    Raises:
        MissingAssets: A file is not there; the message lists all that are missing.
    """
    files = {name: folder / spec.get("file", f"{name}.tsv") for name, spec in suite["benchmarks"].items()}
    if missing := [str(path) for path in files.values() if not path.is_file()]:
        raise MissingAssets(f"the audit needs {', '.join(missing)}: prepare the suite with `curation-env prepare`")
    return files


def read_items(suite: Mapping[str, Any], folder: Path) -> list[Item]:
    """Read every item of every benchmark, feedback and sealed alike."""
    found: list[Item] = []
    for benchmark, path in suite_files(suite, folder).items():
        rows = list(_rows(path))
        images = {row["index"]: row.get("image") or "" for row in rows}
        for row in rows:
            number = len(found)
            found.append(Item(number, benchmark, row["index"], _text(number, row), _images(row.get("image"), images)))
    return found


def suite_digest(files: Mapping[str, Path]) -> str:
    """blake2b-128 over the suite's files in hex: which items an index was built against."""
    hasher = hashlib.blake2b(digest_size=16)
    for name, path in sorted(files.items()):
        hasher.update(name.encode() + b"\0" + hashlib.blake2b(path.read_bytes(), digest_size=32).digest())
    return hasher.hexdigest()


def _rows(path: Path) -> Iterator[dict[str, str]]:
    csv.field_size_limit(sys.maxsize)
    with open(path, newline="", encoding="utf-8") as stream:
        yield from csv.DictReader(stream, delimiter="\t")


def _text(number: int, row: Mapping[str, str]) -> ItemText:
    options = {letter: row[letter] for letter in _LETTERS if row.get(letter)}
    question, answer = row["question"], row.get("answer") or ""
    with_options = "\n".join([question, *options.values()])
    return ItemText(number, words(question), words(with_options), words(options.get(answer.strip(), answer)))


def _images(cell: str | None, by_index: Mapping[str, str]) -> tuple[bytes, ...]:
    """Decode an image cell: base64, a list of such, or the index of the row that holds the image."""
    if not cell:
        return ()
    if cell.startswith("["):
        return tuple(data for part in ast.literal_eval(cell) for data in _images(part, by_index))
    if len(cell) <= 64 and by_index.get(cell, cell) != cell:
        return _images(by_index[cell], {})
    try:
        return (base64.b64decode(cell, validate=True),)
    except binascii.Error:
        return ()  # "none" and the like: an item without an image
