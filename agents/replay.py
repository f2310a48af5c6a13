"""An agent that plays a recorded run again: its submissions, or its policies."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from curation_env import actions
from curation_env.agents.base import Agent, Step
from curation_env.errors import CurationError, InvalidSetting
from curation_env.pool import canonical_json
from curation_env.runs import Run, read_run
from curation_env.trajectory import Trajectory

_RESUBMIT = '''"""The recorded submission of iteration {number}."""

import json

import curation

IDS = """
{ids}
""".split()
REWRITES = json.loads({rewrites})

curation.select(IDS, REWRITES)
'''

# In a process of its own, since the seed of Python's hashes is fixed when a process starts.
_RERUN = '''"""The recorded policy of iteration {number}, with its recorded seed."""

import os
import subprocess
import sys

SOURCE = {source}
SEEDS = {{"CURATION_SEED": "{seed}", "PYTHONHASHSEED": "{hash_seed}"}}

with open("policy.py", "w", encoding="utf-8") as stream:
    stream.write(SOURCE)
sys.exit(subprocess.run([sys.executable, "policy.py"], env=os.environ | SEEDS).returncode)
'''


class ReplayDiffers(CurationError):
    """A resubmitted submission did not get its recorded scores."""

    code = "replay_differs"


class Comparison(NamedTuple):
    """A recorded iteration beside its replay; `submission` says whether the ids (and rewrites) are equal."""

    iteration: int
    submission: bool
    recorded: float
    replayed: float | None


class ReplayAgent(Agent):
    """Resubmits every scored submission of a run; the scores must be equal.

    The run that plays it needs the task, the iterations and the device of the recorded one, and `cache=False` where
    training itself is to be repeated.

    Args:
        run: Folder of the recorded run.
        policies: Run the recorded policies instead, with their recorded seeds, and say which selected other rows: a
            policy may have read the workspace, the history or a clock.

    Raises:
        NoSuchRun: There is no run, or nothing was scored in it.
        InvalidSetting: (in `reset`) The new run allows fewer iterations than were recorded.
        ReplayDiffers: (while it plays, submissions only) Equal submissions, other scores.
    """

    name = "replay"
    deterministic = True

    def __init__(self, run: str | Path, policies: bool = False) -> None:
        self._run: Run = read_run(run)
        self._policies = policies
        self._scored = [entry for entry in self._run.state.history[1:] if entry.scores is not None]
        trajectory = Trajectory(self._run.folder / "trajectory.git")  # read without the run's lock: nothing is written
        files = [trajectory.files(entry.commit) for entry in self._scored]
        make = rerun_policy if policies else resubmit_policy
        self._actions = [
            actions.policy(make(entry.number, tree)) for entry, tree in zip(self._scored, files, strict=True)
        ]

    def identity(self) -> str:
        return hashlib.sha256(canonical_json(self._actions).encode()).hexdigest()

    def reset(self, task: Mapping[str, Any], seed: int) -> None:
        self.comparisons: list[Comparison] = []
        if task["iterations"] < len(self._actions):
            raise InvalidSetting(f"the recorded run has {len(self._actions)} iterations: allow as many")

    def act(self, observation: Any, info: dict[str, Any]) -> actions.Action:
        played = len(self.comparisons)
        return self._actions[played] if played < len(self._actions) else actions.stop()

    def observe(self, step: Step) -> None:
        if step.ticket or len(self.comparisons) == len(self._scored):
            return
        entry, info = self._scored[len(self.comparisons)], step.info
        assert entry.average is not None
        same = info["submission"] == entry.submission
        score = info["score"]  # None where the replay was not scored
        self.comparisons.append(Comparison(entry.number, same, entry.average, score))
        if self._policies:
            return
        scores = {key.removeprefix("scores/"): value for key, value in info.items() if key.startswith("scores/")}
        if not same or scores != entry.scores:
            now = f"{score:.4f}" if score is not None else f"not scored ({info['status']} {info['error']})"
            rows = "" if same or score is None else ", of other rows"
            raise ReplayDiffers(
                f"iteration {entry.number}: recorded {entry.average:.4f}, now {now}{rows}."
                " Is it the same task, device and libraries?",
                details=f"recorded: {entry.scores}\nnow: {scores}",
            )

    def summary(self) -> str:
        lines = []
        for item in self.comparisons:
            ids = "same rows" if item.submission else "OTHER rows"
            now = "not scored" if item.replayed is None else f"{item.replayed:.2f}"
            lines.append(f"iteration {item.iteration}: {ids}, recorded {item.recorded:.2f}, replayed {now}")
        return "\n".join(lines)


def resubmit_policy(number: int, files: Mapping[str, bytes]) -> str:
    """A policy that selects what a commit's submission holds."""
    lines = files.get("submission/rewrites.jsonl", b"").decode().splitlines()
    rewrites = {record["id"]: record["conversation"] for record in map(json.loads, lines)}
    ids = files["submission/ids.txt"].decode().strip()
    source = _RESUBMIT.format(number=number, ids=ids, rewrites=repr(json.dumps(rewrites)))
    if len(source.encode()) > actions.MAX_ACTION_BYTES:
        raise ValueError(
            f"iteration {number} has too many rows to be resubmitted as one action: a policy has at most"
            f" {actions.MAX_ACTION_BYTES:,} bytes. Use policies=True"
        )
    return source


def rerun_policy(number: int, files: Mapping[str, bytes]) -> str:
    """A policy that runs a commit's policy as it was run, seeds included."""
    seed = json.loads(files["provenance.json"])["policy_seed"]
    source = files["policy.py"].decode()
    return _RERUN.format(number=number, source=repr(source), seed=seed, hash_seed=seed % 2**32)
