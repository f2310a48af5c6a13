"""A recipe: the frozen training settings of one student, a small YAML file that is hashed into every record."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

from curation_env.errors import MissingAssets


class Chat(BaseModel):
    """The text that a conversation becomes.

    Attributes:
        start: What stands before the first turn.
        image: An image, before the first user text.
        user, user_image: A user's turn, and the first one where it has an image (null: as the others).
        assistant: What the answer follows.
        answer, end, after: An answer, the token that ends it, and what stands behind that.
        supervised: How far the supervised span of a turn reaches from the answer on: to the end of which part.
        stop: Further tokens that end an answer when the student is evaluated.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    start: str = ""
    image: str = "<image>\n"
    user: str = "USER: {text} "
    user_image: str | None = None
    assistant: str = "ASSISTANT:"
    answer: str = " {text}"
    end: str = "</s>"
    after: str = ""
    supervised: Literal["answer", "end", "after"] = "end"
    stop: tuple[str, ...] = ()

    def render(
        self, turns: Sequence[tuple[str, str | None]], *, images: Sequence[str] = ()
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return the text of a conversation and the character spans of its supervised parts.

        Args:
            turns: (user, assistant) texts; an assistant text of None ends the prompt where the model goes on.
            images: The texts of the images, which stand before the first user text.
        """
        text, spans = self.start, []
        for k, (user, answer) in enumerate(turns):
            shown = "".join(images) if k == 0 else ""
            template = self.user_image if shown and self.user_image is not None else self.user
            text += template.replace("{text}", shown + user) + self.assistant
            if answer is not None:
                parts = {"answer": self.answer.replace("{text}", answer), "end": self.end, "after": self.after}
                names = list(parts)
                reach = "".join(parts[name] for name in names[: names.index(self.supervised) + 1])
                spans.append((len(text), len(text) + len(reach)))
                text += "".join(parts.values())
        return text, spans


class Recipe(BaseModel):
    """Training settings of one student; see `conf/recipe/` for what each field means."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    image_pad: Literal["mean", "none"] = "mean"
    text_only_image: Literal["none", "black"] = "none"
    chat: Chat = Chat()
    max_length: int = Field(gt=0)
    freeze: tuple[str, ...] = ()
    precision: Literal["fp32", "bf16"] = "fp32"
    optimizer: Literal["adamw"] = "adamw"
    lr: float = Field(gt=0)
    weight_decay: float = Field(ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    grad_clip: float = Field(gt=0)
    warmup_ratio: float = Field(ge=0, lt=1)
    epochs: int = Field(gt=0)
    examples_per_step: int = Field(gt=0)
    tokens_per_micro_batch: int = Field(gt=0)
    seeds: tuple[int, ...] = Field(min_length=8)

    @classmethod
    def load(cls, name: str) -> Recipe:
        """Read `conf/recipe/<name>.yaml` of the package, or the YAML file `name`.

        Raises:
            MissingAssets: There is no such recipe; the message lists those that are there.
        """
        folder = resources.files("curation_env.conf") / "recipe"
        path = Path(name) if name.endswith(".yaml") else folder / f"{name}.yaml"
        if not path.is_file():
            known = sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml"))
            raise MissingAssets(f"no recipe {name!r}; there are: {', '.join(known)}")
        return cls.model_validate(yaml.safe_load(path.read_text()))

    @property
    def hash(self) -> str:
        """sha256 of the resolved settings, in hex."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()

    def total_steps(self, rows: int) -> int:
        """Optimizer steps of a run over `rows` rows: the last window of an epoch may be short."""
        return self.epochs * math.ceil(rows / self.examples_per_step)

    def lr_at(self, step: int, total: int) -> float:
        """Learning rate of optimizer step `step` (from 0) of `total`: linear warm-up, then cosine to zero."""
        warmup = math.ceil(self.warmup_ratio * total)
        if step < warmup:
            return self.lr * step / warmup
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))

    def payload(self) -> dict[str, Any]:
        """The resolved recipe as JSON data, the way that a stage's payload carries it."""
        return self.model_dump(mode="json")
