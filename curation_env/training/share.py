"""How processes share the rows of an optimizer step: who trains on which, in micro-batches that fit each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from curation_env.training.data import Row, even_micro_batches
from curation_env.training.recipe import Recipe


class MicroBatch(NamedTuple):
    """Rows of one forward pass; of those behind the first `counted` no loss counts.

    All processes exchange gradients (or weights) in the order in which their modules run. So where one has no row left,
    or none with an image while another has one, it runs a row of the window that others train on, times zero.
    """

    rows: list[Row]
    counted: int

    @property
    def targets(self) -> int:
        """Targets of the rows that count: their losses come first."""
        return sum(row.n_supervised for row in self.rows[: self.counted])


def share(rows: Sequence[Row], window: Sequence[int], recipe: Recipe, rank: int, world: int) -> list[MicroBatch]:
    """The micro-batches of one of `world` processes in the window `window` (indices): equally many for each.

    Within one, rows go by length, so that they pack tightly.
    """
    of_ranks = [packed(rows, part, recipe) for part in even_shares(rows, window, world)]
    by_length = sorted((rows[k] for k in window), key=lambda row: len(row.tokens))
    batches = []
    for k in range(max(len(own) for own in of_ranks)):
        together = [own[k] if k < len(own) else [] for own in of_ranks]
        shows = any(row.image is not None for batch in together for row in batch)
        batch = together[rank]
        if batch and (not shows or any(row.image is not None for row in batch)):
            batches.append(MicroBatch(batch, len(batch)))
        else:
            spare = next(row for row in by_length if row.image is not None or not shows)
            batches.append(MicroBatch([*batch, spare], len(batch)))
    return batches


def even_shares(rows: Sequence[Row], window: Sequence[int], n: int) -> list[list[int]]:
    """Deal the rows `window` (indices) out to `n` shares of about equally many tokens: a step takes as long as its
    longest share.
    """
    shares: list[list[int]] = [[] for _ in range(n)]
    used = [0] * n
    for k in sorted(window, key=lambda k: -len(rows[k].tokens)):
        least = min(range(n), key=used.__getitem__)
        shares[least].append(k)
        used[least] += len(rows[k].tokens)
    return shares


def packed(rows: Sequence[Row], window: Sequence[int], recipe: Recipe) -> list[list[Row]]:
    """The micro-batches of one process; within one, rows go by length, so that they pack tightly."""
    lengths = [len(rows[k].tokens) for k in window]
    return [[rows[window[k]] for k in batch] for batch in even_micro_batches(lengths, recipe.tokens_per_micro_batch)]
