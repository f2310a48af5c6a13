"""Tickets of an episode that is continued by another process."""

from __future__ import annotations

import re

from curation_env.actions import policy, shell
from curation_env.statuses import STATUSES


def test_a_resumed_episode_knows_its_tickets(nano, tmp_path):
    env = nano(run_dir=tmp_path / "run")
    env.reset(seed=1)
    obs, *_ = env.step(shell("echo 'raise KeyError(1)' > p.py; echo 'raise KeyError(2)' > q.py; curation submit p.py"))
    ticket = re.search(r"t-[0-9a-f]+", obs["message"]).group()
    obs, *_ = env.step(policy())
    assert "KeyError: 1" in obs["message"]
    env.step(shell("curation submit q.py"))
    env.close()

    env = nano(run_dir=tmp_path / "run")
    env.reset(seed=1, options={"resume": True})
    obs, *_ = env.step(shell(f"curation wait {ticket}; curation submit p.py"))
    assert obs["message"].count(f"{ticket}: done (error)") == 2
    obs, *_, info = env.step(policy())
    assert "KeyError: 2" in obs["message"]
    assert STATUSES[obs["status"]] == "invalid"
    assert info["iteration"] == 0
