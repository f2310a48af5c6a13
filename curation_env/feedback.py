"""What an agent is told of an iteration: a table in its message, and files in `/workspace/feedback`."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curation_env.errors import InfrastructureError
from curation_env.pool import canonical_json
from curation_env.task import Task

if TYPE_CHECKING:
    from curation_env.pipeline import Outcome
    from curation_env.state import Iteration


def shown_part(task: Task) -> str:
    """The part of the items whose scores the agent sees."""
    return "feedback" if task.feedback == "split" else "all"


def shown_scores(task: Task, scores: Mapping[str, Any]) -> dict[str, Any]:
    """Scores (`Scores.to_json()`) less the parts that the agent does not see, from which the sealed ones follow."""
    part = shown_part(task)
    tables = {name: {part: scores[name][part]} for name in ("parts", "stderr", "n_items") if part in scores[name]}
    return {**tables, "categories": scores["categories"]}


def shown_files(task: Task, files: Mapping[str, bytes]) -> tuple[dict[str, bytes], dict[str, str]]:
    """An outcome's files without what is sealed, and the sealed lines of its predictions by file."""
    shown, sealed = dict(files), {}
    for name, data in files.items():
        kind = name.rpartition("/")[2]
        if kind == "scores.json":
            shown[name] = (canonical_json(shown_scores(task, json.loads(data))) + "\n").encode()
        elif kind == "predictions.jsonl":
            lines = [(_is_shown(task, json.loads(line)), line) for line in _lines(data)]
            shown[name] = "".join(f"{line}\n" for seen, line in lines if seen).encode()
            if kept := "".join(f"{line}\n" for seen, line in lines if not seen):
                sealed[name] = kept
    return shown, sealed


def _lines(data: bytes) -> list[str]:
    # Not `splitlines`: a prediction may hold U+2028, which ends no line of JSON.
    return [line for line in data.decode().split("\n") if line]


def _is_shown(task: Task, item: Mapping[str, Any]) -> bool:
    return shown_part(task) in ("all", item["part"])


def gain_recovered(task: Task, average: float, base: float) -> float | None:
    """(score - base) / (full - base) on the items that the agent sees; None where the task's full pool is not known."""
    reference = task.reference_scores
    if reference is None:
        return None
    full = reference[shown_part(task)]["full"]["mean"]
    return (average - base) / (full - base)


def judge_free_mean(task: Task, scores: Mapping[str, float]) -> float:
    """Mean over the benchmarks that need no judge; NaN where none of `scores` is of one."""
    values = [scores[name] for name in task.judge_free if name in scores]
    return sum(values) / len(values) if values else math.nan


def visible(entry: Iteration) -> dict[str, Any]:
    """An iteration as an agent may see it: feedback scores only."""
    return {
        "iteration": entry.number,
        "status": "scored" if entry.scores is not None else "charged",
        "score": entry.average,
        "stderr": entry.stderr,
        "scores": entry.scores,
        "n_rows": entry.n_rows,
        "n_supervised_tokens": entry.n_supervised_tokens,
        "error": entry.error,
    }


def feedback_table(task: Task, history: Sequence[Iteration], best: int) -> str:
    """Scores of every iteration as a plain table, the newest last, the best marked."""
    names = task.benchmarks
    rows = [("", *names, "average", "judge-free", "rows", "tokens")]
    for entry in history:
        if entry.scores is None:
            rows.append((f"{entry.number}", *["-"] * len(names), f"({entry.error})", "", "", ""))
            continue
        label = f"{entry.number}{'*' if entry.number == best else ''}{' base' if entry.number == 0 else ''}"
        cells = [f"{entry.scores[name]:.1f}" for name in names]
        size = (f"{entry.n_rows}", f"{entry.n_supervised_tokens}") if entry.number else ("", "")
        rows.append((label, *cells, f"{entry.average:.2f}", f"{judge_free_mean(task, entry.scores):.2f}", *size))
    columns = list(zip(*rows, strict=True))
    widths = [max(len(cell) for cell in column) for column in columns[1:]]
    lines = [
        f"feedback after iteration {history[-1].number} of {task.iterations} "
        "(percent; * best so far; judge-free: the mean of what no judge grades)"
    ]
    lines += [
        "  ".join([f"{row[0]:<8}", *(f"{cell:>{w}}" for cell, w in zip(row[1:], widths, strict=True))]) for row in rows
    ]
    scored = [entry for entry in history if entry.scores is not None]
    last = scored[-1]
    assert last.average is not None
    assert scored[0].average is not None
    recovered = gain_recovered(task, last.average, scored[0].average)
    lines.append(
        f"last scored: {last.average:.2f} +- {last.stderr:.2f} (standard error over items)"
        + ("" if recovered is None else f"; gain recovered {100 * recovered:.0f}%")
    )
    return "\n".join(lines)


class FeedbackFolder:
    """The host side of `/workspace/feedback`: one JSON file per iteration and `history.json`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(exist_ok=True)

    def write(self, task: Task, history: Sequence[Iteration], outcome: Outcome | None = None) -> None:
        """Write what the agent may see; the detail is the task's (`scores`, `categories`, `items`).

        Raises:
            InfrastructureError: The folder can't be written.
        """
        try:
            self._write(task, history, outcome)
        except OSError as error:
            raise InfrastructureError(f"{self.path} can't be written: {error.strerror}") from error

    def _write(self, task: Task, history: Sequence[Iteration], outcome: Outcome | None) -> None:
        if outcome is not None:
            entry = history[-1]
            record = visible(entry)
            if task.detail in ("categories", "items"):
                record["categories"] = _categories(task, outcome)
            self._put(f"iteration-{entry.number:03d}.json", record)
            if task.detail == "items":
                self._put(f"items-{entry.number:03d}.json", _items(task, outcome))
        self._put("history.json", [visible(entry) for entry in history])

    def _put(self, name: str, value: Any) -> None:
        scratch = self.path / f".{name}.{os.getpid()}"
        scratch.write_text(json.dumps(value, indent=1))
        scratch.rename(self.path / name)


def item_name(benchmark: str, index: Any) -> str:
    """What an item is called where an agent may see it."""
    return hashlib.blake2b(f"{benchmark}/{index}".encode(), digest_size=8).hexdigest()


def _shown_items(task: Task, outcome: Outcome, seed: int) -> Iterator[dict[str, Any]]:
    for line in _lines(outcome.files[f"seed-{seed}/predictions.jsonl"]):
        item = json.loads(line)
        if _is_shown(task, item):
            yield item


def _categories(task: Task, outcome: Outcome) -> Mapping[str, Mapping[str, float]]:
    """Percent by benchmark and category, on the items that the agent sees.

    The evaluation's own figures, by each benchmark's rule, are on the feedback items; where all items are shown it is
    the mean of the items' scores.
    """
    if task.feedback == "split":
        return outcome.scores.categories
    scores: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in task.benchmarks}
    for seed in outcome.per_seed:
        for item in _shown_items(task, outcome, seed):
            if item["category"]:
                scores[item["benchmark"]][item["category"]].append(float(item["score"]))
    return {
        name: {category: 100.0 * sum(values) / len(values) for category, values in sorted(table.items())}
        for name, table in scores.items()
    }


def _items(task: Task, outcome: Outcome) -> list[dict[str, Any]]:
    """The student's own outputs on the items that the agent sees: never a question, an image or a reference."""
    items = []
    for item in _shown_items(task, outcome, next(iter(outcome.per_seed))):
        items.append(
            {
                "item": item_name(item["benchmark"], item["index"]),
                "benchmark": item["benchmark"],
                "category": item["category"],
                "output": item["prediction"],
                "score": item["score"],
            }
        )
    return items
