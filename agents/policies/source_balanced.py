"""
---
family: source balance
---
Equal numbers of rows from every source; a source that is too small gives all it has, the others share the rest.
"""

import curation
import numpy as np

task = curation.task()
pool = curation.pool()
sources = np.array(pool["source"])
rng = np.random.default_rng(curation.seed())

# The k-th row of each source, in a random order within it, before the (k+1)-th of any.
rank = np.empty(len(pool))
for name in np.unique(sources):
    rows = np.flatnonzero(sources == name)
    rank[rng.permutation(rows)] = np.arange(len(rows))
order = np.lexsort((rng.random(len(pool)), rank))[: task["rows"]]
if task["tokens"]:
    order = order[np.cumsum(np.array(pool["n_tokens"])[order]) <= task["tokens"]]
curation.select(pool.select(order))
