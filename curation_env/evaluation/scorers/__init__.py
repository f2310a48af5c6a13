"""Scoring rules, one short file each: VLMEvalKit's rules, in our words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from curation_env.errors import StageFailed
from curation_env.evaluation.scorers.base import Grade, JudgeRequest, Scorer
from curation_env.evaluation.scorers.hallusion import Hallusion
from curation_env.evaluation.scorers.llavabench import LLaVABench
from curation_env.evaluation.scorers.mathvista import MathVista
from curation_env.evaluation.scorers.mcq import MultipleChoice
from curation_env.evaluation.scorers.mmbench import MMBench
from curation_env.evaluation.scorers.mmvet import MMVet
from curation_env.evaluation.scorers.ocrbench import OCRBench

if TYPE_CHECKING:
    from curation_env.evaluation.wording import Wording

SCORERS: dict[str, type[Scorer]] = {
    "hallusion": Hallusion,
    "llavabench": LLaVABench,
    "mathvista": MathVista,
    "mcq": MultipleChoice,
    "mmbench": MMBench,
    "mmvet": MMVet,
    "ocrbench": OCRBench,
}

__all__ = ["SCORERS", "Grade", "JudgeRequest", "Scorer", "make_scorer"]


def make_scorer(name: str, wording: Wording | None = None) -> Scorer:
    """Return the scorer of a rule, which asks a judge in VLMEvalKit's words where they are given.

    Raises:
        StageFailed: There is no such rule.
    """
    if name not in SCORERS:
        raise StageFailed(f"no scorer {name!r}: there are {', '.join(SCORERS)}")
    return SCORERS[name](wording)
