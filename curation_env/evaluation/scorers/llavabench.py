"""LLaVABench: the judge scores the reference answer and the student's, 1 to 10; their ratio counts."""

from __future__ import annotations

import math
from collections.abc import Sequence

from curation_env.evaluation.scorers.base import Grade, JudgeRequest, Scorer, judge_message
from curation_env.evaluation.suite import Item

TEMPERATURE = 0.2  # VLMEvalKit's for this benchmark alone
_INSTRUCTION = (
    "Two assistants answered a question about an image that the context describes. Assistant 1 gave the reference, "
    "assistant 2 the prediction. Rate how helpful, relevant, accurate and detailed each answer is, from 1 to 10. "
    "Reply with a first line that holds the two ratings alone, assistant 1 first, separated by a space; you may "
    "explain them on the lines after it. The order of the answers must not matter.\n\nContext: {context}\n\n"
    "The case, as JSON:"
)


def two_scores(text: str) -> tuple[float, float] | None:
    """The two numbers of a review's first line, None when it has not just those."""
    parts = text.split("\n")[0].replace(",", " ").split(" ")
    try:
        first, second = (float(part) for part in parts)
    except ValueError:
        return None
    return first, second


def _acceptable(text: str) -> bool:
    scores = two_scores(text)
    return scores is not None and all(map(math.isfinite, scores)) and scores[0] > 0 and scores[1] >= 0


class LLaVABench(Scorer):
    """Relative score: the mean of the student's ratings over the mean of the reference's."""

    def ask(self, item: Item, prediction: str) -> JudgeRequest:
        if self.wording is not None:
            message, system = self.wording.message("llavabench", item, prediction), self.wording.llavabench_system
            return JudgeRequest(message, _acceptable, system, temperature=TEMPERATURE)
        message = judge_message(
            _INSTRUCTION.format(context=item.fields.get("caption", "")),
            question=item.question,
            reference=item.fields["gpt4_ans"],
            prediction=prediction,
            rule="llavabench",
        )
        return JudgeRequest(message, _acceptable, temperature=TEMPERATURE)

    def grade(self, item: Item, prediction: str, verdict: str | None) -> Grade:
        scores = two_scores(verdict or "")
        assert scores is not None
        return Grade(scores[1] / 10, f"{scores[1]:g}", scores[0] / 10)

    def score(self, items: Sequence[Item], grades: Sequence[Grade]) -> float:
        return 100 * sum(grade.score for grade in grades) / sum(grade.extra for grade in grades)
