"""A suite's folder from the public files: checked, taken over and split."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curation_env.assets import locate
from curation_env.errors import InvalidSetting, MissingAssets
from curation_env.evaluation.split import write_split
from curation_env.evaluation.suite import Suite, check_public
from curation_env.locks import locked

if TYPE_CHECKING:
    from curation_env.task import Task


def take_up_suite(task: Task, root: Path, source: Path) -> tuple[Path, dict[str, int]]:
    """Prepare a task's suite under a data root of the user's files; returns its folder and the items by benchmark.

    Raises:
        InvalidSetting: The task's suite is not made of public files.
        MissingAssets, TaskMismatch, StageFailed: As `prepare_suite`.
    """
    if task.suite.startswith("mini-"):
        raise InvalidSetting(f"task {task.name!r} makes its own suite: leave --suite out")
    folder = locate(task, root).suite
    root.mkdir(parents=True, exist_ok=True)
    with locked(root / ".prepare.lock", mode=0o666):
        prepare_suite(source, folder, task.suite_config)
    return folder, json.loads((folder / "meta.json").read_text())["items"]


def prepare_suite(source: str | Path, folder: str | Path, suite: dict[str, Any]) -> str:
    """Take the files of a suite over from where the user put them, split the items, and write `meta.json`.

    A file that is there already is kept; `meta.json` comes last, so a folder that has one is whole. Files are linked
    where the file system allows it, else copied.

    Args:
        source: The user's folder of public TSV files, under their public names.
        folder: The suite's folder; made where it is not there.
        suite: The resolved suite file.

    Returns:
        sha256 over the files' names and contents, in hex.

    Raises:
        MissingAssets: Files are missing; the message lists every one with where it is public.
        TaskMismatch: A file is not the public one.
        StageFailed: A file is not a VLMEvalKit TSV.
    """
    source, folder, resolved = Path(source), Path(folder), Suite.model_validate(suite)
    missing = [one for one in resolved.benchmarks.values() if not _found(one.file, folder, source)]
    if missing:
        lines = [f"  {one.file}{f': {one.url} (md5 {one.md5})' if one.url else ''}" for one in missing]
        raise MissingAssets("\n".join([f"{source} lacks files of suite {resolved.name}:", *lines]))
    folder.mkdir(parents=True, exist_ok=True)
    hasher = hashlib.sha256()
    for name, one in resolved.benchmarks.items():
        found = _found(one.file, folder, source)
        assert found is not None
        check_public(found, one.md5, one.url)
        if found.parent != folder:
            _take(found, folder / one.file)
        hasher.update(name.encode() + b"\0")
        with (folder / one.file).open("rb") as file:
            hasher.update(hashlib.file_digest(file, "sha256").digest())
    write_split(folder, suite)
    digest = hasher.hexdigest()
    split = json.loads((folder / "split.json").read_text())["items"]
    meta = {"key": resolved.name, "hash": digest, "items": {name: len(rows) for name, rows in split.items()}}
    scratch = folder / f".meta.{os.getpid()}"
    scratch.write_text(json.dumps(meta, indent=1, sort_keys=True))
    scratch.rename(folder / "meta.json")
    return digest


def _found(name: str, *folders: Path) -> Path | None:
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def _take(source: Path, target: Path) -> None:
    scratch = target.with_name(f".{target.name}.{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):
        scratch.unlink()
    try:
        os.link(source.resolve(), scratch)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, scratch)
    scratch.rename(target)
