"""Wrappers: what an agent is told and held to."""

from curation_env.wrappers.scaffold import Scaffold, ScaffoldError, scaffold

__all__ = ["Scaffold", "ScaffoldError", "scaffold"]
