"""Students' inits: which there are (`conf/student/`), where they lie, what is known of their files, taking them up.

A folder that `prepare_student` has taken up holds `student.json`: what it was made of and sha256 of every file. Without
it nobody has checked the folder, and no task with a card takes it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from curation_env.errors import InvalidSetting, MissingAssets, TaskMismatch
from curation_env.locks import locked

Progress = Callable[[dict[str, Any]], None]
RECORD = "student.json"
MINI = "mini-llava"
#: What an author's checkpoint folder may hold that no loader reads.
_IGNORED = (".git", ".md", ".msgpack", ".h5", ".ot", "LICENSE")


class Card(BaseModel):
    """A public student: `conf/student/<name>.yaml`.

    Attributes:
        model_type: As `config.json` says it.
        shape: Numbers of its language model's configuration, which tell sizes of one architecture apart.
        image_tokens: Tokens that the largest image of a row takes.
        architecture: The rest of its configuration. From these two its memory is computed before its files are there;
            they are no part of what pins it.
        public: Name of the checkpoint where it is published; empty where it is assembled.
        parts: What the source folder of one that is assembled holds, with its name where it is published.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    title: str
    model_type: str
    shape: dict[str, int]
    image_tokens: int = Field(exclude=True)
    architecture: dict[str, Any] = Field(exclude=True)
    public: str = ""
    parts: dict[str, str] = {}

    @model_validator(mode="after")
    def _one_origin(self) -> Card:
        if bool(self.public) == bool(self.parts):
            raise ValueError("a student is either published (public) or assembled (parts)")
        return self

    @property
    def origin(self) -> str:
        """What to get, in the words of those who published it."""
        if self.public:
            return self.public
        return "; ".join(f"{path}: {name}" for path, name in self.parts.items())


def card_of(student: str) -> Card | None:
    """The card of a public student; None for the miniature's and for a folder of the user's own."""
    path = _cards() / f"{student}.yaml"
    return None if "/" in student or not path.is_file() else Card.model_validate(yaml.safe_load(path.read_text()))


def student_names() -> list[str]:
    """Every student that a task can name."""
    return [MINI, *sorted(path.stem for path in _cards().glob("*.yaml"))]


def student_dir(student: str, root: Path) -> Path:
    """Folder of a student's init, whether or not it is there.

    Args:
        student: A name, or the path of a checkpoint folder of the user's own (with a slash in it).
        root: The data root.

    Raises:
        MissingAssets: No such student.
    """
    if student == MINI:
        return Path(str(resources.files("curation_env.mini"))) / "assets" / "init"
    if "/" in student:
        return Path(student).expanduser().absolute()
    if card_of(student) is None:
        raise MissingAssets(f"no student {student!r}: the students are {', '.join(student_names())}")
    return root / "students" / student


def student_hash(student: str) -> str:
    """sha256, in hex, that pins the init in a task's hash: over its files, or over the card of a public student.

    The files of a public student lie under a data root, which a task does not know; `identity` pins those.
    """
    card = card_of(student)
    if card is not None:
        return hashlib.sha256(card.model_dump_json().encode()).hexdigest()
    return _hash_of_files(student_dir(student, Path()))


def identity(folder: Path) -> str:
    """sha256, in hex, over the files of an init that was taken up.

    Raises:
        TaskMismatch: A file is gone or has another size than when it was taken up.
    """
    files = json.loads((folder / RECORD).read_text())["files"]
    for name, entry in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            raise TaskMismatch(f"{path} is not the file that was prepared: prepare the student again")
    text = json.dumps({name: entry["sha256"] for name, entry in files.items()}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def prepare_student(student: str, root: Path, source: Path, on_progress: Progress | None = None) -> Path:
    """Take a student's init up from the public files, checked; what lies under the root already is replaced.

    Args:
        source: The folder of the published checkpoint, or that of the parts to assemble it of.

    Raises:
        InvalidSetting: The student is no public one.
        MissingAssets: The source lacks files; the message says what it must hold.
        TaskMismatch: The source is another student, or one that has been instruction-tuned.
    """
    card = card_of(student)
    if card is None:
        raise InvalidSetting(f"student {student!r} is used where it lies: there is nothing to prepare")
    folder = student_dir(student, root)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(root / ".prepare.lock", mode=0o666):
        for left in folder.parent.glob(f".{folder.name}.*.partial"):
            shutil.rmtree(left, ignore_errors=True)
        scratch = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
        scratch.mkdir()
        try:
            _fill(card, source, scratch, on_progress)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
        if folder.exists():  # moved first: a folder that is half removed must not pass for a student
            outdated = folder.with_name(f".{folder.name}.{os.getpid()}.outdated.partial")
            folder.rename(outdated)
            shutil.rmtree(outdated, ignore_errors=True)
        scratch.rename(folder)
    return folder


def _fill(card: Card, source: Path, folder: Path, on_progress: Progress | None) -> None:
    """Put a student's checked files and their record into an empty folder."""
    made_of: dict[str, Any]
    if card.parts:
        from curation_env.assemble import assemble_llava

        made_of = assemble_llava(card, source, folder, on_progress)
    else:
        _take_up(card, source, folder)
        made_of = {card.public: "as it was given; whether it is the published one, the sha256 of its files tell"}
    check_shape(card, folder, source)
    files = {path.name: {"bytes": path.stat().st_size, "sha256": file_hash(path)} for path in sorted(folder.iterdir())}
    record = {"name": card.name, "title": card.title, "made_of": made_of, "files": files}
    (folder / RECORD).write_text(json.dumps(record, indent=1))


def check_shape(card: Card, folder: Path, shown: Path) -> None:
    """Compare a checkpoint's configuration with a card.

    Args:
        shown: Where it lies in the user's eyes.

    Raises:
        TaskMismatch: It is of another architecture or size.
        MissingAssets: It lacks its tokenizer or its image processor.
    """
    from transformers import AutoConfig

    found = json.loads((folder / "config.json").read_text()).get("model_type")
    if found != card.model_type:
        raise TaskMismatch(f"{shown} is a {found!r}, {card.title} is a {card.model_type!r}: get {card.origin}")
    text = AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config()
    for name, expected in card.shape.items():
        if getattr(text, name) != expected:
            raise TaskMismatch(
                f"{shown} has {name} {getattr(text, name):,}, {card.title} has {expected:,}: get {card.origin}"
            )
    for names in (("tokenizer.json",), ("preprocessor_config.json", "processor_config.json")):
        if not any((folder / name).is_file() for name in names):
            raise MissingAssets(f"{shown} has no {' or '.join(names)}: get all files of {card.origin}")


def file_hash(path: Path) -> str:
    """sha256 of a file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _take_up(card: Card, source: Path, folder: Path) -> None:
    """Put a published checkpoint's files into a folder: hard links, or copies where there can't be any."""
    if not (source / "config.json").is_file():
        raise MissingAssets(f"{source} has no config.json: it must be the folder of {card.public}")
    for path in sorted(source.iterdir()):
        if not path.is_file() or path.name.startswith(".") or path.name.endswith(_IGNORED) or path.name == RECORD:
            continue
        try:
            os.link(path.resolve(), folder / path.name)
        except OSError:
            shutil.copyfile(path, folder / path.name)


@functools.cache
def _hash_of_files(folder: Path) -> str:
    hasher = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            hasher.update(path.relative_to(folder).as_posix().encode() + b"\0")
            hasher.update(bytes.fromhex(file_hash(path)))
    return hasher.hexdigest()


def _cards() -> Path:
    return Path(str(resources.files("curation_env.conf"))) / "student"
