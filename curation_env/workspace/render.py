"""What the command prints: plain text for a terminal or a language model's context, a few lines a thing."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

WIDTH = 100


def outline(value: Mapping[str, Any], indent: str = "") -> str:
    """A mapping as indented `key  value` lines; lists of plain values stay on wrapped lines."""
    width = max((len(str(key)) for key in value), default=0)
    lines = []
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            lines += [f"{indent}{key}", outline(item, indent + "  ")]
        else:
            lead = f"{indent}{key!s:<{width}}  "
            text = ", ".join(map(_plain, item)) or "-" if isinstance(item, (list, tuple)) else _plain(item)
            paragraphs = [
                textwrap.wrap(part, max(40, WIDTH - len(lead)), break_long_words=False) or [""]
                for part in text.splitlines() or [""]
            ]
            rest = "\n" + " " * len(lead)
            lines.append(lead + rest.join(line for paragraph in paragraphs for line in paragraph))
    return "\n".join(lines)


def history_table(history: Sequence[Mapping[str, Any]]) -> str:
    """One line an iteration: its score and each benchmark's."""
    if not history:
        return "no iteration yet"
    benchmarks = list(dict.fromkeys(name for entry in history for name in entry.get("scores") or {}))
    header = ["iteration", "status", "score", *benchmarks]
    table = [header]
    for entry in history:
        scores = entry.get("scores") or {}
        table.append(
            [
                _plain(entry.get("iteration")),
                _plain(entry.get("status")),
                _score(entry.get("score")),
                *(_score(scores.get(name)) for name in benchmarks),
            ]
        )
    widths = [max(len(line[column]) for line in table) for column in range(len(header))]
    return "\n".join("  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)) for line in table)


def row_text(row: Mapping[str, Any]) -> str:
    """A row of the pool: a head line, then its turns."""
    image = row["image"]["path"] or "yes" if row["image"] else "none"
    lines = [f"{row['id']}  source {row['source']}  image {image}  tokens {row['n_tokens']}"]
    for turn in row["conversation"]:
        lines += [f"  Q: {turn['user']}", f"  A: {turn['assistant']}"]
    return "\n".join(lines)


def signal_summary(name: str, values: np.ndarray) -> dict[str, Any]:
    """How a signal is spread over the pool."""
    import numpy as np

    known = values[~np.isnan(values)]
    summary: dict[str, Any] = {"signal": name, "rows": len(values), "undefined": len(values) - len(known)}
    if len(known):
        points = (0, 5, 25, 50, 75, 95, 100)
        quantiles = np.percentile(known, points)
        summary["mean"] = float(known.mean())
        summary["percentiles"] = {f"{point}%": float(x) for point, x in zip(points, quantiles, strict=True)}
    return summary


def _plain(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
