"""The real tasks: public instruction pools, public students, the eight benchmarks of the published protocol."""

from __future__ import annotations

from typing import Any

from curation_env.envs.base import CurationEnv


class LlavaEnv(CurationEnv):
    """Curate 10,000 (or 20,000) rows of a public pool for a vision-language model of 0.5 to 7 billion parameters.

    ## Description
    A pool of instruction data (LLaVA-665K, Vision-Flan), a student before or after its own instruction tuning, its
    published fine-tune (`conf/recipe/`), and eight benchmarks. An iteration needs a GPU of 80 GB. Pool,
    suite and student are public files that each user brings: `curation-env doctor TASK` names what is missing, and
    docs/llava.md leads from those files to the first iteration.

    Actions, observations, reward, episode end and info are `CurationEnv`'s. Other budgets go by `rows=`: the published
    ones are 10,000, 20,000, 50,000 and 100,000; a number from the pool's size on allows the whole pool.

    ## Ids
    | id | pool | student | rows |
    |---|---|---|---|
    | `CurationBench-LLaVA-v0` | LLaVA-665K | LLaVA-1.5-7B before instruction tuning | 10,000 |
    | `CurationBench-LLaVARewrite-v0` | LLaVA-665K, rows may be rewritten | the same | 10,000 |
    | `CurationBench-Qwen2.5VL3B-v0` | LLaVA-665K | Qwen2.5-VL-3B-Instruct | 10,000 |
    | `CurationBench-Qwen2VL2B-v0` | LLaVA-665K | Qwen2-VL-2B | 10,000 |
    | `CurationBench-SmolVLM-v0` | LLaVA-665K | SmolVLM-Base (2.2B) | 10,000 |
    | `CurationBench-SmolVLM500M-v0` | LLaVA-665K | SmolVLM-500M-Base | 10,000 |
    | `CurationBench-VisionFlan-v0` | Vision-Flan | LLaVA-1.5-7B before instruction tuning | 20,000 |
    | `CurationBench-VisionFlanSmolVLM-v0` | Vision-Flan | SmolVLM-Base (2.2B) | 10,000 |

    Example:
        >>> import gymnasium as gym
        >>> import curation_env
        >>> env = gym.make("CurationBench-LLaVA-v0", rows=50_000)
        >>> env.unwrapped.task.title
        'llava[rows=50000]'
    """

    def __init__(self, task: str = "llava", **kwargs: Any) -> None:
        super().__init__(task, **kwargs)
