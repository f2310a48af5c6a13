"""The harness's Python, shown inside: which folders are mounted, and what in them is masked.

The agent gets the interpreter and the libraries that the harness runs on (numpy, pyarrow, datasets, PIL, ...) read-only
and at the same paths, less this package: the package's folder, its metadata, its command and the finders of an editable
install are covered by empty folders and files.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PACKAGE = "curation_env"
_SHARED_PREFIXES = ("/usr", "/usr/local")


@dataclass(frozen=True)
class Interpreter:
    """`folders` and `files` are mounted read-only at their own paths; `masked` ones among their contents are hidden.
    `prefixes` is where Python lies, whether mounted so or in what is shown anyway."""

    executable: Path
    folders: tuple[Path, ...]
    files: tuple[Path, ...]
    masked: tuple[Path, ...]
    prefixes: tuple[Path, ...]


@cache
def harness_interpreter(*, host_usr: bool) -> Interpreter:
    """The running interpreter. With `host_usr` the host's /usr is inside anyway and needs no further mount."""
    executable = Path(sys.executable)
    prefixes = {Path(p) for p in (sys.base_prefix, sys.base_exec_prefix, sys.prefix, sys.exec_prefix)}
    folders = [p for p in prefixes if str(p) not in _SHARED_PREFIXES]
    files: list[Path] = []
    if sys.base_prefix in _SHARED_PREFIXES and not host_usr:
        # A distribution's Python: not the whole prefix, which the image has too, but the parts that are Python's.
        folders += [Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")]
        folders += [Path(p) for p in sys.path if p.endswith(("site-packages", "dist-packages"))]
        files.append(executable.resolve())
    folders = outermost([p for p in folders if p.is_dir()])
    if host_usr:
        folders = [p for p in folders if not is_below(p, Path("/usr"))]
    shown = folders + ([Path("/usr")] if host_usr else [])
    masked = [p for p in _own_files() if any(is_below(p, folder) for folder in shown)]
    return Interpreter(executable, tuple(folders), tuple(files), tuple(sorted(masked)), tuple(sorted(prefixes)))


def _own_files() -> list[Path]:
    """Everything on this machine that is, or points to, this package."""
    package = Path(__file__).resolve().parents[1]
    found = [package]
    repository = package.parent
    if (repository / "setup.cfg").exists():  # an editable install: every top-level folder of the source tree
        found += [p for p in repository.iterdir() if not is_below(Path(sys.prefix), p)]
    dashed = PACKAGE.replace("_", "-")
    sites = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    sites |= {p for p in sys.path if p.endswith(("site-packages", "dist-packages"))}
    for site in sites:
        if os.path.isdir(site):
            found += [p for p in Path(site).iterdir() if PACKAGE in p.name or dashed in p.name]
            found += [p for p in (Path(site) / "__pycache__").glob(f"*{PACKAGE}*")]
    scripts = Path(sysconfig.get_path("scripts"))
    found += [p for p in (scripts / dashed, scripts / "__pycache__") if p.exists()]
    return found


def is_below(path: Path, folder: Path) -> bool:
    """Whether `path` is `folder` or in it."""
    return path == folder or folder in path.parents


def outermost(folders: list[Path]) -> list[Path]:
    """Those that are in no other, once each."""
    unique = sorted(set(folders))
    return [p for p in unique if not any(p != other and is_below(p, other) for other in unique)]
