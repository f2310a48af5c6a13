"""A submission: ids of pool rows (with repeats) and rewrites. What is scored is this, never the policy's words."""

from __future__ import annotations

import hashlib
import io
import json
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from curation_env.errors import InvalidSubmission
from curation_env.pool import Conversation, Pool, canonical_json

IDS_FILE = ".submission/ids.txt"
REWRITES_FILE = ".submission/rewrites.jsonl"
MAX_IDS_BYTES = 64 * 2**20  # a million ids of 34 bytes, and room
MAX_IDS = 2_000_000
# What hostile JSON becomes in memory is tens of times its text: bounds that follow from how many rows may be rewritten.
MAX_REWRITES_BYTES = 256 * 2**20
MAX_REWRITE_BYTES = 2**18  # of one line; no recipe keeps as much of a conversation
MEAN_REWRITE_BYTES = 2**14  # of the lines together, for each row that may be rewritten
NO_REWRITES = "this task does not allow rewrites: call curation.select(ids) alone"
MAX_ID_CHARS = 64
MAX_TURNS = 64
MAX_TURN_CHARS = 32_768
#: Marks that would become something else than text once the chat template is applied.
FORBIDDEN_MARKS = ("<image>", "<s>", "</s>", "<pad>", "<unk>", "<|", "|>", "USER:", "ASSISTANT:")


@dataclass(frozen=True)
class Submission:
    """Sorted ids (an id twice means the row is trained on twice) and, for some of them, another conversation."""

    ids: tuple[str, ...]
    rewrites: Mapping[str, Conversation] = field(default_factory=dict)

    @classmethod
    def of(cls, ids: Iterable[str], rewrites: Mapping[str, Conversation] | None = None) -> Submission:
        return cls(tuple(sorted(ids)), dict(sorted((rewrites or {}).items())))

    @cached_property
    def digest(self) -> str:
        """blake2b-128 in hex; two submissions with one digest train on the same rows."""
        text = canonical_json([list(self.ids), self.rewrites])
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    @cached_property
    def counts(self) -> Counter[str]:
        return Counter(self.ids)

    def to_files(self) -> dict[str, bytes]:
        """The two files of a recorded submission, in their canonical form."""
        lines = [canonical_json({"id": k, "conversation": v}) for k, v in self.rewrites.items()]
        files = {"ids.txt": "".join(f"{id_}\n" for id_ in self.ids).encode()}
        if lines:
            files["rewrites.jsonl"] = ("\n".join(lines) + "\n").encode()
        return files


def read_bounded(path: Path, limit: int) -> bytes:
    """Read a regular file that an agent wrote, following no link at its last component.

    Raises:
        InvalidSubmission: It is a link, a folder, a FIFO or a device, or larger than `limit` bytes.
        FileNotFoundError: There is no such file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise InvalidSubmission(
            f"{path.name} must be a regular file, not a link, folder or device: write it with curation.select"
        ) from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise InvalidSubmission(
                f"{path.name} must be a regular file, not a folder, FIFO or device: write it with curation.select"
            )
        if status.st_size > limit:
            raise InvalidSubmission(f"{path.name} has {status.st_size:,} bytes, at most {limit:,} are read")
        with os.fdopen(descriptor, "rb", closefd=False) as stream:
            data = stream.read(limit + 1)
    finally:
        os.close(descriptor)
    if len(data) > limit:
        raise InvalidSubmission(f"{path.name} grew past {limit:,} bytes while it was read")
    return data


def read_submission(workspace: Path, budget: Budget | None = None) -> Submission | None:
    """Read what a policy selected from its (stopped) workspace.

    Args:
        workspace: Host folder that was the policy's `/workspace`; nothing in it is trusted.
        budget: What the task allows: rewrites that it does not are refused unread, and no more of them are read than
            rows may be selected. Without it, no more than ids were.

    Returns:
        The submission; None when the policy selected nothing (it wrote no file).

    Raises:
        InvalidSubmission: A file is not a regular file, is too large, is malformed, or holds rewrites that the task
            does not allow.
    """
    folder = workspace / Path(IDS_FILE).parent
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise InvalidSubmission(".submission must be a folder: write it with curation.select")
    try:
        data = read_bounded(workspace / IDS_FILE, MAX_IDS_BYTES)
    except FileNotFoundError:
        return None
    if data.count(b"\n") > MAX_IDS:
        raise InvalidSubmission(f"ids.txt has over {MAX_IDS:,} lines")
    try:
        lines = data.decode().split("\n")
    except UnicodeDecodeError as error:
        raise InvalidSubmission(f"ids.txt is not UTF-8 (byte {error.start})") from error
    ids = [line.strip() for line in lines if line.strip()]
    for number, id_ in enumerate(ids, start=1):
        if len(id_) > MAX_ID_CHARS:
            raise InvalidSubmission(f"ids.txt, entry {number}: longer than {MAX_ID_CHARS} characters")
    return Submission.of(ids, _read_rewrites(workspace / REWRITES_FILE, len(set(ids)), budget))


def _read_rewrites(path: Path, selected: int, budget: Budget | None) -> dict[str, Conversation]:
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return {}
    if stat.S_ISREG(status.st_mode) and status.st_size == 0:
        return {}
    if budget is not None and not budget.rewrite:
        raise InvalidSubmission(NO_REWRITES)
    rows = selected if budget is None else min(selected, budget.rows)
    limit = min(MAX_REWRITES_BYTES, max(MAX_REWRITE_BYTES, rows * MEAN_REWRITE_BYTES))
    try:
        return _parse_rewrites(read_bounded(path, limit), rows)
    except FileNotFoundError:
        return {}


def _parse_rewrites(data: bytes, rows: int) -> dict[str, Conversation]:
    rewrites: dict[str, Conversation] = {}
    lines = data.count(b"\n") + (not data.endswith(b"\n"))
    if lines > rows:
        raise InvalidSubmission(
            f"rewrites.jsonl has {lines:,} lines for {rows:,} rows: one a rewritten row, no blank ones"
        )
    for number, line in enumerate(io.BytesIO(data), start=1):
        if not line.strip():
            continue
        where = f"rewrites.jsonl, line {number}"
        if len(line) > MAX_REWRITE_BYTES:
            raise InvalidSubmission(f"{where}: longer than {MAX_REWRITE_BYTES:,} bytes")
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InvalidSubmission(f"{where}: not a JSON object in UTF-8") from error
        if not isinstance(record, dict) or set(record) != {"id", "conversation"}:
            raise InvalidSubmission(f'{where}: expected {{"id": ..., "conversation": [...]}}')
        id_, turns = record["id"], record["conversation"]
        if not isinstance(id_, str) or not 0 < len(id_) <= MAX_ID_CHARS:
            raise InvalidSubmission(f"{where}: id must be a text of 1 to {MAX_ID_CHARS} characters")
        if id_ in rewrites:
            raise InvalidSubmission(f"{where}: {id_} is rewritten twice")
        rewrites[id_] = check_conversation(turns, where)
    return rewrites


def check_conversation(turns: Any, where: str) -> Conversation:
    """Return `turns` when it is a well-formed conversation that stays text under any chat template.

    Raises:
        InvalidSubmission: Wrong shape, roles or sizes, an image slot, or a special token.
    """
    if not isinstance(turns, list) or not 1 <= len(turns) <= MAX_TURNS:
        raise InvalidSubmission(f"{where}: a conversation is a list of 1 to {MAX_TURNS} turns")
    for turn in turns:
        if not isinstance(turn, dict) or set(turn) != {"user", "assistant"}:
            raise InvalidSubmission(f'{where}: a turn is {{"user": text, "assistant": text}}')
        for role, text in turn.items():
            if not isinstance(text, str) or len(text) > MAX_TURN_CHARS:
                raise InvalidSubmission(f"{where}: {role} must be a text of at most {MAX_TURN_CHARS:,} characters")
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise InvalidSubmission(f"{where}: {role} holds a lone surrogate, which is not text") from error
            mark = next((mark for mark in FORBIDDEN_MARKS if mark in text), None)
            if mark is not None or "\x00" in text:
                raise InvalidSubmission(
                    f"{where}: {role} holds {mark or 'a NUL'!r}, which is not plain text for the chat template; the "
                    "row's image stays in its place by itself"
                )
        if not turn["user"].strip() or not turn["assistant"].strip():
            raise InvalidSubmission(f"{where}: user and assistant must not be empty")
    return turns


@dataclass(frozen=True)
class Budget:
    """What a task allows in one submission."""

    rows: int
    tokens: int | None = None
    repeats: bool = False
    rewrite: bool = False


@dataclass(frozen=True)
class Validated:
    """A submission that may go to the audit: its size as the budget counts it."""

    submission: Submission
    rows: int
    supervised_tokens: int


def validate(
    submission: Submission, view: Pool, budget: Budget, count: Callable[[Conversation, bytes | None], int] | None = None
) -> Validated:
    """Check a submission against the agent's view of the pool and the task's budget.

    Args:
        submission: What the policy selected.
        view: The pool without blocked rows; `n_tokens` are supervised tokens a row.
        budget: Rows, tokens, and whether repeats and rewrites are allowed.
        count: Supervised tokens of a rewritten conversation beside the bytes of its image, as the trainer counts them;
            needed where the task allows rewrites.

    Raises:
        InvalidSubmission: The first thing that is wrong, with up to three examples and what to do.
    """
    if not submission.ids:
        raise InvalidSubmission("the submission is empty: select at least one row with curation.select(ids)")
    if len(submission.ids) > budget.rows:
        raise InvalidSubmission(
            f"{len(submission.ids):,} rows submitted, the task allows {budget.rows:,}: select fewer"
        )
    position = view.position
    unknown = [id_ for id_ in submission.counts if id_ not in position]
    if unknown:
        raise InvalidSubmission(
            f"{len(unknown):,} ids are not in the pool, such as {_examples(unknown)}: take ids from curation.pool()"
        )
    repeated = [id_ for id_, count in submission.counts.items() if count > 1]
    if repeated and not budget.repeats:
        raise InvalidSubmission(
            f"{len(repeated):,} ids are repeated, such as {_examples(repeated)}: this task takes each row once"
        )
    if submission.rewrites and not budget.rewrite:
        raise InvalidSubmission(NO_REWRITES)
    strange = [id_ for id_ in submission.rewrites if id_ not in submission.counts]
    if strange:
        raise InvalidSubmission(f"rewritten but not selected: {_examples(strange)}")
    for id_, turns in submission.rewrites.items():
        check_conversation(turns, f"rewrite of {_examples([id_])}")
    indices = np.fromiter((position[id_] for id_ in submission.ids), dtype=np.int64)
    tokens = view.n_tokens[indices].astype(np.int64)
    if submission.rewrites:
        if count is None:
            raise ValueError("a task that allows rewrites needs a count of their tokens")
        own = {
            id_: count(turns, row["image"]["bytes"] if row["image"] is not None else None)
            for (id_, turns), row in zip(
                submission.rewrites.items(), view.rows(position[id_] for id_ in submission.rewrites), strict=True
            )
        }
        tokens = np.array([own.get(id_, n) for id_, n in zip(submission.ids, tokens, strict=True)], np.int64)
    bare = list(dict.fromkeys(submission.ids[k] for k in np.flatnonzero(tokens < 1)))
    if bare:
        raise InvalidSubmission(
            f"{len(bare):,} rows have no supervised token once truncated, such as {_examples(bare)}: leave them out"
            + (" or shorten what you wrote" if submission.rewrites else "")
        )
    total = int(tokens.sum())
    if budget.tokens is not None and total > budget.tokens:
        raise InvalidSubmission(
            f"{total:,} supervised tokens submitted, the task allows {budget.tokens:,}: select fewer or shorter rows"
        )
    return Validated(submission, len(submission.ids), total)


def _examples(ids: list[str]) -> str:
    return ", ".join(ascii(id_[:40]) for id_ in ids[:3])
