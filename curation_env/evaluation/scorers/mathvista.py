"""MathVista: the final answer, read by rules where they suffice and extracted by the judge where not."""

from __future__ import annotations

import ast

from curation_env.evaluation.scorers.base import Grade, JudgeRequest, Scorer, judge_message
from curation_env.evaluation.scorers.mcq import infer
from curation_env.evaluation.suite import Item

MAX_TOKENS = 128  # of an answer that is read out
_INSTRUCTION = (
    "Read the final answer out of a response to a question. Reply with that answer and nothing else: the letter of an "
    "option where the question has options, a number in the form that the question asks for, a list in brackets where "
    "it asks for one. The case, as JSON:"
)


class MathVista(Scorer):
    """Share of right answers, each compared by its question's and answer's type.

    The judge is asked only where the response itself is not the answer: as in VLMEvalKit, a response that the rules
    can read but that is wrong goes to the judge too, unless it names an option.
    """

    def _options(self, item: Item) -> dict[str, str]:
        choices = ast.literal_eval(item.fields["choices"])
        return {chr(ord("A") + k): str(text) for k, text in enumerate(choices)}

    def _read(self, item: Item, text: str) -> tuple[bool, str]:
        """Whether `text` is the right answer, and what it was read as ("" when the rules can't tell)."""
        if item.fields["question_type"] == "multi_choice":
            letter = infer(text, self._options(item))
            return letter == item.fields["answer_option"], letter
        kinds = {"integer": int, "float": float}
        kind = kinds.get(item.fields["answer_type"])
        if kind is None:  # lists and texts: VLMEvalKit compares the answer with an empty result, so none is ever right
            return False, text
        try:
            return kind(text) == kind(item.answer), text.strip()
        except ValueError:
            return False, ""

    def _settled(self, item: Item, prediction: str) -> bool:
        right, read = self._read(item, prediction)
        if item.fields["question_type"] == "multi_choice":
            return read != ""
        return right and float(read) != 0  # a right "0" is asked about as well: the rule tests the value's truth

    def ask(self, item: Item, prediction: str) -> JudgeRequest | None:
        if self._settled(item, prediction):
            return None
        if self.wording is not None:
            message = self.wording.message("mathvista", item, prediction)
        else:  # no reference: who reads an answer out must not know the right one
            message = judge_message(
                _INSTRUCTION, question=item.question, reference="", prediction=prediction, rule="mathvista"
            )
        return JudgeRequest(message, lambda text: True, max_tokens=MAX_TOKENS)

    def grade(self, item: Item, prediction: str, verdict: str | None) -> Grade:
        right, read = self._read(item, prediction if verdict is None else verdict)
        return Grade(float(right), read)
