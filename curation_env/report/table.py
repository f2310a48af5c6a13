"""The table of one run: base, random, every iteration, best, nominee, gain recovered; and its plot as a PNG."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from curation_env.feedback import gain_recovered, judge_free_mean, shown_part
from curation_env.runs import Run


def run_table(run: Run) -> Table:
    """Feedback scores of a run, with the task's reference rows where they are known."""
    task, state = run.task, run.state
    table = Table(title=f"{task.title}: feedback scores, percent", title_justify="left")
    table.add_column("iteration", no_wrap=True)
    for name in task.benchmarks:
        table.add_column(name.removeprefix("Mini"), justify="right")
    table.add_column("average", justify="right", style="bold")
    table.add_column("judge-free", justify="right")
    table.add_column("+-", justify="right")
    table.add_column("gain recovered", justify="right")
    table.add_column("rows", justify="right")
    base = state.history[0].average
    assert base is not None
    blanks = [""] * len(task.benchmarks)
    reference = task.reference_scores
    for entry in state.history:
        marks = ("*" if entry.number == state.best else "") + (" nominee" if entry.number == run.nominee else "")
        label = ("0 base" if entry.number == 0 else str(entry.number)) + marks
        if entry.scores is None or entry.average is None:
            table.add_row(label, *blanks, "-", "", "", entry.error, "")
            continue
        gain = gain_recovered(task, entry.average, base)
        table.add_row(
            label,
            *(f"{entry.scores[name]:.1f}" for name in task.benchmarks),
            f"{entry.average:.2f}",
            f"{judge_free_mean(task, entry.scores):.2f}",
            f"{entry.stderr:.2f}",
            _percent(gain),
            str(entry.n_rows) if entry.number else "",
        )
        if entry.number == 0 and reference is not None:
            part = reference[shown_part(task)]
            for name, label in (("random", "random"), ("full", "full pool")):
                mean, sd = part[name]["mean"], part[name].get("sd")  # one run alone has no spread
                gain = gain_recovered(task, mean, base)
                spread = "" if sd is None else f"{sd:.2f}"
                free = part[name].get("judge_free")  # references from before it was measured have none
                shown = "" if free is None else f"{free['mean']:.2f}"
                table.add_row(label, *blanks, f"{mean:.2f}", shown, spread, _percent(gain), "", style="dim")
    best = state.history[state.best]
    assert best.average is not None
    table.caption = (
        f"* best: {best.average:.2f}. +- is the average's standard error over items (random, full: sd over runs). "
        f"Judge-free: the mean of what no judge grades. Suite: {task.suite_title}."
    )
    return table


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f}%"


def save_plot(run: Run, path: Path) -> Path:
    """Write the plot of a run as a PNG and return its path."""
    from curation_env.render import figure

    figure(run.task, run.state.history).savefig(path, dpi=120)
    return path
