"""The three actions: run a shell command, submit a data policy, stop."""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass
from typing import Any, TypedDict

from curation_env.errors import InvalidAction

SHELL, POLICY, STOP = 0, 1, 2
TOOLS = ("shell", "policy", "stop")
MAX_ACTION_BYTES = 1_000_000
_PATH_MARK = "@path "


class Action(TypedDict):
    """What `env.step` takes: the tool's number and its text."""

    tool: int
    text: str


def shell(text: str) -> Action:
    """Run `text` with bash in the sandbox, in `/workspace`; charges no iteration."""
    return {"tool": SHELL, "text": text}


def policy(source: str | None = None, *, path: str | None = None) -> Action:
    """Submit a data policy; charges one iteration.

    Args:
        source: The policy, a Python script.
        path: Instead of `source`, a script in the sandbox, relative to `/workspace`.

    With neither, the oldest ticket that waits is taken (see `curation submit` in `docs/workspace.md`).
    """
    if source is not None and path is not None:
        raise InvalidAction("give policy() a source or a path, not both")
    if path is not None:
        return {"tool": POLICY, "text": _PATH_MARK + path}
    return {"tool": POLICY, "text": source or ""}


def stop(nominate: int | None = None) -> Action:
    """End the episode; `nominate` names the iteration that the agent stands by (default: best on feedback)."""
    return {"tool": STOP, "text": "" if nominate is None else f"nominate={nominate}"}


@dataclass(frozen=True)
class Parsed:
    """An action, checked: `text` holds the command or the policy's source, or one of the other two is set."""

    tool: int
    text: str = ""
    path: str | None = None
    nominate: int | None = None


def parse(action: Any) -> Parsed:
    """Check an action of any origin.

    Args:
        action: A dict of `tool`, an integer from 0 to 2, and `text`. An `InvalidAction`, which a wrapper passes on in
            place of an action that it could not translate, is raised.

    Raises:
        InvalidAction: It is not a dict of `tool` (0 to 2) and `text` (UTF-8, at most 1 MB), or its text says nothing.
    """
    if isinstance(action, InvalidAction):
        raise action
    try:
        tool, text = operator.index(action["tool"]), action["text"]
    except (TypeError, KeyError, ValueError, IndexError) as error:
        raise InvalidAction(
            'an action is {"tool": 0 shell | 1 policy | 2 stop, "text": str}: use curation_env.actions'
        ) from error
    if tool not in (SHELL, POLICY, STOP):
        given = tool if abs(tool) < 10**9 else "a number of that size"
        raise InvalidAction(f"tool must be 0 (shell), 1 (policy) or 2 (stop), not {given}")
    if not isinstance(text, str):
        raise InvalidAction(f"text must be a str, not {type(text).__name__}")
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise InvalidAction("text holds a lone surrogate, which is not UTF-8") from error
    if size > MAX_ACTION_BYTES:
        raise InvalidAction(f"text has {size:,} bytes, at most {MAX_ACTION_BYTES:,} are taken")
    if tool == POLICY and text.startswith(_PATH_MARK):
        path = text.removeprefix(_PATH_MARK).strip()
        if not path or "\x00" in path or "\n" in path:
            raise InvalidAction("name the policy's path in the sandbox, as in policy(path='policy.py')")
        return Parsed(tool, path=path)
    if tool == STOP:
        match = re.fullmatch(r"\s*(?:nominate\s*=\s*(\d{1,6}))?\s*", text)
        if match is None:
            raise InvalidAction("STOP takes no text, or nominate=K with the number of an iteration")
        return Parsed(tool, nominate=int(match[1]) if match[1] else None)
    if tool == SHELL and not text.strip():
        raise InvalidAction("SHELL needs a command")
    if "\x00" in text:
        raise InvalidAction("text holds a NUL character")
    return Parsed(tool, text)
