"""Selection policies of the miniature's noise floor: plain ones that a person could write, careless ones, the oracle.

A policy sees what an agent sees (`Facts`: sources, texts, token counts, the init's loss) and returns row positions.
The oracle alone reads the truth.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Facts:
    """Columns of a pool view, aligned.

    Attributes:
        sources: Source of each row.
        questions: First user text of each row.
        tokens: Supervised tokens of each row.
        loss: Mean assistant-token loss of each row under the init.
        skill, fault, duplicate: The truth, for the oracle and the careless policy.
    """

    sources: list[str]
    questions: list[str]
    tokens: np.ndarray
    loss: np.ndarray
    skill: list[str]
    fault: list[str]
    duplicate: list[bool]

    def __len__(self) -> int:
        return len(self.sources)


Policy = Callable[[Facts, int, np.random.Generator], np.ndarray]


def balanced_over(groups: Sequence[Hashable], rows: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Draw `n` of `rows` so that groups get equal parts; what a small group cannot give goes to the others."""
    held: dict[Hashable, list[int]] = {}
    for k in rng.permutation(rows):
        held.setdefault(groups[k], []).append(int(k))
    chosen: list[int] = []
    queues = [held[g] for g in sorted(held, key=repr)]
    while len(chosen) < n and queues:
        for queue in queues:
            chosen.append(queue.pop())
        queues = [queue for queue in queues if queue]
    return np.array(chosen[:n] if len(chosen) <= n else rng.permutation(chosen)[:n])


def _all(facts: Facts) -> np.ndarray:
    return np.arange(len(facts))


def _below(facts: Facts, percentile: float) -> np.ndarray:
    return np.flatnonzero(facts.loss < np.percentile(facts.loss, percentile))


def _window(facts: Facts) -> np.ndarray:
    """Rows of losses between the 60th and the 90th percentile."""
    return np.setdiff1d(_below(facts, 90), _below(facts, 60))


def _plain(question: str) -> str:
    """The question without the words that it opens with in some worlds; for the oracle."""
    opening, comma, rest = question.partition(" , ")
    return rest if comma and len(opening.split()) == 2 else question


def _cluster(question: str) -> str:
    """A rough kind of question: its first three words, and whether it has options."""
    return " ".join(question.split()[:3]) + (" +options" if "\nA." in question else "")


def random_rows(facts: Facts, n: int, rng: np.random.Generator) -> np.ndarray:
    return rng.permutation(len(facts))[:n]


def random_tokens(facts: Facts, n: int, rng: np.random.Generator) -> np.ndarray:
    """Random rows up to the supervised tokens of `n` average rows, instead of `n` rows."""
    order = rng.permutation(len(facts))
    budget = facts.tokens.mean() * n
    return order[np.cumsum(facts.tokens[order]) <= budget]


def balanced(facts: Facts, n: int, rng: np.random.Generator) -> np.ndarray:
    return balanced_over(facts.sources, _all(facts), n, rng)


def balanced_cut(facts: Facts, n: int, rng: np.random.Generator) -> np.ndarray:
    return balanced_over(facts.sources, _below(facts, 95), n, rng)


def loss_window(facts: Facts, n: int, rng: np.random.Generator) -> np.ndarray:
    """The highest losses below the 95th percentile."""
    rows = _below(facts, 95)
    return rows[np.argsort(facts.loss[rows], kind="stable")[-n:]]


def wide_window(facts: Facts, n: int, rng: np.random.Generator) -> np.ndarray:
    """Random rows of the window."""
    return rng.permutation(_window(facts))[:n]


def balanced_window(facts: Facts, n: int, rng: np.random.Generator) -> np.ndarray:
    return balanced_over(facts.sources, _window(facts), n, rng)


def cluster_window(facts: Facts, n: int, rng: np.random.Generator) -> np.ndarray:
    return balanced_over([_cluster(q) for q in facts.questions], _window(facts), n, rng)


def cluster_balanced(facts: Facts, n: int, rng: np.random.Generator) -> np.ndarray:
    return balanced_over([_cluster(q) for q in facts.questions], _all(facts), n, rng)


def cluster_cut(facts: Facts, n: int, rng: np.random.Generator) -> np.ndarray:
    return balanced_over([_cluster(q) for q in facts.questions], _below(facts, 95), n, rng)


def lowest_loss(facts: Facts, n: int, rng: np.random.Generator) -> np.ndarray:
    return np.argsort(facts.loss, kind="stable")[:n]


def top_loss(facts: Facts, n: int, rng: np.random.Generator) -> np.ndarray:
    return np.argsort(facts.loss, kind="stable")[-n:]


def noisy_source(facts: Facts, n: int, rng: np.random.Generator) -> np.ndarray:
    """Only the source with the largest part of faulty rows (the truth picks it), without repeats."""
    bad: dict[str, list[bool]] = {}
    for source, fault in zip(facts.sources, facts.fault, strict=True):
        bad.setdefault(source, []).append(fault not in ("", "leak"))
    worst = max(sorted(bad), key=lambda s: float(np.mean(bad[s])))
    rows = np.flatnonzero(np.array(facts.sources) == worst)
    return rng.permutation(rows)[:n]


def oracle(facts: Facts, n: int, rng: np.random.Generator) -> np.ndarray:
    """Clean rows without copies, balanced over the skills that the benchmarks ask for."""
    useless = ("chat", "trivial", "clip art", "leak")
    clean = [
        k for k in range(len(facts)) if not facts.fault[k] and not facts.duplicate[k] and facts.skill[k] not in useless
    ]
    groups = [f"{s} {_cluster(_plain(q))}" for s, q in zip(facts.skill, facts.questions, strict=True)]
    return balanced_over(groups, np.array(clean), n, rng)


HAND_WRITTEN: dict[str, Policy] = {
    "balanced": balanced,
    "balanced + cut": balanced_cut,
    "loss window": loss_window,
    "wide window": wide_window,
    "balanced window": balanced_window,
    "cluster-balanced window": cluster_window,
    "cluster-balanced": cluster_balanced,
    "cluster-balanced + cut": cluster_cut,
}
CARELESS: dict[str, Policy] = {"lowest loss": lowest_loss, "top loss": top_loss, "one noisy source": noisy_source}
