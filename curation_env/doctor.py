"""What a task needs, what of it is on this machine, and what brings the rest."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import NamedTuple

from curation_env.assets import data_root, locate
from curation_env.errors import OutOfMemory
from curation_env.students import Card, card_of, describe
from curation_env.task import Task

#: Modules that the paths of every task import; deepspeed only where training runs in several processes.
LIBRARIES = (
    "torch",
    "transformers",
    "datasets",
    "faiss",
    "gymnasium",
    "docker",
    "deepspeed",
    "hydra",
    "wandb",
    "numpy",
)
#: A training seed's checkpoint, caches and a workspace: what a run writes beside its assets.
SPACE_GB = 2


class Finding(NamedTuple):
    """One line of the doctor's table."""

    what: str
    ok: bool
    text: str
    required: bool = True


def examine(name: str, root: Path | None = None, world: int | None = None) -> list[Finding]:
    """Check assets, libraries, sandbox engines, git and disk space for a task; starts nothing."""
    task = Task.load(name)
    folder = data_root(root)
    if world is not None:
        task = task.in_world(world)
    elif isinstance(task.pool.world, str):
        task = task.in_world(1)  # any world shows what the family needs
    assets = locate(task, folder)
    generated = task.pool.kind == "mini"
    made = "made by the first reset" if generated else f"prepare with: curation-env prepare {name}"
    findings = [
        Finding(what, there, str(path) if there else f"{path}: {made}", required=not generated)
        for what, (path, there) in assets.state().items()
    ]
    if not findings[-1].ok:
        findings[-1] = Finding("student", False, describe(task.student, assets.student, name))
    if task.pool.kind != "mini":
        from curation_env.ingest.prepare import state_of

        findings[0] = findings[0]._replace(text=state_of(task.pool, assets.pool))
    for library in LIBRARIES:
        there = importlib.util.find_spec(library) is not None
        findings.append(Finding(f"library {library}", there, "installed" if there else "pip install -e ."))
    findings += _engines()
    git = shutil.which("git")
    findings.append(Finding("git", git is not None, git or "install git: the trajectory is kept with it"))
    findings.append(_space(folder))
    card = card_of(task.student)
    return findings if card is None else [*findings, _gpu(card, task)]


def _gpu(card: Card, task: Task) -> Finding:
    """Whether this machine's GPU holds the training of a public student, in its worst step, and which way."""
    import torch

    from curation_env.training import plan as plans
    from curation_env.training.recipe import Recipe

    recipe, what = Recipe.model_validate(task.recipe_config), "GPU memory"
    if not torch.cuda.is_available():
        ways = [f"{size}: {plans.of_worst(card, recipe, plans.machine_of(size)).describe()}" for size in plans.SIZES]
        text = f"no GPU here; {card.name} trains on one of " + "; ".join(ways)
        return Finding(what, False, text, required=False)
    device = torch.device("cuda", 0)
    gpu = plans.read_gpu(device)
    named = f"{gpu.name}, {gpu.total / plans.GIB:.1f} GiB"
    try:
        plan = plans.of_worst(card, recipe, plans.read_machine(device))
    except OutOfMemory as error:
        return Finding(what, False, f"{named}: {error}")
    return Finding(what, True, f"{named}: {card.name} trains {plan.describe()}")


def _engines() -> list[Finding]:
    from curation_env.sandbox import available

    states = available()
    one = any(reason == "" for reason in states.values())
    return [
        Finding(f"sandbox {kind}", reason == "", reason or "ready", required=not one) for kind, reason in states.items()
    ]


def _space(folder: Path) -> Finding:
    place = folder
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free / 1e9
    return Finding("disk space", free >= SPACE_GB, f"{free:.0f} GB free at {place}, {SPACE_GB} GB needed")
