"""VLMEvalKit's prompts for a judge, read at run time from the user's checkout: none of their text is in this package.

Their functions are few and pure, so they are run as they are: taken out of the files by name, after each file was found
to be the one of the commit that the suite names.
"""

from __future__ import annotations

import ast
import copy
import functools
import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curation_env.errors import MissingAssets, TaskMismatch

if TYPE_CHECKING:
    from curation_env.evaluation.suite import Item

SETTING = "CURATION_VLMEVALKIT"
_UTILS = "vlmeval/dataset/utils"
#: By rule: the file, what to take out of it, and which of that makes the message of a row.
_TAKEN = {
    "llavabench": (f"{_UTILS}/llavabench.py", ("rule_dict", "build_prompt"), "build_prompt"),
    "mathvista": (
        f"{_UTILS}/mathvista.py",
        ("get_gpt4_ICE", "build_mathvista_gpt4_prompt"),
        "build_mathvista_gpt4_prompt",
    ),
    "mmvet": (f"{_UTILS}/mmvet.py", ("build_mmvet_gpt4_prompt",), "build_mmvet_gpt4_prompt"),
}
_DATASETS = "vlmeval/dataset/image_vqa.py"


def checkout() -> str:
    """The user's checkout of VLMEvalKit ($CURATION_VLMEVALKIT), "" where none is named."""
    return os.environ.get(SETTING, "")


def resolved(suite: Mapping[str, Any]) -> dict[str, Any]:
    """A suite file with the source of its judge's prompts.

    Raises:
        MissingAssets: The checkout lacks a file.
        TaskMismatch: A file of the checkout is not that of the suite's commit.
    """
    found: dict[str, Any] = copy.deepcopy(dict(suite))
    prompts = (found.get("judge") or {}).get("prompts")
    if prompts is None:
        return found
    prompts["source"] = "vlmevalkit" if checkout() else "own"
    if checkout():
        _read_files(checkout(), prompts["commit"], tuple(prompts["files"].items()))
    return found


def title(suite: Mapping[str, Any]) -> str:
    """The displayed version of a resolved suite file: its name, and in whose words its judge is asked."""
    prompts = (suite.get("judge") or {}).get("prompts")
    if prompts is None:
        return str(suite["name"])
    words = f"VLMEvalKit {prompts['commit'][:7]}" if prompts["source"] == "vlmevalkit" else "own words"
    return f"{suite['name']} (judge asked in {words})"


class Wording:
    """The judge's messages in VLMEvalKit's words.

    Args:
        folder: A checkout.
        commit: The commit that its files must be of; for messages.
        files: Their git blob ids, by path.

    Attributes:
        llavabench_system: The system message beside LLaVABench's.

    Raises:
        MissingAssets: The checkout lacks a file, or a file lacks what is looked for.
        TaskMismatch: A file is another one.
    """

    def __init__(self, folder: str | Path, commit: str, files: Mapping[str, str]) -> None:
        sources = _read_files(str(folder), commit, tuple(files.items()))
        self._makers = {
            rule: _definitions(sources[path], path, names)[maker] for rule, (path, names, maker) in _TAKEN.items()
        }
        self.llavabench_system = _system_message(sources[_DATASETS])

    def message(self, rule: str, item: Item, prediction: str) -> str:
        """The user message of a rule ("llavabench", "mathvista" or "mmvet") about a prediction."""
        own = {"question": item.question, "answer": item.answer, "category": item.category, "prediction": prediction}
        maker: Callable[[dict[str, str]], str] = self._makers[rule]
        return maker({**item.fields, **own})


@functools.lru_cache(1)
def _read_files(folder: str, commit: str, files: tuple[tuple[str, str], ...]) -> dict[str, str]:
    sources = {}
    for name, blob in files:
        path = Path(folder).expanduser() / name
        try:
            data = path.read_bytes()
        except OSError as error:
            raise MissingAssets(
                f"{SETTING} names {folder}, which is no checkout of VLMEvalKit: {name}: {error.strerror}"
            ) from error
        if hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() != blob:
            raise TaskMismatch(
                f"{path} is not the file of VLMEvalKit's commit {commit}: check that commit out, or unset {SETTING} "
                "to ask the judge in our own words"
            )
        sources[name] = data.decode()
    return sources


def _definitions(source: str, path: str, names: tuple[str, ...]) -> dict[str, Any]:
    """Run the named functions and assignments of a file, and nothing else of it."""
    taken: list[ast.stmt] = []
    for node in ast.parse(source).body:
        found = [node.name] if isinstance(node, ast.FunctionDef) else []
        if isinstance(node, ast.Assign):
            found = [target.id for target in node.targets if isinstance(target, ast.Name)]
        if set(found) & set(names):
            taken.append(node)
    space: dict[str, Any] = {}
    exec(compile(ast.Module(taken, []), path, "exec"), space)
    if lacking := set(names) - set(space):
        raise MissingAssets(f"{path} of the VLMEvalKit checkout has no {', '.join(sorted(lacking))}")
    return space


def _system_message(source: str) -> str:
    for owner in ast.parse(source).body:
        if isinstance(owner, ast.ClassDef) and owner.name == "LLaVABench":
            for node in ast.walk(owner):
                match node:
                    case ast.Assign(targets=[ast.Name(id="system_prompt")], value=ast.Constant(value=str(text))):
                        return text
    raise MissingAssets(f"{_DATASETS} of the VLMEvalKit checkout has no system message for LLaVABench")
