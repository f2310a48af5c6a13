"""OCRBench: an item is right when the prediction holds one of the accepted texts."""

from __future__ import annotations

import ast

from curation_env.evaluation.scorers.base import Grade, Scorer
from curation_env.evaluation.suite import Item

_FORMULA = "Handwritten Mathematical Expression Recognition"


class OCRBench(Scorer):
    """Share of items (the usual score, out of 1,000, over 1,000 items). Formulas are compared without spaces."""

    def _normal(self, text: str, formula: bool) -> str:
        if formula:
            return text.strip().replace("\n", " ").replace(" ", "")
        return text.lower().strip().replace("\n", " ")

    def grade(self, item: Item, prediction: str, verdict: str | None) -> Grade:
        formula = item.category == _FORMULA
        accepted = [self._normal(str(text), formula) for text in ast.literal_eval(item.answer)]
        said = self._normal(prediction, formula)
        return Grade(float(any(text in said for text in accepted)), said)
