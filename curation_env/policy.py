"""Run a data policy: a fresh sandbox over a snapshot of the workspace, then read what it selected.

What is scored is the submission; the policy and the snapshot's digest are its provenance. A policy's docstring may hold
YAML front matter that says where the policy comes from (`FrontMatter`).
"""

from __future__ import annotations

import ast
import dataclasses
import errno
import glob
import inspect
import io
import os
import re
import subprocess
import tempfile
import tokenize
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator

from curation_env.errors import AgentError, CurationError, InvalidSubmission, PolicyFailed, SandboxError
from curation_env.sandbox.base import ExecResult, Sandbox, SandboxConfig, SandboxDied
from curation_env.sandbox.files import snapshot, usage, write_file
from curation_env.submission import Budget, Submission, read_submission

#: Left out of the snapshot: the mounts, what was selected by hand, and the file that the policy takes the place of.
NOT_IN_SNAPSHOT = ("pool", "student", "feedback", ".submission", "policy.py")
MAX_FILES = 50_000
OUTPUT_CHARS = 20_000
TAIL_CHARS = 4_000
FRONT_MATTER_CHARS = 16_384


@dataclasses.dataclass(frozen=True)
class PolicyRun:
    """How a policy's run ended: with a submission, or with an error of the agent's.

    Attributes:
        submission: What it selected, not yet validated; None when `error` says why not.
        error: `PolicyFailed` or `InvalidSubmission`, with the end of the output in its `details`.
        output: What it printed, stdout then stderr, the middle left out beyond `OUTPUT_CHARS`.
        seconds: Wall clock of the policy itself.
        snapshot_digest: Names the content of the workspace that it ran over; "" when there was no snapshot.
    """

    submission: Submission | None
    error: CurationError | None
    output: str
    seconds: float
    snapshot_digest: str


def run_policy(
    source: str,
    *,
    workspace: Path,
    make: Callable[[SandboxConfig], Sandbox],
    config: SandboxConfig,
    seed: int,
    timeout: float,
    snapshot_mb: int,
    budget: Budget | None = None,
) -> PolicyRun:
    """Run `source` as `/workspace/policy.py` and return what it selected or why it did not.

    Args:
        source: The policy, a Python script.
        workspace: Host folder of the agent's workspace, copied and never written; freeze what writes to it first. The
            copy is made beside it and removed.
        make: Makes the sandbox engine.
        config: Of the fresh sandbox; its `workspace` is replaced by the copy.
        seed: What the script finds in `CURATION_SEED`.
        timeout: Seconds until it is killed, its descendants with it.
        snapshot_mb: Largest workspace that is copied.
        budget: What the task allows in a submission: it bounds what is read of one.

    Raises:
        SandboxError: The engine failed: nobody's fault but the machine's.
    """
    for left in workspace.parent.glob(f".{glob.escape(workspace.name)}.policy-*"):
        remove_tree(left)  # of a process that was killed here
    scratch = Path(tempfile.mkdtemp(prefix=f".{workspace.name}.policy-", dir=workspace.parent))

    def attempt(copy: Path) -> PolicyRun | None:
        try:
            digest = _take_snapshot(workspace, copy, snapshot_mb)
        except PolicyFailed as error:
            return PolicyRun(None, error, "", 0.0, "")
        write_file(copy, ["policy.py"], source.encode(errors="surrogatepass"))
        result = _execute(make(dataclasses.replace(config, workspace=copy)), seed, timeout)
        if result is None:
            return None
        output = _output(result)
        try:
            submission = _read(result, copy, config, timeout, budget)
        except AgentError as error:
            error.details = output[-TAIL_CHARS:]
            return PolicyRun(None, error, output, result.seconds, digest)
        return PolicyRun(submission, None, output, result.seconds, digest)

    try:
        # A sandbox that dies may be the engine's fault or the policy's: a second death, on a fresh one, tells.
        died = PolicyFailed("the policy's sandbox died under it, twice: does it kill processes that it did not start?")
        return attempt(scratch / "1") or attempt(scratch / "2") or PolicyRun(None, died, "", 0.0, "")
    finally:
        remove_tree(scratch)


def _take_snapshot(workspace: Path, copy: Path, snapshot_mb: int) -> str:
    limit = snapshot_mb * 1_000_000
    try:
        return snapshot(workspace, copy, max_bytes=limit, max_files=MAX_FILES, skip=NOT_IN_SNAPSHOT)
    except OSError as error:
        if error.errno not in (errno.EFBIG, errno.ENAMETOOLONG):
            raise SandboxError(f"the workspace could not be copied: {error}") from error
        raise PolicyFailed(
            f"a policy runs on a copy of the workspace, and {error.strerror}: delete what you don't need."
            f" Largest: {_largest(workspace)}"
        ) from error


def _largest(workspace: Path) -> str:
    sizes = []
    with os.scandir(workspace) as entries:
        for entry in entries:
            if entry.name in NOT_IN_SNAPSHOT:
                continue
            if entry.is_dir(follow_symlinks=False):
                size, count, _ = usage(Path(entry.path), stop_at=MAX_FILES)
            else:
                size, count = entry.stat(follow_symlinks=False).st_size, 1
            sizes.append((size, count, entry.name))
    sizes.sort(reverse=True)
    return ", ".join(f"{name[:80]!r} ({size / 1e6:,.1f} MB, {count:,} files)" for size, count, name in sizes[:5])


def _execute(sandbox: Sandbox, seed: int, timeout: float) -> ExecResult | None:
    """Run the policy and kill all that it started; None when the sandbox died while it ran."""
    # One hash seed too: a policy that walks over a set selects the same rows when it is run again.
    env = {"CURATION_SEED": str(seed), "PYTHONHASHSEED": str(seed % 2**32)}
    with sandbox:
        try:
            result = sandbox.exec(["python", "policy.py"], timeout=timeout, env=env)
            sandbox.kill_all()
        except SandboxDied:
            return None
    return result


def _read(result: ExecResult, copy: Path, config: SandboxConfig, timeout: float, budget: Budget | None) -> Submission:
    """What a policy that ended well selected; raises PolicyFailed or InvalidSubmission otherwise."""
    if result.timed_out:
        raise PolicyFailed(f"the policy ran longer than its {timeout:g} s and was stopped")
    if result.exit_code != 0:
        if result.limit:
            allowed = {
                "memory": f"{config.limits.memory_mb} MB of memory",
                "disk": f"{config.limits.disk_mb} MB of disk",
                "files": f"{config.limits.files:,} files",
                "processes": f"{config.limits.pids} processes",
            }
            raise PolicyFailed(f"the policy used more than {allowed.get(result.limit, result.limit)} and was stopped")
        last = _text(result.stderr).strip().rpartition("\n")[2].strip()[:500]
        raise PolicyFailed(f"the policy ended with exit code {result.exit_code}" + (f": {last}" if last else ""))
    try:
        submission = read_submission(copy, budget)
    except OSError as error:  # permissions that the policy took away, names that are too long
        raise InvalidSubmission(f"the submission can't be read: {error.strerror}") from error
    if submission is None:
        raise PolicyFailed("the policy ended well but selected nothing: call curation.select(ids) in it")
    return submission


def _output(result: ExecResult) -> str:
    parts = [_text(data).rstrip() for data in (result.stdout, result.stderr)]
    output = "\n".join(part for part in parts if part)
    if len(output) <= OUTPUT_CHARS:
        return output
    half = OUTPUT_CHARS // 2
    return f"{output[:half]}\n... {len(output) - 2 * half:,} characters left out ...\n{output[-half:]}"


def _text(data: bytes) -> str:
    """Output as text without the control characters that could drive a terminal."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", data.decode(errors="replace").replace("\r\n", "\n"))


def remove_tree(folder: Path) -> None:
    """Remove a folder that an agent wrote: any depth, also where it took permissions away; never follows links."""
    command = ["rm", "-rf", "--", str(folder)]
    if subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode != 0:
        subprocess.run(["chmod", "-R", "u+rwX", "--", str(folder)], stderr=subprocess.DEVNULL, check=False)
        subprocess.run(command, stderr=subprocess.DEVNULL, check=False)


_Short = Annotated[str, StringConstraints(max_length=200, strip_whitespace=True)]
_Long = Annotated[str, StringConstraints(max_length=4_000, strip_whitespace=True)]


class FrontMatter(BaseModel):
    """Where a policy comes from, as its docstring says. All of it is optional.

    Attributes:
        parent: The iteration whose policy it edits; None for a fresh start.
        family: The family of data policies that it belongs to, in the agent's words.
        cites: Names of method cards that it uses.
        evidence: The observation that it rests on.
        failure_mode: The failure that it addresses.
        adaptation: What it changes about the method that it cites, and why.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    parent: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    family: _Short = ""
    cites: Annotated[list[_Short], Field(max_length=20)] = []
    evidence: _Long = ""
    failure_mode: _Long = ""
    adaptation: _Long = ""

    @field_validator("parent", mode="before")
    @classmethod
    def _no_parent(cls, value: Any) -> Any:
        return None if value in ("", "none", "null", "~") else value

    @field_validator("cites", mode="before")
    @classmethod
    def _one_citation(cls, value: Any) -> Any:
        return ([value] if value.strip() else []) if isinstance(value, str) else value


_KEY_LINE = re.compile(rf"(?m)^(?:{'|'.join(FrontMatter.model_fields)})[ \t]*:")


class _Loader(yaml.BaseLoader):
    """Scalars are text, and nothing is an alias: what is loaded is never larger than what was written."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.YAMLError("aliases are not allowed")
        return super().compose_node(parent, index)


def parse_front_matter(source: str) -> FrontMatter:
    """Read the front matter of a policy without running or compiling it.

    It is the YAML between two `---` lines at the start of the docstring; without them, the paragraph that begins with a
    line such as `parent: 3`. A docstring without either is prose and gives an empty `FrontMatter`.

    Raises:
        InvalidSubmission: There is front matter, but it is malformed: not YAML, unknown keys, wrong types or sizes.
    """
    block = _front_matter_block(_docstring(source))
    if not block.strip():
        return FrontMatter()
    if len(block) > FRONT_MATTER_CHARS:
        raise InvalidSubmission(f"front matter has at most {FRONT_MATTER_CHARS:,} characters")
    try:
        fields = yaml.load(block, _Loader)  # a BaseLoader: text, lists and dicts only
    except (yaml.YAMLError, RecursionError) as error:
        problem = getattr(error, "problem", None) or error
        raise InvalidSubmission(f"the front matter is not YAML: {str(problem)[:200]}") from error
    if not isinstance(fields, dict):
        raise InvalidSubmission("the front matter must be `key: value` lines")
    try:
        return FrontMatter.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])[:80]
        raise InvalidSubmission(
            f"front matter, {where}: {first['msg']} (its keys are {', '.join(FrontMatter.model_fields)})"
        ) from error


def _docstring(source: str) -> str:
    """The first string of a script if nothing comes before it; "" otherwise. Reads tokens only."""
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.ENCODING)
    try:
        for token in tokenize.generate_tokens(io.StringIO(source[: 4 * FRONT_MATTER_CHARS]).readline):
            if token.type == tokenize.STRING:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # escapes that a regular expression in a docstring may hold
                    value = ast.literal_eval(token.string)
                return inspect.cleandoc(value) if isinstance(value, str) else ""
            if token.type not in skipped:
                return ""
    except (tokenize.TokenError, SyntaxError, ValueError):
        pass  # whoever runs the script will say what is wrong with it
    return ""


def _front_matter_block(docstring: str) -> str:
    lines = docstring.splitlines()
    if lines and lines[0].strip() == "---":
        inner = [line.strip() for line in lines[1:]]
        if "---" not in inner:
            raise InvalidSubmission("the front matter is not closed by a second --- line")
        return "\n".join(lines[1 : 1 + inner.index("---")])
    text = "\n".join(lines)
    start = _KEY_LINE.search(text)
    return re.split(r"\n[ \t]*\n", text[start.start() :], maxsplit=1)[0] if start else ""
