"""Records of the public files, read one by one: what LLaVA's format says, and what a row of the pool holds of it.

A record is `{"id", "image"?, "conversations": [{"from": "human" | "gpt", "value"}, ...], "task_name"?}`. Its `id` is
not unique, so it is kept for the report alone. The `<image>` mark goes out of the texts, as LLaVA's own trainer takes
it out (and the white space around what is left): the recipe puts it back where the student wants it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from curation_env.errors import InvalidSetting
from curation_env.ingest.catalog import TEXT
from curation_env.pool import Conversation, row_id

MARK = "<image>"
_HUMAN, _MODEL = ("human", "user"), ("gpt", "assistant")


@dataclass(frozen=True, slots=True)
class Record:
    """One record, ready to become a row.

    Attributes:
        number: Its place in the file, from 0.
        name: The file's own `id`, for people: not unique.
        source: What the pool calls its source.
        image: Its image, relative to the folder of images (as written, where there is a fault); None for text alone.
        conversation: Its turns.
        base_id: The row's id, without the number of a repeat; empty where there is a fault.
        notes: What was changed to make a row of it.
        fault: Why it can't become a row; empty for one that can.
    """

    number: int
    name: str
    source: str
    image: str | None
    conversation: Conversation
    base_id: str = ""
    notes: tuple[str, ...] = ()
    fault: str = ""


class _Malformed(ValueError):
    pass


def parse(raw: Any, number: int, kind: str) -> Record:
    """Make a `Record` of a JSON value; what can't become a row comes back with its `fault`.

    Args:
        raw: The value.
        number: Its place in the file.
        kind: "llava": the source is the first folder of the image's path; "visionflan": the task's name.
    """
    name = str(raw.get("id", "")) if isinstance(raw, dict) else ""
    try:
        if not isinstance(raw, dict):
            raise _Malformed(f"a record is an object, not {type(raw).__name__}")
        image = _image(raw.get("image"))
        notes: list[str] = []
        conversation = _turns(raw.get("conversations"), image is not None, notes)
        source = _source(raw, image, kind)
        return Record(number, name, source, image, conversation, row_id(source, image, conversation), tuple(notes))
    except _Malformed as error:
        fault = str(error)
    except UnicodeEncodeError:
        fault = "it has half a character in its text"
    shown = raw.get("image") if isinstance(raw, dict) else None
    image = str(shown)[:500] if shown else None
    return Record(number, name, _source(raw, image, kind), image, [], fault=fault)


def _source(raw: Any, image: str | None, kind: str) -> str:
    if kind == "visionflan" and isinstance(raw, dict) and raw.get("task_name"):
        return str(raw["task_name"])
    if image is None:
        return TEXT
    return image.split("/")[0] if kind == "llava" and "/" in image else kind


def _image(path: Any) -> str | None:
    if path is None or path == "":
        return None
    if not isinstance(path, str):
        raise _Malformed(f"its image is a {type(path).__name__}, not the path of one")
    parts = PurePosixPath(path).parts
    if path.startswith("/") or ".." in parts or "\0" in path:
        raise _Malformed(f"its image lies outside of the source folder: {path[:200]!r}")
    return "/".join(parts)


def _turns(raw: Any, image: bool, notes: list[str]) -> Conversation:
    if not isinstance(raw, list) or not raw:
        raise _Malformed("it has no conversations")
    texts = []
    for turn in raw:
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise _Malformed("a turn has no text in `value`")
        speaker = turn.get("from")
        if speaker not in _HUMAN and speaker not in _MODEL:
            raise _Malformed(f"a turn is from {speaker!r}, neither human nor gpt")
        texts.append((speaker in _HUMAN, turn["value"]))
    if not texts[0][0]:
        texts = texts[1:]  # as LLaVA's trainer does
        notes.append("opening turn of the model left out")
    if any(human != (k % 2 == 0) for k, (human, _) in enumerate(texts)):
        raise _Malformed("human and model don't take turns")
    if len(texts) % 2:
        texts = texts[:-1]
        notes.append("last turn without an answer left out")
    if not texts:
        raise _Malformed("nothing is answered in it")
    if not image and any(MARK in text for _, text in texts):
        notes.append("mark of an image without an image")
    plain = [text.replace(MARK, "").strip() if MARK in text else text for _, text in texts]
    return [{"user": user, "assistant": answer} for user, answer in zip(plain[::2], plain[1::2], strict=True)]


@dataclass
class JsonArray:
    """A file with one JSON array, read value by value.

    Attributes:
        size: Bytes of the file.
        done: Bytes read so far.
        sha256: In hex, of what was read so far.
    """

    path: Path
    size: int = 0
    done: int = 0
    _hash: Any = field(default_factory=hashlib.sha256)
    _stream: BinaryIO | None = None

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def __iter__(self) -> Iterator[Any]:
        """Yield the values; the memory that it takes does not grow with the file.

        Raises:
            InvalidSetting: The file holds no JSON array, or is cut off.
        """
        import ijson

        self.size = self.path.stat().st_size
        with self.path.open("rb") as self._stream:
            if not self._stream.read(1024).lstrip().startswith(b"["):
                raise InvalidSetting(f"{self.path} holds no JSON array of records")
            self._stream.seek(0)
            try:
                yield from ijson.items(self, "item", use_float=True)
            except ijson.JSONError as error:
                raise InvalidSetting(
                    f"{self.path} is no whole JSON array: {' '.join(str(error).split())[:200]} "
                    f"(near byte {self.done:,} of {self.size:,}). Download it again; finished work is kept"
                ) from error

    def read(self, size: int) -> bytes:
        """What ijson reads by."""
        assert self._stream is not None
        data = self._stream.read(size)
        self.done += len(data)
        self._hash.update(data)
        return data
