"""What a scoring rule is: from a prediction to a grade, from grades to a percentage."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from curation_env.evaluation.suite import Item

if TYPE_CHECKING:
    from curation_env.evaluation.wording import Wording


class Grade(NamedTuple):
    """What one prediction is worth: 0 to 1, what was read out of it, and what else the score needs."""

    score: float
    extracted: str = ""
    extra: float = 0.0


class JudgeRequest(NamedTuple):
    """A question to the judge and the test that its answer must pass: one that fails is asked for again.

    Attributes:
        message: The user message. system: the system message before it, where there is one.
        temperature: Of the first attempt.
        max_tokens: The longest answer.
    """

    message: str
    accept: Callable[[str], bool]
    system: str = ""
    temperature: float = 0.0
    max_tokens: int = 2048


class Scorer(ABC):
    """One rule. An item is graded alone; a score may need whole units of items.

    Args:
        wording: VLMEvalKit's words for the judge; ours where it is None.
    """

    def __init__(self, wording: Wording | None = None) -> None:
        self.wording = wording

    def unit(self, item: Item) -> str:
        """Items of one unit are scored together, so they are never split."""
        return item.index

    def ask(self, item: Item, prediction: str) -> JudgeRequest | None:
        """What the judge must say before the prediction can be graded; None when rules are enough."""
        return None

    @abstractmethod
    def grade(self, item: Item, prediction: str, verdict: str | None) -> Grade:
        """Grade a prediction; `verdict` is the judge's accepted answer, where one was asked for."""

    def score(self, items: Sequence[Item], grades: Sequence[Grade]) -> float:
        """Percent over items (whole units, at least one)."""
        return 100 * sum(grade.score for grade in grades) / len(grades)


def judge_message(instruction: str, *, question: str, reference: str, prediction: str, rule: str) -> str:
    """The judge's user message: what to do, and the case as one line of JSON at the end."""
    case: dict[str, Any] = {"question": question, "reference": reference, "prediction": prediction, "rule": rule}
    return f"{instruction}\n\n{json.dumps(case, ensure_ascii=False)}"
