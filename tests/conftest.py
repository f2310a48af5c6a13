"""What the tests share: one data root for the session, and environments of the `nano` task."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One data root for all processes of a session: the miniature is made once, base scores are shared."""
    if os.environ.get("PYTEST_XDIST_WORKER"):
        return tmp_path_factory.getbasetemp().parent / "data"
    return tmp_path_factory.getbasetemp() / "data"


@pytest.fixture(scope="session", autouse=True)
def _data_root_of_commands(data_root: Path) -> Iterator[None]:
    """Commands and environments that name no data root use the session's, never the user's."""
    before = os.environ.get("CURATION_ENV_DATA")
    os.environ["CURATION_ENV_DATA"] = str(data_root)
    yield
    if before is None:
        del os.environ["CURATION_ENV_DATA"]
    else:
        os.environ["CURATION_ENV_DATA"] = before


@pytest.fixture
def nano(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Makes environments of the `nano` task in the test's folder and closes them."""
    from curation_env import envs

    made = []

    def make(**overrides: Any) -> Any:
        overrides.setdefault("run_dir", tmp_path / f"run-{len(made)}")
        overrides.setdefault("sandbox", "bubblewrap")
        env = envs.make("nano", **overrides)
        made.append(env)
        return env

    yield make
    for env in made:
        env.close()


RANDOM_POLICY = """
import random
import curation
ids = curation.pool()["id"]
random.seed(curation.seed())
curation.select(random.sample(list(ids), curation.task()["rows"]))
"""


@pytest.fixture
def random_policy() -> str:
    return RANDOM_POLICY
