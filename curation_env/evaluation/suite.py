"""A suite: which benchmarks, by which rules; and the items of its VLMEvalKit TSV files."""

from __future__ import annotations

import ast
import base64
import hashlib
import json
import string
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from pydantic import BaseModel, ConfigDict

from curation_env.errors import MissingAssets, StageFailed

LETTER_HINT = "Answer with the option's letter from the given choices directly."
DIRECT_HINT = "Answer the question directly."
Part = Literal["feedback", "sealed"]


class Benchmark(BaseModel):
    """One benchmark of a suite file.

    Attributes:
        scorer: Name of the scoring rule (`evaluation/scorers`).
        prompt: "open" puts the question as it is; "choice" adds hint, options and the request for a letter.
        scale: What the benchmark is usually reported out of; scores here are always percent.
        chance: Percent that guessing gets.
        sealed: Whether its items are split; otherwise all of them are feedback.
        judge: Whether open answers go to the judge.
        cost: Rows to generate.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: str
    scorer: str
    prompt: Literal["open", "choice"]
    max_new_tokens: int
    scale: int = 100
    chance: float
    sealed: bool
    judge: bool
    cost: int


class JudgeSpec(BaseModel):
    """Which judge grades open answers: the miniature's own server, or an endpoint of the user's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["builtin", "endpoint"]
    model: str


class Suite(BaseModel):
    """A resolved suite file (`conf/suite/`)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    judge: JudgeSpec | None = None
    benchmarks: dict[str, Benchmark]


@dataclass(frozen=True)
class Item:
    """One row of a benchmark.

    Attributes:
        images: Encoded bytes, in order.
        options: Lettered options, in alphabetical order.
        fields: Every other column that is not empty, as text.
    """

    benchmark: str
    index: str
    question: str
    answer: str
    category: str
    images: tuple[bytes, ...] = field(repr=False)
    options: dict[str, str] = field(default_factory=dict)
    fields: dict[str, str] = field(default_factory=dict)

    def prompt(self, style: str) -> str:
        """The text that the student is asked, images apart."""
        if style == "open":
            return self.question
        hint = [self.fields["hint"]] if "hint" in self.fields else []
        lines = [*hint, self.question, *(f"{letter}. {text}" for letter, text in self.options.items())]
        return "\n".join([*lines, LETTER_HINT if self.options else DIRECT_HINT])


def read_items(path: Path, name: str) -> list[Item]:
    """Read a benchmark's TSV.

    Missing values are what pandas takes for missing, the text "None" in a cell among them: VLMEvalKit reads its files
    so, and such an option is not shown there.

    Raises:
        MissingAssets: There is no such file.
        StageFailed: The file is not a VLMEvalKit TSV: a column, an image or an index is missing or repeated.
    """
    if not path.is_file():
        raise MissingAssets(f"benchmark {name} is missing: no file {path}")
    table = pd.read_csv(path, sep="\t", dtype=str)
    if lacking := {"index", "question", "answer"} - set(table.columns):
        raise StageFailed(f"{path.name}: no column {', '.join(sorted(lacking))}")
    rows = [{k: v for k, v in row.items() if isinstance(v, str)} for row in table.to_dict("records")]
    if len({row.get("index") for row in rows}) != len(rows):
        raise StageFailed(f"{path.name}: an index is missing or occurs twice")
    fields = {row["index"]: row.get("image", "") for row in rows}
    decoded = {index: _images(text, path) for index, text in fields.items() if len(text) > 64}
    items = []
    for row in rows:
        shared = fields[row["index"]]  # a short field is the index of the row that holds the image
        holder = row["index"] if len(shared) > 64 else shared
        if shared and holder not in decoded:
            raise StageFailed(f"{path.name}: item {row['index']} has the image of item {holder}, which has none")
        items.append(_item(name, row, decoded[holder] if shared else ()))
    return items


def _images(text: str, path: Path) -> tuple[bytes, ...]:
    try:
        parts = ast.literal_eval(text) if text.startswith("[") else [text]
        return tuple(base64.b64decode(part, validate=True) for part in parts)
    except (ValueError, SyntaxError) as error:
        raise StageFailed(f"{path.name}: an image field is not base64: {error}") from error


def _item(name: str, row: dict[str, str], images: tuple[bytes, ...]) -> Item:
    own = {"index", "question", "answer", "category", "image"}
    return Item(
        benchmark=name,
        index=row["index"],
        question=row.get("question", ""),
        answer=row.get("answer", ""),
        category=row.get("category", ""),
        images=images,
        options={letter: row[letter] for letter in string.ascii_uppercase if letter in row},
        fields={k: v for k, v in row.items() if k not in own and k not in string.ascii_uppercase},
    )


def read_suite(folder: str | Path, suite: Suite) -> dict[str, list[Item]]:
    """Read the items of every benchmark.

    Raises:
        MissingAssets: A benchmark's file is missing; the message lists every one.
    """
    folder = Path(folder)
    missing = [name for name, benchmark in suite.benchmarks.items() if not (folder / benchmark.file).is_file()]
    if missing:
        raise MissingAssets(f"benchmarks are missing in {folder}: {', '.join(missing)}")
    return {name: read_items(folder / benchmark.file, name) for name, benchmark in suite.benchmarks.items()}


def read_split(folder: str | Path, items: dict[str, list[Item]]) -> dict[str, dict[str, tuple[Part, str]]]:
    """Read `split.json`: (part, group) by benchmark and index.

    Raises:
        MissingAssets: The suite was not split, or not all of its items were.
    """
    path = Path(folder) / "split.json"
    if not path.is_file():
        raise MissingAssets(f"the suite in {folder} is not split: no split.json; prepare it again")
    split: dict[str, dict[str, Any]] = json.loads(path.read_text())["items"]
    for name, rows in items.items():
        lost = [item.index for item in rows if item.index not in split.get(name, {})]
        if lost:
            raise MissingAssets(f"{path} does not place {name}/{lost[0]} and {len(lost) - 1} more: prepare it again")
    return {name: {index: (part, group) for index, (part, group) in rows.items()} for name, rows in split.items()}


def fingerprint(folder: str | Path, suite: Suite) -> str:
    """Identity of the suite's files on this machine, without reading them: path, size and time of each."""
    parts = []
    for benchmark in suite.benchmarks.values():
        path = Path(folder) / benchmark.file
        if path.is_file():
            stat = path.stat()
            parts.append((str(path.resolve()), stat.st_size, stat.st_mtime_ns))
    return hashlib.sha256(json.dumps([suite.model_dump(mode="json"), parts]).encode()).hexdigest()
