"""A suite: which benchmarks, by which rules; and the items of its VLMEvalKit TSV files."""

from __future__ import annotations

import hashlib
import json
import re
import string
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from pydantic import BaseModel, ConfigDict

from curation_env.errors import MissingAssets, StageFailed, TaskMismatch
from curation_env.evaluation.images import MalformedImage, decode, stored

# What LLaVA-1.5 is asked for, after a question with options and after one without; in Chinese where the question is.
LETTER_HINT = ("Answer with the option's letter from the given choices directly.", "请直接回答选项字母。")
DIRECT_HINT = ("Answer the question directly.", "请直接回答问题。")
_CHINESE = re.compile("[\u4e00-\u9fff]")
Part = Literal["feedback", "sealed"]


class Benchmark(BaseModel):
    """One benchmark of a suite file.

    Attributes:
        file: Its TSV in the suite's folder. url, md5: The public file that it must be, where it is one.
        split: Only rows of this split (column `split`) are items; None takes all.
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
    url: str | None = None
    md5: str | None = None
    split: str | None = None
    scorer: str
    prompt: Literal["open", "choice"]
    max_new_tokens: int
    scale: int = 100
    chance: float
    sealed: bool
    judge: bool
    cost: int


class JudgePrompts(BaseModel):
    """Whose words the judge is asked in.

    Attributes:
        commit: The commit of VLMEvalKit whose prompts the suite is defined by.
        files: The files that hold them, by path, with their git blob ids at that commit.
        source: "vlmevalkit" reads them from the user's checkout, "own" takes our wording (`evaluation.wording`).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    commit: str
    files: dict[str, str]
    source: Literal["vlmevalkit", "own"] = "own"


class JudgeSpec(BaseModel):
    """Which judge grades open answers.

    Attributes:
        kind: The miniature's own server, or an endpoint of the user's.
        body: More fields of every request, such as what turns a model's thinking off.
        prompts: None asks in our words.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["builtin", "endpoint"]
    model: str
    body: dict[str, Any] = {}
    prompts: JudgePrompts | None = None


class Suite(BaseModel):
    """A resolved suite file (`conf/suite/`).

    Attributes:
        spreadsheets: Whether answers are graded as VLMEvalKit reads them back from its spreadsheets, where those that
            pandas takes for missing ("", "None", "NA", ...) have become "nan".
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    spreadsheets: bool = False
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
        asked = "\n".join(lines)
        english, chinese = LETTER_HINT if self.options else DIRECT_HINT
        return f"{asked}\n{chinese if _CHINESE.search(asked) else english}"


def read_items(
    path: Path, name: str, *, split: str | None = None, md5: str | None = None, url: str | None = None
) -> list[Item]:
    """Read a benchmark's TSV.

    Rows and values are those that VLMEvalKit has in memory. Missing values are what pandas takes for missing, the text
    "None" in a cell among them, and such an option is not shown; a column of numbers alone is text again in pandas'
    form; rows without an image are left out where the file has images.

    Raises:
        MissingAssets: There is no such file.
        TaskMismatch: The file is not the public one.
        StageFailed: The file is not a VLMEvalKit TSV: a column, an image or an index is missing or repeated.
    """
    if not path.is_file():
        raise MissingAssets(f"benchmark {name} is missing: no file {path}{_where(url, md5)}")
    check_public(path, md5, url)
    table = pd.read_csv(path, sep="\t")
    answer = "gpt4_ans" if "gpt4_ans" in table else "answer"
    if lacking := {"index", "question", answer} - set(table.columns):
        raise StageFailed(f"{path.name}: no column {', '.join(sorted(lacking))}")
    if "image" in table:
        table = table[table["image"].notna()]
    rows = [{k: str(v) for k, v in row.items() if not pd.isna(v)} for row in table.to_dict("records")]
    if len({row.get("index") for row in rows}) != len(rows):
        raise StageFailed(f"{path.name}: an index is missing or occurs twice")
    images = _row_images(rows, path)
    if split is not None and "split" not in table:
        raise StageFailed(f"{path.name}: no column split, and only its {split} rows are items")
    return [_item(name, row, images[row["index"]]) for row in rows if split in (None, row.get("split"))]


def check_public(path: Path, md5: str | None, url: str | None) -> None:
    """Raise TaskMismatch where a file is not the public one that a suite names."""
    if md5 is None:
        return
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "md5").hexdigest()
    if found != md5:
        raise TaskMismatch(f"{path} is not the suite's file, its md5 is {found}{_where(url, md5)}")


def _where(url: str | None, md5: str | None) -> str:
    """Which public file is meant, for messages."""
    return f"; wanted is VLMEvalKit's public {url.rpartition('/')[2]} (md5 {md5}) from {url}" if url else ""


def _row_images(rows: list[dict[str, str]], path: Path) -> dict[str, tuple[bytes, ...]]:
    """The images of every row, by index; a short field is the index of the row that holds them."""
    fields = {row["index"]: row.get("image", "") for row in rows}
    try:
        held = {index: decode(text) for index, text in fields.items() if len(text) > 64}
        if all("image_path" in row for row in rows):
            files: dict[str, bytes] = {}
            return {
                row["index"]: stored(_held(row["index"], fields, held, path), row["image_path"], files) for row in rows
            }
    except MalformedImage as error:
        raise StageFailed(f"{path.name}: {error}") from error
    return {index: _held(index, fields, held, path) for index in fields}


def _held(index: str, fields: dict[str, str], held: dict[str, tuple[bytes, ...]], path: Path) -> tuple[bytes, ...]:
    text = fields[index]
    holder = index if len(text) > 64 else text
    if text and holder not in held:
        raise StageFailed(f"{path.name}: item {index} has the image of item {holder}, which has none")
    return held[holder] if text else ()


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
    missing = {name: one for name, one in suite.benchmarks.items() if not (folder / one.file).is_file()}
    if missing:
        public = [f"\n  {one.file}: {one.url}" for one in missing.values() if one.url]
        raise MissingAssets(f"benchmarks are missing in {folder}: {', '.join(missing)}{''.join(public)}")
    return {
        name: read_items(folder / one.file, name, split=one.split, md5=one.md5, url=one.url)
        for name, one in suite.benchmarks.items()
    }


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
