"""Multiple choice (MMMU, MMStar): the letter or the option that a prediction names, found by rules alone."""

from __future__ import annotations

import re
import string

from curation_env.evaluation.scorers.base import Grade, Scorer
from curation_env.evaluation.suite import Item

_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_NO_ANSWER = "Failed to obtain answer via API"  # what VLMEvalKit writes in place of one: it names no letter
_MARKS = re.compile(r"[.()\[\],:;!*#{}]")
_STATED = re.compile(r"(?:correct\s+)?answer\s+is\s+\**([ABCD])\**", re.IGNORECASE)


def infer_letter(answer: str, options: dict[str, str]) -> str:
    """Return the letter that the words of an answer name; "Z" for a refusal, "" when no one letter can be told.

    A single letter must stand among the last five words. "The answer is X" decides where several letters occur.
    """
    if _NO_ANSWER in answer:
        return ""
    if any(refusal in answer for refusal in _REFUSALS):
        return "Z"
    words = _MARKS.sub(" ", answer).split()
    named = [letter for letter in options if letter in words]
    if len(named) == 1 and words.index(named[0]) > len(words) - 5:
        return named[0]
    if not named and "Z" in words:
        return "Z"
    stated = _STATED.search(answer)
    if stated and stated.group(1).upper() in options:
        return stated.group(1).upper()
    return ""


def infer_text(answer: str, options: dict[str, str]) -> str:
    """Return the letter of the one option whose text an answer holds; "" when none or several, or it is too long."""
    answer = answer.lower()
    if len(answer) > 2 * sum(map(len, options.values())):
        return ""
    found = [letter for letter, text in options.items() if text.lower() in answer]
    return found[0] if len(found) == 1 else ""


def infer(answer: str, options: dict[str, str]) -> str:
    """Return the letter that an answer means by its letters, else by its text; "" when it can't be told."""
    return infer_letter(answer, options) or infer_text(answer, options)


class MultipleChoice(Scorer):
    """Share of right letters.

    A question without options (MMMU has some) becomes "the answer, or other answers". As in VLMEvalKit's MMMU, an
    answer that is one capital letter is the right letter even there, and any other answer means the first option.
    """

    def grade(self, item: Item, prediction: str, verdict: str | None) -> Grade:
        options = item.options
        if "A" not in options:
            options = {**options, "A": item.answer, "B": "Other Answers"}
        right = item.answer if item.answer in [*string.ascii_uppercase] else "A"
        said = infer(prediction, options)
        return Grade(float(said == right), said)
