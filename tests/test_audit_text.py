"""Text matching: what counts as the same text, and what is chance or a stock phrase."""

from __future__ import annotations

import pytest
from audit_support import chatter, turn
from hypothesis import given
from hypothesis import strategies as st

from curation_env.audit.rules import TextRules
from curation_env.audit.text import ItemText, Surprise, TextIndex, segments, words

QUESTION = "Which of the two ferries will reach the northern island before the captain's dinner is served?"
OPTIONS = "The one with the green funnel\nThe one that carries mail"
ANSWER = "The ferry with the green funnel arrives first because it leaves the harbor an hour earlier."


def index(rows: int = 400, extra: tuple[str, ...] = ()) -> TextIndex:
    item = ItemText(0, words(QUESTION), words(QUESTION + "\n" + OPTIONS), words(ANSWER))
    plain = ItemText(1, words("What color is the lantern?"), words("What color is the lantern?"), words("green"))
    forms = [form for text in (item, plain) for _, form, _ in text.forms()]
    surprise = Surprise(forms, discount=TextRules().max_contexts)
    for row in chatter(rows):
        surprise.add([words(text) for t in row["conversation"] for text in t.values()])
    for text in extra:
        surprise.add([words(text)])
    return TextIndex([item, plain], surprise, TextRules())


def found(*turns: dict[str, str], **options: int) -> set[tuple[int, str, bool]]:
    return {(match.item, match.field, match.exact) for match in index(**options).match(segments(list(turns)))}


@pytest.mark.parametrize(
    "user",
    [
        QUESTION.upper(),
        f"Look closely.\n{QUESTION}\nAnswer in one word.",
        f"I have been wondering about this for a while. {QUESTION}",
        f"{QUESTION}\nA. The one with the green funnel\nB. The one that carries mail\nAnswer with the letter.",
        "Which of the three ferries will reach the northern island before the captain's supper is served?",
        "Before the captain's dinner is served, which of the two ferries will reach the northern island?",
    ],
    ids=["case", "between lines", "in a sentence", "options", "two words changed", "clauses reordered"],
)
def test_a_restated_question_is_found(user: str) -> None:
    assert (0, "question") in {(item, field) for item, field, _ in found(turn(user, "The first."))}


def test_a_question_split_over_two_turns_is_found() -> None:
    first, second = QUESTION[:45], QUESTION[45:]
    matches = found(turn(first, "Go on."), turn(second, "The green one."))
    assert (0, "question") in {(item, field) for item, field, _ in matches}


def test_a_question_put_as_an_answer_is_found() -> None:
    matches = found(turn("Ask me something.", QUESTION))
    assert (0, "question") in {(item, field) for item, field, _ in matches}


def test_an_answer_is_found_where_an_answer_stands() -> None:
    assert (0, "answer", True) in found(turn("What is going on here?", ANSWER))
    assert not found(turn(ANSWER, "I see."))


def test_a_question_without_its_options_is_near_not_exact() -> None:
    assert (0, "question", False) in found(turn(QUESTION, "The first."))
    assert (0, "question", True) in found(turn(f"{QUESTION}\nA. {OPTIONS.replace(chr(10), chr(10) + 'B. ')}", "A"))


def test_templated_and_unlike_texts_match_nothing() -> None:
    assert not found(turn("What color is the lantern?", "green"))
    assert not found(turn("Which of the two roads leads to the market?", "The left one."))
    assert not any(found(*row["conversation"]) for row in chatter(30, seed=9))


def test_a_text_that_many_rows_have_is_no_evidence() -> None:
    assert not found(turn(QUESTION, "The first."), extra=(QUESTION + " " + OPTIONS,) * 40)


def test_one_by_one_and_together_give_the_same() -> None:
    rows = [segments(row["conversation"]) for row in chatter(40, seed=3)] + [segments([turn(QUESTION, ANSWER)])]
    together, alone = index(), index()
    together.prepare(rows)
    assert [together.match(row) for row in rows] == [alone.match(row) for row in rows]


@given(st.lists(st.tuples(st.text(max_size=40), st.text(max_size=40)), min_size=1, max_size=4))
def test_any_text_can_be_cut_into_segments(turns: list[tuple[str, str]]) -> None:
    pieces = segments([turn(*texts) for texts in turns])
    assert len({(piece.role, piece.words) for piece in pieces}) == len(pieces)
    assert all(word == word.casefold() and word for piece in pieces for word in piece.words)
