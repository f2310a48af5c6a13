"""What the audit looks for and what it does about it: one small versioned YAML file per suite."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from curation_env.errors import CurationError
from curation_env.pool import canonical_json

Kind = Literal["image", "question", "answer", "image+question", "image+answer", "rewrite"]
Action = Literal["block", "warn", "expected"]
KINDS: tuple[Kind, ...] = ("image", "question", "answer", "image+question", "image+answer", "rewrite")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TextRules(_Strict):
    """When two texts are called the same (see `audit/text.py` for the measures)."""

    long_words: int = Field(default=8, ge=2, description="from this length on, word shingles; below, character n-grams")
    shingle_words: int = Field(
        default=2, ge=1, description="longest word shingle, in words; shorter ones are used as well"
    )
    ngram: int = Field(default=4, ge=2, description="length of a character n-gram")
    similarity: float = Field(
        default=0.6, gt=0, le=1, description="near-duplicate: share of the item's bits that the row has"
    )
    paired_similarity: float = Field(default=0.8, gt=0, le=1, description="the same, where the image matches already")
    margin_bits: float = Field(
        default=8.0, description="a chance match of one item in a whole pool is 2^-bits likely at most"
    )
    near_margin_bits: float = Field(
        default=12.0, description="the same for a near-duplicate, whose words match in any order"
    )
    paired_bits: float = Field(default=10.0, ge=0, description="bits an answer must be worth where the image matches")
    max_contexts: int = Field(
        default=3, ge=1, description="a text seen with more images or dialogues is a stock phrase"
    )
    answer_words: int = Field(default=5, ge=1, description="shorter answers never match on their own")


class ImageRules(_Strict):
    """When two images are called the same (see `audit/image.py` for the measures)."""

    radius: int = Field(
        default=12, ge=0, le=32, description="Hamming distance of perceptual hashes of a candidate, of 64"
    )
    floor: float = Field(default=3.0, ge=0, description="contrast in grey levels under which a picture has no content")
    gain: float = Field(default=1.25, ge=1, description="strongest change of a channel's contrast in a recoloured copy")
    offset: float = Field(default=16.0, ge=0, description="strongest change of a channel's brightness, in grey levels")
    lightness: float = Field(
        default=2.6, gt=0, description="largest difference in lightness, root mean square grey levels"
    )
    share: float = Field(default=0.16, gt=0, description="the same as a share of the picture's contrast")
    colour: float = Field(default=40.0, gt=0, description="largest difference of a block's mean colour, in grey levels")


class AuditRules(_Strict):
    """One rule file.

    `benchmarks` maps each benchmark of the suite to an action for every kind: `block` rejects the row, `warn` counts
    it in the certificate, `expected` counts it beside the pool's base rate (a pool that shares images with a benchmark
    by construction).
    """

    name: str
    version: int = Field(ge=1)
    text: TextRules = TextRules()
    image: ImageRules = ImageRules()
    benchmarks: dict[str, dict[Kind, Action]]

    @model_validator(mode="after")
    def _complete(self) -> AuditRules:
        for benchmark, actions in self.benchmarks.items():
            if missing := [kind for kind in KINDS if kind not in actions]:
                raise ValueError(f"{benchmark} has no action for {', '.join(missing)}")
        return self

    @classmethod
    def load(cls, path: str | Path) -> AuditRules:
        """Read a rule file.

        Raises:
            CurationError: The file is not there or breaks the schema; the message names file and field.
        """
        import yaml

        try:
            return cls.model_validate(yaml.safe_load(Path(path).read_text()))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise CurationError(f"audit rules {path}: {error}") from error

    def action(self, benchmark: str, kind: Kind) -> Action:
        """Return what to do about `kind`; a benchmark that the file doesn't name is an error, never a pass."""
        try:
            return self.benchmarks[benchmark][kind]
        except KeyError:
            raise CurationError(
                f"audit rules {self.name} say nothing about benchmark {benchmark}: add it to the rule file"
            ) from None

    @property
    def digest(self) -> str:
        """blake2b-128 of the rules in hex: part of every certificate."""
        return hashlib.blake2b(canonical_json(self.model_dump()).encode(), digest_size=16).hexdigest()


def as_rules(rules: AuditRules | dict[str, Any]) -> AuditRules:
    """Accept rules as a model or as the dict that a YAML loader returns."""
    return rules if isinstance(rules, AuditRules) else AuditRules.model_validate(rules)
