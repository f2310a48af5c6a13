"""The miniature's planted leaks: all of them blocked, next to nothing else."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from curation_env.audit.index import build_index
from curation_env.audit.rules import AuditRules
from curation_env.mini.pool import build_pool
from curation_env.mini.suite import build_suite
from curation_env.mini.world import NANO
from curation_env.pool import Pool
from curation_env.task import conf_dir

RULES = AuditRules.load(conf_dir() / "audit" / "mini-v1.yaml")
SUITE = yaml.safe_load((conf_dir() / "suite" / "mini-v1.yaml").read_text())


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("suites") / "nano"
    build_suite(folder, NANO)
    return folder


def measure(world: int, suite: Path, folder: Path) -> tuple[set[str], int, int]:
    """Kinds of planted leaks that were missed, clean rows that were blocked, and clean rows."""
    build_pool(world, folder / "pool", NANO)
    pool = Pool.open(folder / "pool")
    truth = pq.read_table(folder / "pool" / "truth.parquet").to_pylist()
    blocked = set(build_index(pool, suite, SUITE, RULES, folder / "audit").blocked)
    leaks = {row["id"]: row["leak_kind"] for row in truth if row["leak_of"]}
    missed = {kind for id_, kind in leaks.items() if id_ not in blocked}
    return missed, len(blocked - leaks.keys()), len(pool) - len(leaks)


@pytest.mark.parametrize("world", [0, 1, 1_000_000, 1_000_004])
def test_nano_worlds(world: int, suite: Path, tmp_path: Path) -> None:
    missed, wrong, _ = measure(world, suite, tmp_path)
    assert missed == set()
    assert wrong <= 1


def test_at_most_one_clean_row_in_two_thousand_is_blocked(suite: Path, tmp_path: Path) -> None:
    """On drawn worlds, which are two thousand rows only together."""
    found = [measure(world, suite, tmp_path / str(world)) for world in (7, 99_999, 424_242)]
    assert not any(missed for missed, _, _ in found)
    assert sum(wrong for _, wrong, _ in found) <= sum(clean for _, _, clean in found) / 2000


def test_the_rules_cover_the_suite() -> None:
    assert set(RULES.benchmarks) == set(SUITE["benchmarks"])
