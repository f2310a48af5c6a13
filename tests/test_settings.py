"""What the user sets is checked where it is set; what can go wrong is in one table."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from pathlib import Path
from typing import get_args

import pytest

import curation_env
from curation_env import envs, errors
from curation_env.assets import prepared
from curation_env.choices import SANDBOXES
from curation_env.envs.mini import MiniWorldsEnv
from curation_env.errors import CurationError, InvalidSetting, MissingAssets
from curation_env.mini.world import TEST_WORLDS, TRAIN_WORLDS
from curation_env.sandbox import SandboxKind
from curation_env.task import Task


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"sandbox": "bubblewarp"}, "did you mean 'bubblewrap'"),
        ({"device": "gpu"}, "device must be one of auto, cpu, cuda, not 'gpu'"),
        ({"seeds": 99}, "ask for fewer"),
        ({"detail": "all"}, "detail"),
    ],
)
def test_settings_are_checked_when_an_environment_is_made(setting, words):
    with pytest.raises(CurationError, match=words):
        envs.make("nano", **setting)


def test_every_engine_can_be_chosen():
    assert get_args(SandboxKind) == SANDBOXES


def test_a_seed_draws_a_train_world_and_an_option_takes_any(monkeypatch):
    env, drawn = MiniWorldsEnv(), []

    class Drawn(Exception):
        pass

    def note(task):
        drawn.append(task.pool.world)
        raise Drawn

    monkeypatch.setattr(env, "_pipeline_for", note)  # a world is made here, which takes a while

    def world(**arguments):
        with pytest.raises(Drawn):
            env.reset(**arguments)
        return drawn[-1]

    first = [world(seed=seed) for seed in range(20)]
    assert len(set(first)) == 20
    assert all(number in TRAIN_WORLDS for number in first)
    assert world(seed=3) == first[3]
    assert world() not in first  # the next episode is of another world
    test_world = TEST_WORLDS.start
    assert world(options={"world": test_world}) == test_world
    assert world(seed=3, options={"world": test_world}) == test_world
    for wrong in (-1, "abc", 1.5):
        with pytest.raises(InvalidSetting, match="world"):
            env.reset(options={"world": wrong})


def test_a_world_of_a_task_that_has_one(nano):
    worlds = Task.load("mini-worlds")
    assert worlds.drawn(7).pool.world == 7
    assert worlds.hash != worlds.drawn(7).hash == Task.load("mini-worlds").drawn(7).hash
    with pytest.raises(InvalidSetting, match="has one world"):
        Task.load("mini").drawn(7)


def test_missing_assets_are_all_listed_with_what_prepares_them(tmp_path):
    task = Task.load("nano").model_copy(update={"family": "on disk"})  # the miniature makes what is missing
    with pytest.raises(MissingAssets) as caught:
        prepared(task, tmp_path)
    text = str(caught.value)
    assert all(str(tmp_path / folder) in text for folder in ("pools", "suites", "views"))
    assert "curation-env prepare nano" in text


def test_every_documented_error_is_in_the_table():
    for module in pkgutil.walk_packages(curation_env.__path__, "curation_env."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for name in ("agents.policies", "agents.replay", "wrappers.scaffold"):
        importlib.import_module(f"curation_env.{name}")
    groups = {"CurationError", "AgentError", "InfrastructureError"}
    found = {cls.__name__ for cls in errors.by_code().values() if cls.__module__.startswith("curation_env")} - groups
    listed = [row.split("|")[1] for row in errors.__doc__.splitlines() if row.startswith("|")]
    assert found <= {name.strip() for names in listed for name in names.split(",")}
    assert len(found) > 20


#: From the lowest; a folder imports its own row and those above it.
LAYERS = (
    ("errors", "choices", "statuses", "text", "version", "progress"),
    ("task", "pool", "submission", "assets"),
    ("audit", "training", "evaluation", "sandbox", "mini", "ledger", "ingest"),
    ("pipeline",),
    ("feedback", "render"),
    ("episode", "runs"),
    ("envs",),
    ("wrappers",),
    ("agents", "report"),
    ("cli",),
)


def test_dependencies_point_one_way():
    """At the top of a file: what a function imports when it is called may lie anywhere."""
    height = {name: k for k, names in enumerate(LAYERS) for name in names}
    wrong = []
    root = Path(__file__).parent.parent
    files = [
        file for folder in ("curation_env", "envs", "agents", "wrappers") for file in (root / folder).rglob("*.py")
    ]
    for file in files:
        parts = file.relative_to(root).with_suffix("").parts
        part = parts[1] if parts[0] == "curation_env" else parts[0]
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("curation_env"):
                names = [node.module] if "." in node.module else [f"{node.module}.{name.name}" for name in node.names]
                others = [name.split(".")[1] for name in names]
                wrong += [
                    (str(file), other) for other in others if height.get(other, 0) > height.get(part, len(LAYERS))
                ]
    assert len(files) > 80
    assert not wrong
