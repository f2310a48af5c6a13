"""Policy files that agents play. They run in the sandbox: nothing here imports them."""

from __future__ import annotations

from importlib import resources
from pathlib import Path


def policy_source(name: str | Path) -> str:
    """The source of a shipped policy by its name, or of a policy file by its path.

    Raises:
        FileNotFoundError: Neither; the message lists the shipped ones.
    """
    folder = resources.files(__name__)
    shipped = sorted(item.name.removesuffix(".py") for item in folder.iterdir() if _is_policy(item.name))
    if str(name) in shipped:
        return (folder / f"{name}.py").read_text()
    path = Path(name)
    if path.suffix == ".py" and path.is_file():
        return path.read_text()
    raise FileNotFoundError(f"no policy {str(name)!r}: give the path of a .py file, or one of {', '.join(shipped)}")


def _is_policy(file: str) -> bool:
    return file.endswith(".py") and file != "__init__.py"
