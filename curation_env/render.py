"""Render modes of the environment: a table as text and a small plot as pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from curation_env.feedback import feedback_table
from curation_env.task import Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from curation_env.state import Iteration


def ansi(task: Task, history: Sequence[Iteration], best: int) -> str:
    """The feedback table of the episode so far."""
    return feedback_table(task, history, best)


def figure(task: Task, history: Sequence[Iteration]) -> Figure:
    """Feedback average by iteration, the best so far, and the task's reference lines where they are known."""
    from matplotlib.figure import Figure

    chart = Figure(figsize=(6.4, 4.0), dpi=100)
    axes = chart.add_subplot()
    scored = [entry for entry in history if entry.average is not None]
    numbers = [entry.number for entry in scored]
    averages = np.array([entry.average for entry in scored])
    errors = [entry.stderr for entry in scored]
    axes.errorbar(numbers, averages, yerr=errors, fmt="o", color="#1f5fa8", capsize=3, label="iteration")
    axes.step(numbers, np.maximum.accumulate(averages), where="post", color="#1f5fa8", alpha=0.5, label="best so far")
    reference = task.reference_scores
    if reference is not None:
        part = reference["feedback" if task.feedback == "split" else "all"]
        mean, sd = part["random"]["mean"], part["random"]["sd"]
        axes.axhspan(mean - sd, mean + sd, color="#999999", alpha=0.25, lw=0)
        axes.axhline(mean, color="#777777", ls="--", lw=1, label="random (mean, sd)")
        axes.axhline(part["full"]["mean"], color="#2c7a3f", ls=":", lw=1.5, label="full pool")
    axes.set_xlabel("iteration (0 is the base model)")
    axes.set_ylabel("feedback average, percent")
    axes.set_title(task.title)
    axes.set_xticks(range(task.iterations + 1) if task.iterations <= 20 else range(0, task.iterations + 1, 5))
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, loc="lower right")
    chart.tight_layout()
    return chart


def rgb_array(task: Task, history: Sequence[Iteration]) -> np.ndarray:
    """The plot as pixels, uint8 of shape (400, 640, 3)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure(task, history))
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
