"""One process of a training run that several share, for a launcher.

    python -m torch.distributed.run --standalone --nproc_per_node 2 \\
        -m curation_env.training.launch PAYLOAD.json RESULT.json

The payload is that of the train stage (`zero_stage` among it, where 2 is not wanted); rank 0 writes the result.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from curation_env.training.engine import rank_and_world
from curation_env.training.recipe import Recipe
from curation_env.training.vlm import train


def main() -> None:
    payload = json.loads(Path(sys.argv[1]).read_text())
    if payload.get("device", "auto") == "cpu":
        torch.set_num_threads(1)
    result = train(**{**payload, "recipe": Recipe.model_validate(payload["recipe"])})
    if rank_and_world()[0] == 0:
        Path(sys.argv[2]).write_text(json.dumps(result))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
