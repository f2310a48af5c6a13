"""
---
family: loss window
---
The rows with the highest loss under the init, below its 95th percentile: hard, but not so hard that the answer is
probably wrong.
"""

import curation
import numpy as np

CEILING = 0.95

task = curation.task()
loss = curation.signal("loss")
loss = np.where(np.isnan(loss), -np.inf, loss)
order = np.argsort(-loss, kind="stable")
order = order[int((1 - CEILING) * len(order)) :][: task["rows"]]
if task["tokens"]:
    order = order[np.cumsum(curation.column("n_tokens")[order]) <= task["tokens"]]
curation.select(curation.column("id")[order])
