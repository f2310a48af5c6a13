"""The scripts behind the Makefile."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / ".ci" / "venv.sh"

# Stands for Debian's: without python3-venv it leaves a python behind and no pip.
PYTHON = """#!/bin/sh
case "$*" in
  "-m venv --clear "*) mkdir -p "$4/bin"; : >"$4/bin/python"; [ -e "$STATE/installed" ] || exit 1
                       : >"$4/bin/pip"; chmod +x "$4/bin/pip" ;;
  *) echo python3.11 ;;
esac
"""
PACKAGES = """#!/bin/sh
echo "$*" >>"$STATE/asked"
[ -e "$STATE/root" ] || exit 1
: >"$STATE/installed"
"""


@pytest.fixture
def make_venv(tmp_path):
    for name, text in (("python", PYTHON), ("packages.sh", PACKAGES)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    shutil.copy(SCRIPT, tmp_path / "venv.sh")

    def call():
        env = {**os.environ, "PYTHON": str(tmp_path / "python"), "STATE": str(tmp_path)}
        return subprocess.run(["sh", tmp_path / "venv.sh", tmp_path / "venv"], env=env, capture_output=True).returncode

    return call


def test_a_venv_that_failed_for_want_of_a_package_is_made_again(make_venv, tmp_path):
    assert make_venv() != 0  # no root: the package is named, and nothing is installed
    assert not (tmp_path / "venv" / "bin" / "pip").exists()
    (tmp_path / "root").touch()
    assert make_venv() == 0
    assert (tmp_path / "venv" / "bin" / "pip").exists()
    assert (tmp_path / "asked").read_text().split() == ["python3-venv"] * 2
