"""Wrappers: what an agent is told and held to, and numbers in place of texts."""

from curation_env.wrappers.limits import CostLimit, CurationComputeLimit, ShellCommandLimit, WallClockLimit, limits
from curation_env.wrappers.numeric import MixtureAction, NumericObservation
from curation_env.wrappers.scaffold import Scaffold, ScaffoldError, scaffold

__all__ = [
    "CostLimit",
    "CurationComputeLimit",
    "MixtureAction",
    "NumericObservation",
    "Scaffold",
    "ScaffoldError",
    "ShellCommandLimit",
    "WallClockLimit",
    "limits",
    "scaffold",
]
