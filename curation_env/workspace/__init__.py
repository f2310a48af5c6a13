"""What an agent imports inside the sandbox: `import curation`.

The module talks to the host over a Unix socket and reads the read-only pool beside it. It stands alone: it imports
nothing of the harness, and numpy, datasets and Pillow only where a function needs them.

    import curation

    task = curation.task()                      # rows, tokens, sources, benchmarks, iteration, ...
    rows = curation.pool()                      # datasets.Dataset: id, source, image, conversation, n_tokens
    sources = curation.column("source")         # numpy, one value a row; also "id" and "n_tokens"
    loss = curation.signal("loss")              # numpy float32, one number a row of the pool
    curation.select(rows.select(range(100)))    # writes the submission
"""

from .api import column, history, pool, seed, select, signal, task
from .client import CurationError

__all__ = ["CurationError", "column", "history", "pool", "seed", "select", "signal", "task"]
