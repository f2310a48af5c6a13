"""HallusionBench: yes/no questions in sets; the mean of accuracy by answer, by figure and by question."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

from curation_env.errors import StageFailed
from curation_env.evaluation.scorers.base import Grade, Scorer
from curation_env.evaluation.suite import Item

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_MAX_PERIODS = 32  # VLMEvalKit passes a flag where the count goes: only so many full stops are removed


def strip_punctuation(text: str) -> str:
    """Remove or blank punctuation as VQA's evaluation does: a mark beside a space vanishes, else it becomes one."""
    digits = re.search(r"\d,\d", text) is not None
    stripped = text
    for mark in _PUNCTUATION:
        beside = f"{mark} " in text or f" {mark}" in text
        stripped = stripped.replace(mark, "" if beside or digits else " ")
    return re.sub(r"(?<!\d)\.(?!\d)", "", stripped, count=_MAX_PERIODS)


def yes_or_no(text: str) -> str:
    """Return "Yes", "No", or "Unknown" when the words of the text hold both or neither."""
    words = strip_punctuation(text.lower()).split()
    if ("yes" in words) == ("no" in words):
        return "Unknown"
    return "Yes" if "yes" in words else "No"


class Hallusion(Scorer):
    """Mean of aAcc (answers), fAcc (figures with every question right), qAcc (questions right on every figure).

    An index ends in `_<set>_<figure>_<question>` at its fourth to sixth part; a unit is a set.
    """

    def _place(self, item: Item) -> tuple[str, str, str, str]:
        parts = item.index.split("_")
        if len(parts) < 6:
            raise StageFailed(f"index {item.index!r} does not end in _<set>_<figure>_<question>")
        return (item.fields.get("l2-category", ""), parts[3], parts[4], parts[5])

    def unit(self, item: Item) -> str:
        return "_".join(self._place(item)[:2])

    def grade(self, item: Item, prediction: str, verdict: str | None) -> Grade:
        said = yes_or_no(prediction)
        return Grade(float(said == item.answer), said)

    def score(self, items: Sequence[Item], grades: Sequence[Grade]) -> float:
        figures: dict[tuple[str, ...], list[bool]] = defaultdict(list)
        questions: dict[tuple[str, ...], list[bool]] = defaultdict(list)
        for item, grade in zip(items, grades, strict=True):
            kind, set_id, figure, question = self._place(item)
            figures[kind, set_id, figure].append(grade.score == 1)
            questions[kind, set_id, question].append(grade.score == 1)
        shares = [super().score(items, grades)]
        shares += [100 * sum(map(all, units.values())) / len(units) for units in (figures, questions)]
        return sum(shares) / 3
