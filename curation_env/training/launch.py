"""One of several processes that share training runs, for a launcher.

    python -m torch.distributed.run --standalone --nproc_per_node 2 \\
        -m curation_env.training.launch PAYLOAD.json [PAYLOAD.json ...]

A payload is that of the train stage (with `zero_stage`, where 2 is not wanted). The runs follow each other; rank 0
writes the result of each as `result.json` into its `out` folder.
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
    for path in sys.argv[1:]:
        payload = json.loads(Path(path).read_text())
        if payload.get("device", "auto") == "cpu":
            torch.set_num_threads(1)
        result = train(**{**payload, "recipe": Recipe.model_validate(payload["recipe"])})
        if rank_and_world()[0] == 0:
            (Path(payload["out"]) / "result.json").write_text(json.dumps(result))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
