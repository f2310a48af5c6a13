"""Where a task's assets lie, what is missing, and how the miniature's are made."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curation_env.errors import MissingAssets, TaskMismatch
from curation_env.locks import locked

if TYPE_CHECKING:
    from curation_env.mini.world import Scale
    from curation_env.task import Task

Progress = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Assets:
    """Prepared folders of one task.

    Attributes:
        pool: The pool, blocked rows included (host only).
        suite: TSV files and the split (host only).
        view: `rows/`, the agent's view of the pool.
        index: The audit index that blocked the rest (host only).
        student: The init, in the format of `from_pretrained`.
        student_mark: The file that says that the init is there, and of a public student, that it was checked.
    """

    pool: Path
    suite: Path
    view: Path
    index: Path
    student: Path
    student_mark: str = "config.json"

    def state(self) -> dict[str, tuple[Path, bool]]:
        """Every asset with its path and whether it is there."""
        marks = {
            "pool": self.pool / "meta.json",
            "suite": self.suite / "split.json",
            "view": self.view / "meta.json",
            "student": self.student / self.student_mark,
        }
        return {name: (getattr(self, name), mark.is_file()) for name, mark in marks.items()}


def data_root(path: str | Path | None = None) -> Path:
    """The folder of pools, suites, caches and runs: `path`, `$CURATION_ENV_DATA`, or `~/.cache/curation-env`."""
    chosen = path or os.environ.get("CURATION_ENV_DATA") or Path.home() / ".cache" / "curation-env"
    return Path(chosen).expanduser().absolute()


def locate(task: Task, root: Path) -> Assets:
    """Where the assets of a task lie under a data root, whether or not they are there."""
    if isinstance(task.pool.world, str):
        raise MissingAssets(f"task {task.name!r} draws a world at every reset: choose one, for example world 1000000")
    from curation_env.students import RECORD, card_of, student_dir

    student, mark = student_dir(task.student, root), RECORD if card_of(task.student) else "config.json"
    pool, suite = _pool_key(task), _suite_key(task)
    # The view depends on the rules that blocked its rows, so they are part of its name.
    views, view = root / "views", f"{pool}--{suite}--{_short_hash(task.audit_config)}"
    index = views / view / "audit"
    if task.pool.kind != "mini":  # several students share the pool, and its view but for the counts of their tokens
        view = f"{view}--{Path(task.student).name}-{_counting(task, student)}"
    return Assets(root / "pools" / pool, root / "suites" / suite, views / view, index, student, mark)


def _pool_key(task: Task) -> str:
    from curation_env.ingest.catalog import pool_key as public_key
    from curation_env.mini.pool import pool_key
    from curation_env.mini.world import SCALES

    if task.pool.kind != "mini":
        return public_key(task.pool)
    assert isinstance(task.pool.world, int)
    return pool_key(task.pool.world, SCALES[task.pool.scale])


def _suite_key(task: Task) -> str:
    from curation_env.mini.suite import suite_key

    return suite_key(_suite_scale(task)) if task.suite.startswith("mini-") else task.suite_config["name"]


def _suite_scale(task: Task) -> Scale:
    """Size of the miniature's suite: that of its pool, where it has one."""
    from curation_env.mini.world import MINI, SCALES

    return SCALES[task.pool.scale] if task.pool.kind == "mini" else MINI


def _counting(task: Task, student: Path) -> str:
    """What a count of supervised tokens depends on."""
    recipe = {key: task.recipe_config.get(key) for key in ("chat", "max_length", "text_only_image", "image_pad")}
    files = [student / name for name in ("tokenizer.json", "config.json", "preprocessor_config.json")]
    return _short_hash([recipe, [hashlib.sha256(f.read_bytes()).hexdigest() if f.is_file() else "" for f in files]])


def prepared(task: Task, root: Path, on_progress: Progress | None = None, *, make: bool = False) -> Assets:
    """The assets of a task, ready for use; what the miniature lacks is made (seconds), the rest must be there.

    A pool of the miniature that another generator made, and a view that was made of another pool or suite or by other
    rules, are made again.

    Args:
        task: The task.
        root: The data root.
        on_progress: Shows how far it is.
        make: Make what takes long as well: the audit index and the view of a public pool.

    Raises:
        MissingAssets: Lists every missing path and the command that prepares it.
        TaskMismatch: An asset is not the one that the task pins; names the library that differs.
    """
    assets = locate(task, root)
    on_progress = on_progress or (lambda _: None)
    there = all(there for _, there in assets.state().values())
    if not (there and suite_whole(task, assets) and pool_fits(task, assets) and view_fits(task, assets)):
        mine = task.family == task.pool.kind == "mini" and assets.state()["student"][1]
        if not (make or mine):
            raise MissingAssets(describe_missing(task, assets))
        root.mkdir(parents=True, exist_ok=True)
        with locked(root / ".prepare.lock", mode=0o666):
            _clear_partial(assets)
            if task.suite.startswith("mini-"):
                _make_suite(task, assets, on_progress)
            if task.pool.kind == "mini":
                _make_miniature(task, assets, on_progress)
            elif not all(assets.state()[name][1] for name in ("pool", "suite", "student")):
                raise MissingAssets(describe_missing(task, assets))
            else:
                from curation_env.ingest.prepare import make_view

                make_view(task, assets, on_progress)
    _check_pins(task, assets)
    return assets


def suite_whole(task: Task, assets: Assets) -> bool:
    """Whether the suite is split and has the file of every benchmark."""
    names = ["split.json", "meta.json", *(spec["file"] for spec in task.suite_config["benchmarks"].values())]
    return all((assets.suite / name).is_file() for name in names)


def pool_fits(task: Task, assets: Assets) -> bool:
    """Whether the pool is whole and, if it is generated, of the world as today's generator draws it."""
    from curation_env.mini.world import GENERATOR, WorldSpec

    if task.pool.kind != "mini":
        return (assets.pool / "meta.json").is_file()
    assert isinstance(task.pool.world, int)
    meta = _read_json(assets.pool / "meta.json")
    drawn = (GENERATOR, WorldSpec.draw(task.pool.world).hash)
    return (meta.get("generator"), meta.get("world_hash")) == drawn and (assets.pool / "truth.parquet").is_file()


def view_fits(task: Task, assets: Assets) -> bool:
    """Whether the agent's view, and the audit index, are of this pool and this suite by the task's rules."""
    if not audited(task, assets):
        return False
    # A student's view is the shared one's files, under the same names.
    views = [folder / "rows" / "state.json" for folder in (assets.index.parent, assets.view)]
    whole = all(path.is_file() for path in [*views, assets.view / "meta.json"])
    return whole and views[0].read_bytes() == views[1].read_bytes()


def audited(task: Task, assets: Assets) -> bool:
    """Whether there is an audit index that fits, and beside it the view that was made by it."""
    pool, made = (_read_json(folder / "meta.json") for folder in (assets.pool, assets.index.parent))
    return index_fits(task, assets) and pool["hash"] == made.get("hash")


def index_fits(task: Task, assets: Assets) -> bool:
    """Whether the audit index is of this pool and suite by the task's rules."""
    from curation_env.audit.index import FORMAT
    from curation_env.audit.items import suite_digest, suite_files
    from curation_env.audit.rules import as_rules

    pool, index = (_read_json(folder / "meta.json") for folder in (assets.pool, assets.index))
    if not pool or index.get("format") != FORMAT:
        return False
    made_of = (index.get("pool"), index.get("suite"), index.get("rules"))
    suite = suite_digest(suite_files(task.suite_config, assets.suite))
    return made_of == (pool["hash"], suite, as_rules(task.audit_config).model_dump(mode="json"))


def _read_json(path: Path) -> dict[str, Any]:
    """A `meta.json`; empty where there is none or it was cut off."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def describe_missing(task: Task, assets: Assets) -> str:
    """One text with every missing path, what it is made of, and the command that prepares it."""
    from curation_env.needs import describe
    from curation_env.task import task_names

    return describe(task, assets, task.name if task.name in task_names() else "TASK.yaml")


def _make_suite(task: Task, assets: Assets, on_progress: Progress) -> None:
    from curation_env.evaluation.split import write_split
    from curation_env.mini.suite import build_suite

    on_progress({"stage": "prepare suite", "done": 0, "total": 3, "unit": "steps"})
    if not suite_whole(task, assets):
        assets.suite.parent.mkdir(parents=True, exist_ok=True)
        build_suite(assets.suite, _suite_scale(task))
        write_split(assets.suite, task.suite_config)


def _make_miniature(task: Task, assets: Assets, on_progress: Progress) -> None:
    from curation_env.audit.index import build_index
    from curation_env.audit.view import write_view
    from curation_env.mini.pool import build_pool
    from curation_env.mini.world import SCALES
    from curation_env.pool import Pool

    def report(what: str, done: int) -> None:
        on_progress({"stage": f"prepare {what}", "done": done, "total": 3, "unit": "steps"})

    assert task.pool.kind == "mini"
    assert isinstance(task.pool.world, int)
    report("pool", 1)
    if not pool_fits(task, assets):
        assets.pool.parent.mkdir(parents=True, exist_ok=True)
        if assets.pool.exists():  # moved first: a folder that is half removed must not pass for a pool
            outdated = assets.pool.with_name(f".{assets.pool.name}.{os.getpid()}.outdated.partial")
            assets.pool.rename(outdated)
            shutil.rmtree(outdated, ignore_errors=True)
        build_pool(task.pool.world, assets.pool, SCALES[task.pool.scale])
    report("audit", 2)
    if not view_fits(task, assets):
        pool = Pool.open(assets.pool)
        (assets.view / "meta.json").unlink(missing_ok=True)  # the view is of the old index, whatever happens next
        index = build_index(pool, assets.suite, task.suite_config, task.audit_config, assets.index)
        write_view(pool, index, assets.view)
    report("done", 3)


def _clear_partial(assets: Assets) -> None:
    """Remove what a killed preparation left; whoever prepares holds the lock, so nobody is at work in there."""
    left = [*assets.pool.parent.glob(".*.partial"), *assets.view.parent.glob("*/.*.partial")]
    left += [*assets.view.parent.glob(".*.partial")]
    for path in left:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _check_pins(task: Task, assets: Assets) -> None:
    from curation_env.mini.fingerprint import check_fingerprint
    from curation_env.mini.world import generator_hash

    pinned_pool = task.pool.hash if task.pool.kind == "mini" else None
    if task.pool.kind == "mini" and task.pool.generator is not None:
        try:
            check_fingerprint("the world generator", generator_hash(), task.pool.generator, task.pinned_with, {})
        except TaskMismatch as error:
            raise TaskMismatch(f"{error}\nUse the release that task {task.name!r} belongs to") from None
    for what, path, pinned in (("pool", assets.pool, pinned_pool), ("suite", assets.suite, task.suite_hash)):
        if pinned is None:
            continue
        meta = json.loads((path / "meta.json").read_text())
        try:
            check_fingerprint(what, meta["hash"], pinned, task.pinned_with, meta)
        except TaskMismatch as error:
            raise TaskMismatch(f"{error}\nThe files are in {path}: delete the folder and prepare it again") from None


def _short_hash(value: Any) -> str:
    from curation_env.pool import canonical_json

    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:8]
