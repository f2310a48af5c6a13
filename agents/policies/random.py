"""
---
family: random
---
Rows at random, all sources alike: the baseline that everything is measured against.
"""

import curation
import numpy as np

task = curation.task()
ids = curation.column("id")
order = np.random.default_rng(curation.seed()).permutation(len(ids))[: task["rows"]]
if task["tokens"]:
    order = order[np.cumsum(curation.column("n_tokens")[order]) <= task["tokens"]]
curation.select(ids[order])
