"""What a task's assets are made of, under the names of those who published it, and the command that takes each up."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from curation_env.students import RECORD, card_of

if TYPE_CHECKING:
    from curation_env.assets import Assets
    from curation_env.task import Task


class Need(NamedTuple):
    """One asset of a task.

    Attributes:
        what: "pool", "suite", "view" or "student".
        there: Whether it is there, whole.
        text: Where it is; if it is not there, also what makes it.
        parts: Of one that is not there: what must lie in the folder that the command is given, with its public name.
    """

    what: str
    there: bool
    text: str
    parts: dict[str, str] = {}


def needs(task: Task, assets: Assets, name: str) -> list[Need]:
    """Every asset of a task, there or not; reads no large file.

    Args:
        name: What the command line calls the task: its name, or its file.
    """
    from curation_env.assets import suite_whole, view_fits

    found = assets.state()
    there = {what: state for what, (_, state) in found.items()}
    there["suite"] = there["suite"] and suite_whole(task, assets)
    # Whether a view is outdated can be told from the assets that it is made of alone.
    complete = there["pool"] and there["suite"] and there["student"]
    there["view"] = there["view"] and (not complete or view_fits(task, assets))
    listed = []
    for what, (path, _) in found.items():
        if there[what]:
            listed.append(Need(what, True, str(path)))
            continue
        command, parts = _source(what, task, assets, name)
        listed.append(Need(what, False, f"{path}: {command}", parts))
    return listed


def describe(task: Task, assets: Assets, name: str) -> str:
    """One text with everything that is missing: paths, public names and commands."""
    lines = [f"task {task.name!r} lacks:"]
    for need in needs(task, assets, name):
        if not need.there:
            lines += [f"  {need.what}: {need.text}", *(f"    {part}: {public}" for part, public in need.parts.items())]
    return "\n".join([*lines, f"`curation-env doctor {name}` says what else the task needs"])


def _source(what: str, task: Task, assets: Assets, name: str) -> tuple[str, dict[str, str]]:
    """What makes an asset that is missing, and the parts that it is made of."""
    prepare = f"prepare with: curation-env prepare {name}"
    if what == "pool" and task.pool.kind != "mini":
        from curation_env.ingest.catalog import Catalog

        catalog = Catalog.load(task.pool.kind)
        return f"{prepare} --source DIR, the folder of {catalog.title}, which holds", dict(catalog.public)
    if what == "suite" and not task.suite.startswith("mini-"):
        return f"{prepare} --suite DIR, a folder of VLMEvalKit's files, which holds", {
            one["file"]: f"{one['url']}, md5 {one['md5']}"
            for one in task.suite_config["benchmarks"].values()
            if not (assets.suite / one["file"]).is_file()
        }
    if what == "student":
        card = card_of(task.student)
        if card is None:
            return "a checkpoint folder with config.json is expected there", {}
        left = f"{RECORD} is missing, so nobody has checked what lies there; " if _has_config(assets) else ""
        if card.public:
            return f"{left}{prepare} --student DIR, a folder with every file of {card.public}", {}
        return f"{left}{prepare} --student DIR, the folder of {card.title}, which holds", dict(card.parts)
    if what == "view" and task.pool.kind != "mini":
        return f"{prepare}, once the others are there (the audit of the whole pool)", {}
    return prepare if task.pool.kind != "mini" else f"made by the first reset, or {prepare}", {}


def _has_config(assets: Assets) -> bool:
    return (assets.student / "config.json").is_file()
