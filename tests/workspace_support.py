"""A workspace, a host that answers, and clients in processes of their own: the real parts around a session."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import curation_env.workspace
from curation_env.errors import InvalidAction, InvalidSubmission, LimitExceeded, StageFailed
from curation_env.pool import write_rows

PACKAGE = Path(curation_env.workspace.__file__).parent


def png(color: tuple[int, int, int], size: tuple[int, int] = (32, 32)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, color).save(stream, "PNG")
    return stream.getvalue()


def make_rows(count: int) -> list[dict[str, Any]]:
    return [
        {
            "id": f"{index:032x}",
            "source": f"source-{index % 3}",
            "image": None if index % 4 == 0 else {"bytes": png((index, 2 * index, 0)), "path": f"img/{index}.png"},
            "conversation": [{"user": f"What is {index}?", "assistant": f"It is {index}."}],
            "n_tokens": 5 + index,
        }
        for index in range(count)
    ]


def make_workspace(folder: Path, rows: int = 12) -> Path:
    """A workspace with a pool, as the host would mount it."""
    folder.mkdir()
    write_rows(folder / "pool", make_rows(rows))
    return folder


class Host:
    """A small environment's side of the session."""

    def __init__(self, rows: int = 12) -> None:
        self.ids = [row["id"] for row in make_rows(rows)]
        self.opened: list[str] = []
        self.signals_charged = 0

    def task(self) -> dict[str, Any]:
        return {"name": "loopback", "rows": 4, "seed": 7, "signals": ["loss"], "sources": {"source-0": 4}}

    def history(self) -> list[dict[str, Any]]:
        base = {"iteration": 0, "status": "scored", "score": 40.0, "scores": {"A": 35.0, "B": 45.0}}
        return [base, {"iteration": 1, "status": "rejected", "score": None, "scores": None}]

    def signal(self, name: str) -> np.ndarray:
        if name == "broken":
            raise RuntimeError("/secret/path of the host")
        if name == "down":
            raise StageFailed("the worker in /secret/path died", details="Traceback of the host")
        if name == "full":
            raise OSError(28, "No space left on device", "/secret/path")
        if name != "loss":
            raise InvalidAction(f"no signal {name!r}; there is loss")
        self.signals_charged += 1
        values = np.arange(len(self.ids), dtype=np.float32)
        values[0] = np.nan
        return values

    def check(self, ids: Any, rewrites: Any) -> dict[str, Any]:
        unknown = set(ids) - set(self.ids)
        if unknown:
            raise InvalidSubmission(f"{len(unknown)} unknown ids")
        passed = len(ids) <= 4
        return {"passed": passed, "rows": len(ids), "rewrites": len(rewrites), "message": f"{len(ids)} of 4 rows"}

    def card(self, name: str) -> str:
        if name != "el2n":
            raise LimitExceeded("this task has no such card")
        self.opened.append(name)
        return "# EL2N\nKeep the hard rows."


def client_environment(home: Path, workspace: Path | None, socket: Path | None) -> dict[str, str]:
    """Environment in which `curation` is the module and the command, as inside a sandbox."""
    library, launcher = home / "library", home / "bin" / "curation"
    if not library.exists():
        library.mkdir()
        (library / "curation").symlink_to(PACKAGE)
        launcher.parent.mkdir()
        launcher.write_text('#!/bin/sh\nexec python3 -m curation "$@"\n')
        launcher.chmod(0o755)
    path = f"{launcher.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {"PATH": path, "PYTHONPATH": str(library), "HOME": str(home), "OMP_NUM_THREADS": "1"}
    if workspace is not None:
        environment["CURATION_WORKSPACE"] = str(workspace)
    environment["CURATION_SOCKET"] = str(socket) if socket is not None else str(home / "no-socket")
    return environment


class Client:
    """Runs `curation ...` and Python code as the sandbox does."""

    def __init__(self, home: Path, workspace: Path | None, socket: Path | None) -> None:
        self.environment = client_environment(home, workspace, socket)
        self.workspace = workspace or home

    def run(self, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["curation", *arguments],
            env=self.environment,
            cwd=self.workspace,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def json(self, *arguments: str) -> Any:
        done = self.run(*arguments, "--json")
        assert not done.stderr, done.stderr
        return json.loads(done.stdout)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["curation", *arguments], env=self.environment, cwd=self.workspace, stdout=subprocess.PIPE, text=True
        )

    def python(self, code: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["python3", "-c", code],
            env=self.environment,
            cwd=self.workspace,
            capture_output=True,
            text=True,
            timeout=60,
        )
