"""Policy files that agents play. They run in the sandbox: nothing here imports them."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from curation_env.errors import CurationError


class PolicyFileError(CurationError):
    """There is no such policy file, or it can't be read as text."""

    code = "policy_file"


def policy_source(name: str | Path) -> str:
    """The source of a shipped policy by its name, or of a policy file by its path.

    Raises:
        PolicyFileError: Neither, with the shipped ones listed; or it is not UTF-8.
    """
    folder = resources.files(__name__)
    shipped = sorted(item.name.removesuffix(".py") for item in folder.iterdir() if _is_policy(item.name))
    if str(name) in shipped:
        return (folder / f"{name}.py").read_text()
    path = Path(name)
    if path.suffix == ".py" and path.is_file():
        return read_text(path)
    raise PolicyFileError(f"no policy {str(name)!r}: give the path of a .py file, or one of {', '.join(shipped)}")


def read_text(path: Path) -> str:
    """A policy file's text.

    Raises:
        PolicyFileError: It is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise PolicyFileError(f"the policy {path} is not UTF-8 (byte {error.start})") from error


def _is_policy(file: str) -> bool:
    return file.endswith(".py") and file != "__init__.py"
