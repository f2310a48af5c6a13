"""Agents, and the loop that plays them; each agent is a module of its own, imported by who uses it."""

from curation_env.agents.base import Agent, AgentDiverged, EpisodeResult, Saves, Step, run_episode

__all__ = ["Agent", "AgentDiverged", "EpisodeResult", "Saves", "Step", "run_episode"]
