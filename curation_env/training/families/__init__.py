"""The architectures of students, one file each: how images enter a row, and where a model keeps its parts.

Importing this imports neither torch nor transformers: what counts tokens needs the first half alone.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from curation_env.errors import MissingAssets, StageFailed
from curation_env.training.families.base import Images, Layout, Parts, Tensors

__all__ = ["Images", "Layout", "Parts", "Tensors", "images_of", "parts_of"]

#: Modules by `model_type` of a checkpoint's config.json. SmolVLM's base checkpoints call themselves idefics3.
MODULES = {
    "llava": "llava",
    "qwen2_vl": "qwen_vl",
    "qwen2_5_vl": "qwen_vl",
    "idefics3": "smolvlm",
    "smolvlm": "smolvlm",
}


def images_of(folder: str | Path) -> Images:
    """How images enter the rows of the student in a checkpoint folder.

    Raises:
        MissingAssets: There is no checkpoint at `folder`.
        StageFailed: It is of an architecture that no family here knows.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise MissingAssets(f"no checkpoint at {folder}: there is no config.json")
    config: dict[str, Any] = json.loads(path.read_text())
    return _module(str(config.get("model_type"))).of_folder(Path(folder), config)


def parts_of(model: Any) -> Parts:
    """The parts of a model that is in memory."""
    return _module(model.config.model_type).ModelParts(model)


def _module(model_type: str) -> Any:
    if model_type not in MODULES:
        raise StageFailed(f"a student of type {model_type!r} can't be trained: there are {', '.join(MODULES)}")
    return importlib.import_module(f"curation_env.training.families.{MODULES[model_type]}")
