"""What a task over a public pool needs beside it: the audit index, the agent's view, and the student's token counts.

The view of one audit is shared by all students: `views/<pool>--<suite>--<rules>/` holds its rows and the index, and
`views/...--<student>/` the same files under second names, with that student's counts.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from curation_env.audit.index import AuditIndex, build_index
from curation_env.audit.view import write_view
from curation_env.errors import MissingAssets
from curation_env.ingest.build import Progress, ingest
from curation_env.ingest.catalog import Catalog, pool_key
from curation_env.ingest.report import FAULTS, coverage, differences, read_report
from curation_env.ingest.tokens import count_tokens
from curation_env.locks import locked
from curation_env.pool import TOKENS, Pool, link, row_files
from curation_env.task import PublicPool
from curation_env.training.recipe import Recipe

if TYPE_CHECKING:
    from curation_env.assets import Assets
    from curation_env.task import Task


def prepare_pool(
    pool: PublicPool, root: Path, source: Path | None, on_progress: Progress | None = None
) -> dict[str, Any]:
    """Make a public pool, or make it again of what has changed, and return its report.

    Args:
        pool: Which one.
        root: The data root.
        source: Folder of the public files; None where the pool is there already.
        on_progress: Shows how far it is.

    Raises:
        MissingAssets: There is no pool, and no source to make it of; or the source lacks files. The message says what
            it must hold.
    """
    path = root / "pools" / pool_key(pool)
    if source is not None:
        root.mkdir(parents=True, exist_ok=True)
        with locked(root / ".prepare.lock", mode=0o666):
            ingest(pool.kind, source, root / "pools", on_progress)
    elif not (path / "meta.json").is_file():
        raise MissingAssets(
            f"no pool at {path}: name the folder of its files with --source DIR.\n{Catalog.load(pool.kind).layout()}"
        )
    return {**read_report(path), "path": str(path)}


def state_of(pool: PublicPool, path: Path) -> str:
    """How much of the published pool is in the pool at `path`, and which public files would bring the rest."""
    catalog = Catalog.load(pool.kind)
    report = read_report(path)
    lacking = {source for source, entry in report["sources"].items() if entry["faults"]}
    images = ((file, name) for file, name in catalog.public.items() if file != catalog.records)
    # Where sources are no folders, any of them may lack images.
    files = [f"{file} ({name})" for file, name in images if file.split("/")[0] in lacking or not catalog.rows]
    return f"{path}: {coverage(report)}" + (f". Look at {', '.join(files)}" if lacking else "")


def summary(report: dict[str, Any]) -> list[str]:
    """What a person reads once a pool is made."""
    lines = [f"pool {report['pool']}: {coverage(report)}"]
    if report["faults"] or report["notes"]:
        lines.append(f"  row by row: {Path(report['path']) / FAULTS}")
    lines += [f"  kept, but odd: {count:,} {note}" for note, count in report["notes"].items()]
    lines += [f"  not as published: {text}" for text in differences(report)]
    return lines


def make_view(task: Task, assets: Assets, on_progress: Progress) -> None:
    """Make what is missing or outdated of the audit index, the shared view, and the student's view."""
    from curation_env.assets import audited, index_fits

    shared = assets.index.parent
    recipe = Recipe.model_validate(task.recipe_config)
    pool = Pool.open(assets.pool)
    if not index_fits(task, assets):
        (shared / "meta.json").unlink(missing_ok=True)  # the view is of the old index, whatever happens next
        build_index(pool, assets.suite, task.suite_config, task.audit_config, assets.index, on_progress)
    if not audited(task, assets):
        write_view(pool, AuditIndex.open(assets.index), shared)
    scratch = assets.view.with_name(f".{assets.view.name}.{os.getpid()}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    (scratch / "rows").mkdir(parents=True)
    for file in [*row_files(shared / "rows"), shared / "rows" / "state.json", shared / "rows" / "dataset_info.json"]:
        link(file, scratch / "rows" / file.name)
    link(shared / "image_digests.npy", scratch / "image_digests.npy")
    np.save(scratch / "rows" / TOKENS, count_tokens(scratch / "rows", assets.student, recipe, on_progress))
    meta = json.loads((shared / "meta.json").read_text())
    (scratch / "meta.json").write_text(json.dumps({**meta, "student": task.student}, indent=1, sort_keys=True))
    shutil.rmtree(assets.view, ignore_errors=True)
    scratch.rename(assets.view)
