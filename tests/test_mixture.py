"""The mixture policy and the shipped policies, run over a real session and pool."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from workspace_support import Client, Host, make_workspace

from curation_env.agents.policies import policy_source
from curation_env.mixture import mixture_policy
from curation_env.policy import parse_front_matter
from curation_env.session import Session

ROWS = 60


class PoolHost(Host):
    """60 rows of three sources; the loss of a row is its position, row 0 has none."""

    tokens: int | None = None

    def task(self):
        return super().task() | {"rows": 12, "tokens": self.tokens}


@pytest.fixture
def play(tmp_path):
    workspace = make_workspace(tmp_path / "workspace", rows=ROWS)
    host = PoolHost(rows=ROWS)

    def run(source, tokens=None):
        host.tokens = tokens
        with Session(None, host) as session:
            (workspace / "policy.py").write_text(source)
            done = Client(tmp_path, workspace, session.path).python(source)
        assert done.returncode == 0, done.stderr
        ids = (workspace / ".submission" / "ids.txt").read_text().split()
        return sorted(int(id_, 16) for id_ in ids)

    run.host = host
    return run


def test_weights_become_shares(play):
    rows = play(mixture_policy({"source-0": 3, "source-1": 1, "source-2": 0}, 0.0, 12))
    assert Counter(row % 3 for row in rows) == {0: 9, 1: 3}
    assert play.host.signals_charged == 0


def test_a_cut_leaves_out_the_highest_loss_of_every_source(play):
    rows = play(mixture_policy({"source-0": 1, "source-1": 1}, 0.5, 20))
    # 20 rows a source: the half with the higher loss goes, and first the row that has no loss at all.
    assert set(rows) == {row for row in range(1, 31) if row % 3 < 2} | {30, 1}
    assert play.host.signals_charged == 1


def test_what_a_source_lacks_comes_from_the_others(play):
    rows = play(mixture_policy({"source-0": 1000, "source-1": 1, "source-2": 1}, 0.0, 40))
    assert Counter(row % 3 for row in rows) == {0: 20, 1: 10, 2: 10}
    assert len(play(mixture_policy({"source-0": 1}, 0.0, 40))) == 20
    assert Counter(row % 3 for row in play(mixture_policy({f"source-{k}": 0 for k in range(3)}, 0.0, 12))) == {
        0: 4,
        1: 4,
        2: 4,
    }


def test_the_same_seed_selects_the_same_rows_and_tokens_are_respected(play):
    source = mixture_policy({"source-0": 1, "source-1": 2, "source-2": 3}, 0.1, 12)
    rows = play(source)
    assert rows == play(source)
    assert sum(5 + row for row in play(source, tokens=200)) <= 200


@pytest.mark.parametrize("name", ["random", "source_balanced", "loss_window"])
def test_shipped_policies(play, name):
    source = policy_source(name)
    assert parse_front_matter(source).family
    rows = play(source)
    assert len(set(rows)) == 12
    assert 0 < sum(5 + row for row in play(source, tokens=200)) <= 200
    if name == "source_balanced":
        assert Counter(row % 3 for row in rows) == {0: 4, 1: 4, 2: 4}
    if name == "loss_window":
        assert rows == list(range(45, 57))  # 5% of 60 rows are above the ceiling


@pytest.mark.parametrize(
    ("weights", "cut", "rows"),
    [({}, 0.0, 1), ({"a": -1}, 0.0, 1), ({"a": np.nan}, 0.0, 1), ({"a": 1}, 1.0, 1), ({"a": 1}, 0.0, 0)],
)
def test_nonsense_is_refused(weights, cut, rows):
    with pytest.raises(ValueError):
        mixture_policy(weights, cut, rows)


def test_a_source_name_is_never_code():
    source = mixture_policy({'"}; import os #': 1.0}, 0.0, 1)
    compile(source, "policy.py", "exec")
    assert "\nimport os" not in source
