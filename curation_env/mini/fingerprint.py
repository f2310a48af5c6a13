"""What a pool or suite was made with, and an error that names the library that differs."""

from __future__ import annotations

import platform
from typing import Any

from curation_env.errors import TaskMismatch


def libraries() -> dict[str, str]:
    """Versions of everything that the bytes of a pool or suite depend on."""
    import numpy
    import PIL
    from PIL import features

    return {
        "python": platform.python_version(),
        "numpy": numpy.__version__,
        "Pillow": PIL.__version__,
        "FreeType": features.version("freetype2") or "none",
        "libjpeg-turbo": features.version_feature("libjpeg_turbo") or "none",
    }


def check_fingerprint(what: str, found: str, pinned: str, pinned_with: dict[str, str], meta: dict[str, Any]) -> None:
    """Raise TaskMismatch, naming the libraries that differ, when a hash is not the pinned one.

    Args:
        what: What was hashed, for the message ("pool mini-w0").
        found: Its hash here.
        pinned: The hash that the task ships.
        pinned_with: `libraries()` of the machine that pinned it.
        meta: The `meta.json` of the pool or suite.
    """
    if found == pinned:
        return
    here = meta.get("libraries", libraries())
    differ = [f"{k} {here.get(k)} (pinned with {v})" for k, v in pinned_with.items() if here.get(k) != v]
    cause = ", ".join(differ) or "no library differs, so the generator was changed without a new version"
    raise TaskMismatch(f"{what} has hash {found[:16]}, pinned is {pinned[:16]}: {cause}")
