"""How many supervised tokens a conversation has once it is a training row: the trainer's count, without torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from curation_env.training.recipe import Recipe

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class TokenCounter:
    """Counts what `training.data.Encoder` would supervise; a test holds the two together.

    Args:
        student: Folder of the init, with `tokenizer.json` and `config.json`.
        recipe: How a conversation becomes text, and where it is cut.
    """

    def __init__(self, student: Path, recipe: Recipe) -> None:
        self._student = student
        self._recipe = recipe

    def __call__(self, conversation: Sequence[dict[str, str]], image: bool) -> int:
        """Supervised tokens of a row that holds `conversation`, and an image or none."""
        turns = [(turn["user"], turn["assistant"]) for turn in conversation]
        shown = image or self._recipe.text_only_image == "black"
        text, spans = self._recipe.chat.render(turns, images=int(shown))
        found = self._tokenizer.encode(text)
        tokens, offsets = np.asarray(found.ids), np.asarray(found.offsets).reshape(-1, 2)
        supervised = np.zeros(len(tokens), bool)
        for start, end in spans:
            supervised |= (offsets[:, 0] >= start) & (offsets[:, 1] <= end) & (offsets[:, 1] > offsets[:, 0])
        image_token, tokens_per_image = self._image
        expanded = np.repeat(supervised, np.where(tokens == image_token, tokens_per_image, 1))
        return int(expanded[1 : self._recipe.max_length].sum())  # the first token has none before it

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(self._student / "tokenizer.json"))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    @cached_property
    def _image(self) -> tuple[int, int]:
        """Id of the image token, and how many of them an image takes."""
        config: dict[str, Any] = json.loads((self._student / "config.json").read_text())
        vision = config["vision_config"]
        patches = (vision["image_size"] // vision["patch_size"]) ** 2
        return config["image_token_index"], patches + (config["vision_feature_select_strategy"] == "full")
