"""Curation-Bench: an agent curates training data, as a Gymnasium environment. Importing registers the ids."""

from curation_env.registry import register_all
from curation_env.version import __version__

__all__ = ["__version__"]

register_all()
