"""
---
family: source balance
---
Equal numbers of rows from every source; a source that is too small gives all it has, the others share the rest.
"""

import curation
import numpy as np

task = curation.task()
sources = curation.column("source")
rng = np.random.default_rng(curation.seed())

# The k-th row of each source, in a random order within it, before the (k+1)-th of any.
rank = np.empty(len(sources))
for name in np.unique(sources):
    rows = np.flatnonzero(sources == name)
    rank[rng.permutation(rows)] = np.arange(len(rows))
order = np.lexsort((rng.random(len(sources)), rank))[: task["rows"]]
if task["tokens"]:
    order = order[np.cumsum(curation.column("n_tokens")[order]) <= task["tokens"]]
curation.select(curation.column("id")[order])
