"""How many supervised tokens a conversation has once it is a training row: the trainer's count, without torch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from curation_env.training.families import Images, images_of
from curation_env.training.recipe import Recipe
from curation_env.training.spans import expanded, image_texts, layout_of, supervised_tokens

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class TokenCounter:
    """Counts what `training.data.Encoder` would supervise; a test holds the two together.

    Args:
        student: Folder of the init, with `tokenizer.json`, `config.json` and the image processor's settings.
        recipe: How a conversation becomes text, and where it is cut.
    """

    def __init__(self, student: Path, recipe: Recipe) -> None:
        self._student = student
        self._recipe = recipe

    def __call__(self, conversation: Sequence[dict[str, str]], image: bytes | bool | None) -> int:
        """Supervised tokens of a row that holds `conversation`, and an image or none.

        Args:
            image: Encoded bytes; whether there is one says enough where all images take the same tokens.

        Raises:
            ValueError: Bytes are needed, and there are none.
        """
        turns = [(turn["user"], turn["assistant"]) for turn in conversation]
        layouts = []
        if image or self._recipe.text_only_image == "black":
            if image is True and self.sized:
                raise ValueError("this student's images take tokens by their size: give the image's bytes")
            layouts = [layout_of(self._images, self._recipe, image if isinstance(image, bytes) else None)]
        text, spans = self._recipe.chat.render(turns, images=image_texts(self._images, self._recipe, layouts))
        found = self._tokenizer.encode(text)
        tokens, offsets = np.asarray(found.ids), np.asarray(found.offsets).reshape(-1, 2)
        _, supervised = expanded(tokens, supervised_tokens(offsets, spans), self._images.token, layouts)
        return int(supervised[1 : self._recipe.max_length].sum())  # the first token has none before it

    @property
    def sized(self) -> bool:
        """Whether images take tokens by their size, so that their bytes are needed."""
        return self._images.fixed is None

    @cached_property
    def _images(self) -> Images:
        return images_of(self._student)

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(self._student / "tokenizer.json"))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer
