"""Sandboxes: `make_sandbox(kind, config)`. The contract is in base.py, the engines are imported when used."""

from __future__ import annotations

import logging
import os
from typing import Literal

from curation_env.sandbox.base import (
    ExecResult,
    Mount,
    Sandbox,
    SandboxConfig,
    SandboxDied,
    SandboxLimits,
    SandboxProcess,
    SandboxUnavailable,
)

SandboxKind = Literal["auto", "docker", "bubblewrap", "dummy", "none"]
NO_ISOLATION = "CURATION_ENV_NO_ISOLATION"

__all__ = [
    "ExecResult",
    "Mount",
    "Sandbox",
    "SandboxConfig",
    "SandboxDied",
    "SandboxKind",
    "SandboxLimits",
    "SandboxProcess",
    "SandboxUnavailable",
    "available",
    "choose_kind",
    "make_sandbox",
]

_log = logging.getLogger(__name__)


def make_sandbox(kind: SandboxKind, config: SandboxConfig) -> Sandbox:
    """A sandbox, not yet started. `auto` takes Docker (engine running, image built), else bubblewrap.

    Raises:
        SandboxUnavailable: No engine is there (`auto`). The message says how to get one.
        ValueError: An unknown kind.
    """
    if kind == "auto":
        kind = choose_kind()
    if kind == "docker":
        from curation_env.sandbox.docker import DockerSandbox

        return DockerSandbox(config)
    if kind == "bubblewrap":
        from curation_env.sandbox.bubblewrap import BubblewrapSandbox

        return BubblewrapSandbox(config)
    if kind == "dummy":
        from curation_env.sandbox.dummy import DummySandbox

        return DummySandbox(config)
    if kind == "none":
        from curation_env.sandbox.plain import PlainSandbox

        return PlainSandbox(config)
    raise ValueError(f"unknown sandbox {kind!r}: one of auto, docker, bubblewrap, dummy, none")


def available() -> dict[str, str]:
    """The isolating engines in order of preference, each with what keeps it from working here ("" when ready)."""
    from curation_env.sandbox.bubblewrap import bubblewrap_problem
    from curation_env.sandbox.docker import docker_problem

    return {"docker": docker_problem(), "bubblewrap": bubblewrap_problem()}


def choose_kind() -> SandboxKind:
    """What `auto` means on this machine. Raises `SandboxUnavailable`."""
    problems = available()
    if not problems["docker"]:
        return "docker"
    if not problems["bubblewrap"]:
        _log.info("sandbox: bubblewrap (%s)", problems["docker"])
        return "bubblewrap"
    if os.environ.get(NO_ISOLATION) == "1":
        _log.warning("sandbox: NONE, commands of the agent run unconfined (%s=1)", NO_ISOLATION)
        return "none"
    raise SandboxUnavailable(
        f"no sandbox engine.\n- docker: {problems['docker']}\n- bubblewrap: {problems['bubblewrap']}\n"
        f"To run the agent's commands without any isolation, set {NO_ISOLATION}=1."
    )
