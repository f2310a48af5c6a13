"""The registered ids: data alone, one line a task file (a test compares the two)."""

from __future__ import annotations

from typing import NamedTuple

from gymnasium.envs.registration import WrapperSpec, register


class Entry(NamedTuple):
    """One id: its task, its class and its step limit (three actions of look-around for each submission, and room)."""

    id: str
    task: str
    entry_point: str
    max_episode_steps: int = 200


ENTRIES = (
    Entry("CurationBench-Mini-v0", "mini", "curation_env.envs.mini:MiniEnv"),
    Entry("CurationBench-MiniWorlds-v0", "mini-worlds", "curation_env.envs.mini:MiniWorldsEnv"),
    Entry("CurationBench-MiniMixture-v0", "mini-mixture", "curation_env.envs.mini:MiniWorldsEnv"),
)


def register_all() -> None:
    """Register every id with Gymnasium."""
    for entry in ENTRIES:
        numeric = entry.task == "mini-mixture"
        register(
            id=entry.id,
            entry_point=entry.entry_point,
            kwargs={"task": entry.task},
            max_episode_steps=entry.max_episode_steps,
            # Numbers alone survive Gymnasium's default vector environments; texts need ours (see envs/vector.py).
            vector_entry_point=None if numeric else "curation_env.envs.vector:make_vector",
            additional_wrappers=_NUMERIC if numeric else (),
        )


_NUMERIC = (
    WrapperSpec("MixtureAction", "curation_env.wrappers.numeric:MixtureAction", {}),
    WrapperSpec("NumericObservation", "curation_env.wrappers.numeric:NumericObservation", {}),
)
