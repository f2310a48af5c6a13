"""Actions of any origin are parsed or refused with a reason."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from curation_env.actions import MAX_ACTION_BYTES, POLICY, SHELL, STOP, Parsed, parse, policy, shell, stop
from curation_env.errors import InvalidAction


@pytest.mark.parametrize(
    ("action", "parsed"),
    [
        (shell("ls pool"), Parsed(SHELL, "ls pool")),
        (policy("print(1)"), Parsed(POLICY, "print(1)")),
        (policy(path="a b.py"), Parsed(POLICY, path="a b.py")),
        (policy(), Parsed(POLICY, "")),
        (stop(), Parsed(STOP)),
        (stop(3), Parsed(STOP, nominate=3)),
        ({"tool": 2, "text": "  nominate = 12 "}, Parsed(STOP, nominate=12)),
    ],
)
def test_helpers_and_parser_agree(action, parsed):
    assert parse(action) == parsed


@pytest.mark.parametrize(
    "action",
    [
        None,
        7,
        "ls",
        [],
        {},
        {"tool": 0},
        {"tool": 3, "text": "x"},
        {"tool": -1, "text": "x"},
        {"tool": "shell", "text": "x"},
        {"tool": 0, "text": b"ls"},
        {"tool": 0, "text": None},
        {"tool": 0, "text": "   "},
        {"tool": 0, "text": "a\x00b"},
        {"tool": 0, "text": "\ud800"},
        {"tool": 1, "text": "@path "},
        {"tool": 2, "text": "because I am done"},
        {"tool": 0, "text": "x" * (MAX_ACTION_BYTES + 1)},
    ],
)
def test_everything_else_is_refused_with_a_reason(action):
    with pytest.raises(InvalidAction) as caught:
        parse(action)
    assert str(caught.value)


def test_source_and_path_exclude_each_other():
    with pytest.raises(InvalidAction):
        policy("x", path="y")


@given(st.fixed_dictionaries({"tool": st.integers(-1, 4), "text": st.text()}))
def test_parsing_raises_invalid_action_only(action):
    with contextlib.suppress(InvalidAction):
        assert parse(action).tool == action["tool"]
