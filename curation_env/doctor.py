"""What a task needs, what of it is on this machine, and what brings the rest."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import NamedTuple

from curation_env.assets import Assets, data_root, locate
from curation_env.errors import OutOfMemory
from curation_env.needs import needs
from curation_env.students import Card, card_of
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
#: Caches and a workspace: what a run writes beside its assets and a checkpoint.
SPACE_GB = 2


class Finding(NamedTuple):
    """One line of the doctor's table."""

    what: str
    ok: bool
    text: str
    required: bool = True


def examine(name: str, root: Path | None = None, world: int | None = None) -> list[Finding]:
    """Check assets, libraries, judge, GPU, sandbox engines, git and disk space for a task; starts nothing."""
    task = Task.load(name)
    folder = data_root(root)
    if world is not None:
        task = task.in_world(world)
    elif isinstance(task.pool.world, str):
        task = task.in_world(1)  # any world shows what the family needs
    assets = locate(task, folder)
    findings = _assets(task, assets, name)
    for library in LIBRARIES:
        there = importlib.util.find_spec(library) is not None
        findings.append(Finding(f"library {library}", there, "installed" if there else "pip install -e ."))
    findings += _judge(task)
    card = card_of(task.student)
    if card is not None:
        findings.append(_gpu(card, task))
    findings += _engines()
    git = shutil.which("git")
    findings.append(Finding("git", git is not None, git or "install git: the trajectory is kept with it"))
    findings.append(_space(folder, task, assets))
    return findings


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


def _assets(task: Task, assets: Assets, name: str) -> list[Finding]:
    """The assets, and below one that is missing everything that it is made of."""
    from curation_env.ingest.prepare import state_of

    findings = []
    for need in needs(task, assets, name):
        text = need.text
        if need.what == "pool" and need.there and task.pool.kind != "mini":
            text = state_of(task.pool, assets.pool)
        findings.append(Finding(need.what, need.there, text, required=task.pool.kind != "mini"))
        findings += [Finding(f"  {part}", False, public) for part, public in need.parts.items()]
    return findings


def _judge(task: Task) -> list[Finding]:
    """The judge of a suite that is graded by an endpoint of the user's, and the words that it is asked in."""
    from curation_env.evaluation.wording import SETTING, checkout
    from curation_env.judge import COMMAND, configured

    wanted = task.suite_config.get("judge") or {"kind": "none"}
    if wanted["kind"] != "endpoint":
        return []
    ready, text = configured(wanted)
    missing = (
        f"{wanted['model']} grades open answers: set CURATION_JUDGE_URL to an OpenAI-compatible endpoint that serves "
        f"it, or {COMMAND} to what starts one on port {{port}}"
    )
    own_words = (
        f"in our own words; for the published ones set {SETTING} to a checkout of open-compass/VLMEvalKit at commit "
        f"{wanted['prompts']['commit']}"
    )
    return [
        Finding("judge", ready, text or missing),
        Finding("judge prompts", bool(checkout()), checkout() or own_words, required=False),
    ]


def _engines() -> list[Finding]:
    from curation_env.sandbox import available

    states = available()
    one = any(reason == "" for reason in states.values())
    return [
        Finding(f"sandbox {kind}", reason == "", reason or "ready", required=not one) for kind, reason in states.items()
    ]


def _space(folder: Path, task: Task, assets: Assets) -> Finding:
    """What a run writes, and a pool that is yet to be made; a checkpoint of a training seed is as large as the init."""
    from curation_env.ingest.catalog import Catalog

    needed = SPACE_GB + sum(path.stat().st_size for path in assets.student.glob("*.safetensors")) / 1e9
    if task.pool.kind != "mini" and not assets.state()["pool"][1]:
        needed += Catalog.load(task.pool.kind).gigabytes
    place = folder
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free / 1e9
    return Finding("disk space", free >= needed, f"{free:.0f} GB free at {place}, {needed:.0f} GB needed")
