"""Settings that take one of a few words, checked where they are given and not where they are used."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from curation_env.errors import InvalidSetting

SANDBOXES = ("auto", "docker", "bubblewrap", "dummy", "none")
DEVICES = ("auto", "cpu", "cuda")


def check_gib(name: str, value: object) -> None:
    """Check that a setting is an amount of memory, or None.

    Raises:
        InvalidSetting: It is not.
    """
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not value > 0):
        raise InvalidSetting(f"{name} must be a number of GiB above 0, or null for all there is, not {value!r}")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Check that a setting is one of `choices`.

    Raises:
        InvalidSetting: It is not; the message names the nearest.
    """
    if value in choices:
        return
    near = difflib.get_close_matches(str(value), choices, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise InvalidSetting(f"{name} must be one of {', '.join(choices)}, not {value!r}{hint}")
