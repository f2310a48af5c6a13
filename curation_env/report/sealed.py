"""Sealed scores of a run: opened on request, and every opening counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from curation_env.feedback import judge_free_mean
from curation_env.ledger import Ledger
from curation_env.pipeline import Scores
from curation_env.runs import locate, read_run


def unsealed(path: str | Path) -> dict[str, Any]:
    """Open a run's sealed scores.

    Returns:
        {"openings": how often they were opened by now, "nominee": iteration, "iterations": [{"iteration",
        "feedback", "sealed", "judge_free", "scores"}]}; the means are None for a part without items.

    Raises:
        NoSuchRun: There is no run at `path`.
        RunLocked: The run is still going on.
    """
    run = read_run(path)
    ledger = Ledger(locate(path))
    try:
        records = ledger.unseal()
        openings = ledger.openings()
    finally:
        ledger.close()
    rows = []
    for record in records:
        scores = Scores.from_json(record["scores"])
        rows.append(
            {
                "iteration": record["iteration"],
                "feedback": scores.mean("feedback"),
                "sealed": scores.mean("sealed") if scores.parts["sealed"] else None,
                "judge_free": judge_free_mean(run.task, scores.parts["sealed"]) if scores.parts["sealed"] else None,
                "scores": dict(scores.parts["sealed"]),
                "n_items": dict(scores.n_items["sealed"]),
            }
        )
    return {"task": run.task.title, "openings": openings, "nominee": run.nominee, "iterations": rows}


def sealed_table(opened: dict[str, Any]) -> Table:
    """The sealed scores as a table; the number of openings stands in its title."""
    times = "once" if opened["openings"] == 1 else f"{opened['openings']} times"
    table = Table(title=f"{opened['task']}: sealed scores, percent; opened {times}", title_justify="left")
    rows = opened["iterations"]
    names = sorted({name for row in rows for name in row["scores"]})
    for name in ("iteration", *names, "sealed mean", "judge-free", "feedback mean"):
        table.add_column(name.removeprefix("Mini"), justify="right")
    for row in rows:
        label = f"{row['iteration']}{' nominee' if row['iteration'] == opened['nominee'] else ''}"
        sealed, free = ("-" if row[key] is None else f"{row[key]:.2f}" for key in ("sealed", "judge_free"))
        cells = [f"{row['scores'][name]:.1f}" for name in names]
        table.add_row(label, *cells, sealed, free, f"{row['feedback']:.2f}")
    return table
