"""What an agent is told of an iteration: a table in its message, and files in `/workspace/feedback`."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curation_env.task import Task

if TYPE_CHECKING:
    from curation_env.episode import Iteration
    from curation_env.pipeline import Outcome


def shown_part(task: Task) -> str:
    """The part of the items whose scores the agent sees."""
    return "feedback" if task.feedback == "split" else "all"


def gain_recovered(task: Task, average: float, base: float) -> float | None:
    """(score - base) / (full - base) on the items that the agent sees; None where the task's full pool is not known."""
    reference = task.reference_scores
    if reference is None:
        return None
    full = reference[shown_part(task)]["full"]["mean"]
    return (average - base) / (full - base)


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
    rows = [("", *names, "average", "rows", "tokens")]
    for entry in history:
        if entry.scores is None:
            rows.append((f"{entry.number}", *["-"] * len(names), f"({entry.error})", "", ""))
            continue
        label = f"{entry.number}{'*' if entry.number == best else ''}{' base' if entry.number == 0 else ''}"
        cells = [f"{entry.scores[name]:.1f}" for name in names]
        size = (f"{entry.n_rows}", f"{entry.n_supervised_tokens}") if entry.number else ("", "")
        rows.append((label, *cells, f"{entry.average:.2f}", *size))
    columns = list(zip(*rows, strict=True))
    widths = [max(len(cell) for cell in column) for column in columns[1:]]
    lines = [f"feedback after iteration {history[-1].number} of {task.iterations} (percent; * best so far)"]
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
        """Write what the agent may see; the detail is the task's (`scores`, `categories`, `items`)."""
        self._put("history.json", [visible(entry) for entry in history])
        if outcome is None:
            return
        entry = history[-1]
        record = visible(entry)
        if task.detail in ("categories", "items"):
            record["categories"] = outcome.scores.categories
        self._put(f"iteration-{entry.number:03d}.json", record)
        if task.detail == "items":
            self._put(f"items-{entry.number:03d}.json", _items(outcome))

    def _put(self, name: str, value: Any) -> None:
        scratch = self.path / f".{name}.{os.getpid()}"
        scratch.write_text(json.dumps(value, indent=1))
        scratch.rename(self.path / name)


def _items(outcome: Outcome) -> list[dict[str, Any]]:
    """The student's own outputs on feedback items: never a question, an image or a reference."""
    seed = next(iter(outcome.per_seed))
    items = []
    for line in outcome.files[f"seed-{seed}/predictions.jsonl"].decode().splitlines():
        item = json.loads(line)
        if item["part"] != "feedback":
            continue
        name = f"{item['benchmark']}/{item['index']}"
        items.append(
            {
                "item": hashlib.blake2b(name.encode(), digest_size=8).hexdigest(),
                "benchmark": item["benchmark"],
                "category": item["category"],
                "output": item["prediction"],
                "score": item["score"],
            }
        )
    return items
