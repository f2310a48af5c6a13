"""What the host answers when the sandbox asks: the environment's side of the session."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from curation_env.errors import InvalidAction
from curation_env.feedback import visible
from curation_env.submission import Submission

if TYPE_CHECKING:
    from curation_env.episode import Episode


class HostBackend:
    """A `SessionBackend` over an episode. Nothing that it answers is a secret, a host path or a sealed score."""

    def __init__(self, episode: Episode) -> None:
        self._episode = episode

    def task(self) -> Mapping[str, Any]:
        """Budgets, sources, benchmarks, signals, and how far the episode is."""
        episode = self._episode
        state, task = episode.state, episode.task
        sources = episode.pipeline.view.sources
        return {
            "name": task.title,
            "rows": task.rows,
            "tokens": task.tokens,
            "repeats": task.repeats,
            "rewrite": task.rewrite,
            "feedback": task.feedback,
            "pool_rows": len(sources),
            "sources": {name: sources.count(name) for name in sorted(set(sources))},
            "benchmarks": task.benchmarks,
            "iteration": state.iteration,
            "iterations": task.iterations,
            "seed": state.seed,
            "signals": list(task.signals),
            "cards": [],
            "limits": task.limits.model_dump(),
        }

    def history(self) -> Sequence[Mapping[str, Any]]:
        """Every iteration so far, with feedback scores only."""
        return [visible(entry) for entry in self._episode.state.history]

    def signal(self, name: str) -> np.ndarray:
        """Values of a signal, float32 of shape (rows of the view,), charged at the recorded price.

        Raises:
            InvalidAction: The task has no such signal.
        """
        episode = self._episode
        if name not in episode.task.signals:
            raise InvalidAction(f"no signal {name!r}: this task has {', '.join(episode.task.signals) or 'none'}")
        with episode.busy:
            values, price = episode.pipeline.signal(name, episode.on_progress)
            episode.state.curation_seconds += price
            episode.state.priced_seconds += price
            episode.ledger.event("signal", name=name, price=price)
        return values

    def check(self, ids: Sequence[str], rewrites: Mapping[str, list[dict[str, str]]]) -> Mapping[str, Any]:
        """What validation and audit would say of a submission; charges nothing.

        Raises:
            InvalidSubmission: What is wrong with it.
        """
        with self._episode.busy:
            valid, certificate = self._episode.pipeline.check(Submission.of(ids, rewrites))
        return {
            "passed": certificate.passed,
            "rows": valid.rows,
            "supervised_tokens": valid.supervised_tokens,
            "message": "ok" if certificate.passed else certificate.reason,
        }

    def card(self, name: str) -> str:
        """The text of a method card.

        Raises:
            InvalidAction: This scaffold has no such card.
        """
        raise InvalidAction(f"no card {name!r}: this scaffold has none")
