"""Actions of any origin are parsed or refused with a reason."""

from __future__ import annotations

import contextlib

import numpy as np
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
        ({"tool": np.int64(0), "text": "ls"}, Parsed(SHELL, "ls")),
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
        {"tool": "1", "text": "x"},
        {"tool": 1.9, "text": "x"},
        {"tool": float("inf"), "text": "x"},
        {"tool": float("nan"), "text": "x"},
        {"tool": 10**5000, "text": "x"},
        {"tool": -(10**5000), "text": "x"},
        {"tool": np.array([0, 1]), "text": "x"},
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


def test_an_error_of_a_wrapper_is_taken_for_the_action_that_it_replaces():
    with pytest.raises(InvalidAction, match="no mixture"):
        parse(InvalidAction("no mixture"))


def test_numbers_of_any_size_are_answered_and_recorded(nano):
    env = nano()
    env.reset(seed=0)
    for tool in (10**5000, float("inf"), 1.9):
        observation, reward, terminated, truncated, info = env.step({"tool": tool, "text": "ls"})
        assert (info["error"], reward, terminated, truncated) == ("invalid_action", 0.0, False, False)
        assert "tool" in observation["message"]


def test_source_and_path_exclude_each_other():
    with pytest.raises(InvalidAction):
        policy("x", path="y")


@given(st.fixed_dictionaries({"tool": st.integers(-1, 4) | st.floats() | st.integers(), "text": st.text()}))
def test_parsing_raises_invalid_action_only(action):
    with contextlib.suppress(InvalidAction):
        assert parse(action).tool == action["tool"]
