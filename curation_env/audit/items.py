"""The items of a suite as the audit needs them: their texts and images, as the evaluation reads them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curation_env.audit.text import ItemText, words
from curation_env.errors import MissingAssets
from curation_env.evaluation import suite as evaluation


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
    """Read every item of every benchmark, feedback and sealed alike.

    Raises:
        MissingAssets: A benchmark's file is not there.
        StageFailed: A file is malformed: the evaluation would refuse it as well.
    """
    found: list[Item] = []
    for benchmark, path in suite_files(suite, folder).items():
        spec = suite["benchmarks"][benchmark]
        public = {key: spec.get(key) for key in ("split", "md5", "url")}
        for item in evaluation.read_items(path, benchmark, **public):
            number = len(found)
            found.append(Item(number, benchmark, item.index, _text(number, item), item.images))
    return found


def suite_digest(files: Mapping[str, Path]) -> str:
    """blake2b-128 over the suite's files in hex: which items an index was built against."""
    hasher = hashlib.blake2b(digest_size=16)
    for name, path in sorted(files.items()):
        hasher.update(name.encode() + b"\0" + hashlib.blake2b(path.read_bytes(), digest_size=32).digest())
    return hasher.hexdigest()


def _text(number: int, item: evaluation.Item) -> ItemText:
    with_options = "\n".join([item.question, *item.options.values()])
    answer = item.options.get(item.answer.strip(), item.answer)
    return ItemText(number, words(item.question), words(with_options), words(answer))
