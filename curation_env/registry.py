"""The registered ids: data alone, one line a task file (a test compares the two)."""

from __future__ import annotations

from typing import NamedTuple

from gymnasium.envs.registration import WrapperSpec, register


class Entry(NamedTuple):
    """One id: its task, its class, and whether its actions and observations are numbers."""

    id: str
    task: str
    entry_point: str
    numeric: bool = False


ENTRIES = (
    Entry("CurationBench-Mini-v0", "mini", "curation_env.envs.mini:MiniEnv"),
    Entry("CurationBench-MiniWorlds-v0", "mini-worlds", "curation_env.envs.mini:MiniWorldsEnv"),
    Entry("CurationBench-MiniMixture-v0", "mini-mixture", "curation_env.envs.mini:MiniWorldsEnv", numeric=True),
    Entry("CurationBench-LLaVA-v0", "llava", "curation_env.envs.llava:LlavaEnv"),
    Entry("CurationBench-LLaVARewrite-v0", "llava-rewrite", "curation_env.envs.llava:LlavaEnv"),
    Entry("CurationBench-Qwen2.5VL3B-v0", "qwen2.5vl-3b", "curation_env.envs.llava:LlavaEnv"),
    Entry("CurationBench-Qwen2VL2B-v0", "qwen2vl-2b", "curation_env.envs.llava:LlavaEnv"),
    Entry("CurationBench-SmolVLM-v0", "smolvlm", "curation_env.envs.llava:LlavaEnv"),
    Entry("CurationBench-SmolVLM500M-v0", "smolvlm-500m", "curation_env.envs.llava:LlavaEnv"),
    Entry("CurationBench-VisionFlan-v0", "visionflan", "curation_env.envs.llava:LlavaEnv"),
    Entry("CurationBench-VisionFlanSmolVLM-v0", "visionflan-smolvlm", "curation_env.envs.llava:LlavaEnv"),
)


def register_all() -> None:
    """Register every id with Gymnasium. The step limit is the task's own, which the environment keeps itself."""
    for entry in ENTRIES:
        register(
            id=entry.id,
            entry_point=entry.entry_point,
            kwargs={"task": entry.task},
            # Gymnasium takes no vector entry point beside wrappers; its standard modes do as well.
            vector_entry_point=None if entry.numeric else "curation_env.envs.vector:make_vector",
            additional_wrappers=_NUMERIC if entry.numeric else (),
        )


_NUMERIC = (
    WrapperSpec("MixtureAction", "curation_env.wrappers.numeric:MixtureAction", {}),
    WrapperSpec("NumericObservation", "curation_env.wrappers.numeric:NumericObservation", {}),
)
