"""
---
family: random
---
Rows at random, all sources alike: the baseline that everything is measured against.
"""

import curation
import numpy as np

task = curation.task()
pool = curation.pool()
order = np.random.default_rng(curation.seed()).permutation(len(pool))[: task["rows"]]
if task["tokens"]:
    order = order[np.cumsum(np.array(pool["n_tokens"])[order]) <= task["tokens"]]
curation.select(pool.select(order))
