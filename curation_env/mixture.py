"""A mixture over sources as a data policy: what numeric agents (search, RL) submit, as Python that anyone can read."""

from __future__ import annotations

import json
from collections.abc import Mapping

_POLICY = '''"""
---
family: mixture
---
A mixture over sources: each gets rows in proportion to its weight (a source that has too few gives the rest to the
others), drawn at random after the share CUT of its rows with the highest loss under the init is left out.
"""

import numpy as np

import curation

WEIGHTS = {weights}
CUT = {cut}
ROWS = {rows}

task = curation.task()
sources = curation.column("source")
rng = np.random.default_rng(curation.seed())
loss = curation.signal("loss") if CUT > 0 else np.zeros(len(sources))

candidates = {{}}
for name in np.unique(sources).tolist():
    rows = np.flatnonzero(sources == name)
    kept = rows[np.argsort(loss[rows], kind="stable")][: len(rows) - int(CUT * len(rows))]
    if WEIGHTS.get(name, 0) > 0:
        candidates[name] = rng.permutation(kept)

# Rows of each source, in proportion; what a source lacks is shared out again among those that have more.
shares = dict.fromkeys(candidates, 0)
left = min(ROWS, sum(len(rows) for rows in candidates.values()))
while left > 0:
    open_sources = [name for name in candidates if shares[name] < len(candidates[name])]
    weights = np.array([WEIGHTS[name] for name in open_sources])
    wanted = np.floor(left * weights / weights.sum()).astype(int)
    if wanted.sum() == 0:
        wanted[np.argsort(-weights, kind="stable")[:left]] = 1
    for name, more in zip(open_sources, wanted):
        shares[name] += min(int(more), len(candidates[name]) - shares[name])
    left = min(ROWS, sum(len(rows) for rows in candidates.values())) - sum(shares.values())

chosen = rng.permutation(np.concatenate([candidates[name][: shares[name]] for name in candidates]))
if task["tokens"]:
    chosen = chosen[np.cumsum(curation.column("n_tokens")[chosen]) <= task["tokens"]]
print({{name: count for name, count in shares.items() if count}})
curation.select(curation.column("id")[chosen])
'''


def mixture_policy(weights: Mapping[str, float], cut: float, rows: int) -> str:
    """The source of a policy that draws `rows` rows from the sources in proportion to `weights`.

    Args:
        weights: Weight of each source, at least 0; sources that are not named get none. All zero means equal weights.
        cut: Share of each source's rows, those with the highest mean assistant-token loss under the init, that is
            left out; 0 <= cut < 1. 0 reads no signal, hence charges none.
        rows: Rows to select; fewer are selected when the sources with a weight have fewer.

    Raises:
        ValueError: A weight is negative or not finite, or `cut` or `rows` is out of range.

    Example:
        >>> "WEIGHTS = {" in mixture_policy({"a": 0.5, "b": 1.5}, 0.1, 100)
        True
    """
    numbers = {name: float(weight) for name, weight in weights.items()}
    if not numbers or not all(0 <= weight < float("inf") for weight in numbers.values()):
        raise ValueError(f"weights must be finite numbers from 0, one or more, not {weights}")
    if not 0 <= cut < 1:
        raise ValueError(f"cut must be a share from 0 to below 1, not {cut}")
    if rows < 1:
        raise ValueError(f"rows must be at least 1, not {rows}")
    total = sum(numbers.values())
    shares = {name: weight / total if total else 1 / len(numbers) for name, weight in numbers.items()}
    lines = [f"    {json.dumps(name)}: {share:.6f}," for name, share in sorted(shares.items())]
    return _POLICY.format(weights="\n".join(["{", *lines, "}"]), cut=f"{cut:.4f}", rows=int(rows))
