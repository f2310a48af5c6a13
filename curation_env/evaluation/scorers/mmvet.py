"""MMVet: open answers, each graded from 0 to 1 by the judge."""

from __future__ import annotations

from curation_env.evaluation.scorers.base import Grade, JudgeRequest, Scorer, judge_message
from curation_env.evaluation.suite import Item

_INSTRUCTION = (
    "Grade an answer to a question about an image against the reference. Elements of the reference that are joined by "
    "<AND> must all be present for full marks; of those joined by <OR>, one is enough. Reply with one number and "
    "nothing else: 0.0 for a wrong answer, 1.0 for a right one, in steps of 0.1 for what lies between. "
    "The case, as JSON:"
)


def number(text: str) -> float | None:
    """The number that a text is, None when it is none."""
    try:
        return float(text)
    except ValueError:
        return None


def _acceptable(text: str) -> bool:
    value = number(text)
    return value is not None and 0 <= value <= 1


class MMVet(Scorer):
    """Mean grade."""

    def ask(self, item: Item, prediction: str) -> JudgeRequest:
        return JudgeRequest(self._message(item, prediction), _acceptable)

    def _message(self, item: Item, prediction: str) -> str:
        if self.wording is not None:
            return self.wording.message("mmvet", item, prediction)
        reference = item.answer.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
        return judge_message(
            _INSTRUCTION, question=item.question, reference=reference, prediction=prediction, rule="mmvet"
        )

    def grade(self, item: Item, prediction: str, verdict: str | None) -> Grade:
        assert verdict is not None
        return Grade(float(verdict), verdict.strip())
