"""Every branch of every scoring rule, on hand-made items in the real formats."""

import json
from collections.abc import Sequence

import pytest

from curation_env.errors import StageFailed
from curation_env.evaluation.scorers import JudgeRequest, Scorer, make_scorer
from curation_env.evaluation.scorers.hallusion import strip_punctuation, yes_or_no
from curation_env.evaluation.scorers.llavabench import two_scores
from curation_env.evaluation.scorers.mcq import infer, infer_letter, infer_text
from curation_env.evaluation.suite import Item

COLORS = {"A": "red", "B": "blue", "C": "green", "D": "dark red"}


def make(index: str = "1", answer: str = "", *, category: str = "", question: str = "?", **fields: str) -> Item:
    """An item without image; columns named by one capital letter are its options."""
    options = {k: v for k, v in fields.items() if len(k) == 1}
    rest = {k.replace("__", "-"): v for k, v in fields.items() if len(k) > 1}
    return Item("Test", index, question, answer, category, (), options, rest)


def score(scorer: Scorer, items: Sequence[Item], predictions: Sequence[str]) -> float:
    return scorer.score(items, [scorer.grade(i, p, None) for i, p in zip(items, predictions, strict=True)])


def case_of(request: JudgeRequest | None) -> dict[str, str]:
    assert request is not None
    case: dict[str, str] = json.loads(request.message.split("\n")[-1])
    return case


def test_an_unknown_rule_is_named() -> None:
    with pytest.raises(StageFailed, match="no scorer 'bleu': there are hallusion"):
        make_scorer("bleu")


# HallusionBench


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Yes", "Yes"),
        ("no.", "No"),
        ("No, it is not.", "No"),
        ("The answer is: yes!", "Yes"),
        ("Answer:yes", "Unknown"),  # a colon is no punctuation to this rule
        ("yes and no", "Unknown"),
        ("yes/no", "Unknown"),
        ("", "Unknown"),
        ("maybe", "Unknown"),
        ("nothing yesterday", "Unknown"),  # whole words only
        ("no-one", "No"),  # a mark without a space beside it parts words
        ("no - one", "No"),
        ("yes,it has 1,000", "Unknown"),  # a comma between digits makes every mark vanish
        ("yes, it has 1,000", "Yes"),
        ("3.5 yes", "Yes"),
    ],
)
def test_yes_and_no(text: str, said: str) -> None:
    assert yes_or_no(text) == said


def test_full_stops_beside_digits_stay_and_only_so_many_others_go() -> None:
    assert strip_punctuation("a.b 3.5 c.") == "ab 3.5 c"
    assert strip_punctuation("x." * 40) == "x" * 32 + "x." * 8


def hallusion(answers: str) -> tuple[list[Item], list[str]]:
    """Two sets of two figures with two questions; one letter an answer: right or wrong."""
    items, predictions = [], []
    for k, letter in enumerate(answers):
        set_id, figure, question = k // 4, k // 2 % 2, k % 2
        items.append(make(f"hallusion_VD_figure_{set_id}_{figure}_{question}", "Yes", l2__category="figure"))
        predictions.append("yes" if letter == "r" else "no")
    return items, predictions


@pytest.mark.parametrize(
    ("answers", "answer", "figure", "question"),
    [
        ("rrrrrrrr", 8 / 8, 4 / 4, 4 / 4),
        ("wwwwwwww", 0, 0, 0),
        ("rrwwrrrr", 6 / 8, 3 / 4, 2 / 4),  # a figure wrong as a whole breaks both questions of its set
        ("rwrwrrrr", 6 / 8, 2 / 4, 3 / 4),  # a question wrong on both figures breaks both figures
        ("rwwrrrrr", 6 / 8, 2 / 4, 2 / 4),
    ],
)
def test_hallusion_is_the_mean_of_three_accuracies(answers: str, answer: float, figure: float, question: float) -> None:
    items, predictions = hallusion(answers)
    found = score(make_scorer("hallusion"), items, predictions)
    assert found == pytest.approx(100 * (answer + figure + question) / 3)


def test_hallusion_keeps_sets_together_and_tells_kinds_apart() -> None:
    scorer = make_scorer("hallusion")
    items, _ = hallusion("rrrrrrrr")
    assert [scorer.unit(i) for i in items] == ["figure_0"] * 4 + ["figure_1"] * 4
    assert scorer.unit(make("hallusion_VS_map_0_0_0", "Yes", l2__category="map")) == "map_0"
    twins = [make(f"hallusion_VS_{kind}_0_0_0", "Yes", l2__category=kind) for kind in ("map", "ocr")]
    assert score(scorer, twins, ["yes", "no"]) == pytest.approx(50)


def test_hallusion_refuses_an_index_that_names_no_set() -> None:
    with pytest.raises(StageFailed, match="'7' does not end in _<set>_<figure>_<question>"):
        make_scorer("hallusion").unit(make("7", "Yes"))


def test_hallusion_counts_an_unreadable_answer_as_wrong() -> None:
    scorer = make_scorer("hallusion")
    assert scorer.grade(make("h_VD_x_0_0_0", "No"), "perhaps", None)[:2] == (0.0, "Unknown")
    assert scorer.ask(make("h_VD_x_0_0_0", "No"), "perhaps") is None


# Multiple choice


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("(C) green", "C"),
        ("**D**", "D"),
        ("Answer: A", "A"),
        ("b", ""),  # small letters name no option
        ("AB", ""),
        ("E", ""),  # no such option
        ("A or B", ""),
        ("A B, so the answer is C", "C"),  # several letters: "the answer is" decides
        ("I see A thing that is rather large", ""),  # the letter is not among the last words
        ("it must be D I think", "D"),
        ("it must be D I think so", "D"),
        ("D I think that is so", ""),
        ("A thing, so the answer is B", "B"),
        ("The correct answer is **b**", "B"),
        ("the answer is E, not A or B", ""),
        ("A dog. The answer is a", "A"),
        ("Z", "Z"),
        ("Z or A", "A"),
        ("Cannot determine the answer, maybe A", "Z"),
        ("I'm sorry, but without the image provided I can't tell. B", "Z"),
        ("", ""),
    ],
)
def test_letters(text: str, letter: str) -> None:
    assert infer_letter(text, COLORS) == letter


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("Blue", "B"),
        ("it is GREEN .", "C"),
        ("dark red", ""),  # holds "red" as well
        ("red or blue", ""),
        ("yellow", ""),
        ("", ""),
        ("blue" + "." * 36, "B"),  # 40 characters, twice the options' 20 ...
        ("blue" + "." * 37, ""),  # ... is the limit
    ],
)
def test_option_texts(text: str, letter: str) -> None:
    assert infer_text(text, COLORS) == letter


def test_the_length_of_a_text_is_taken_in_small_letters() -> None:
    dotted = "\u0130"  # one letter whose small form is two characters
    assert infer_text("x" + dotted, {"A": "x", "B": "y"}) == "A"
    assert infer_text("x" + dotted * 2, {"A": "x", "B": "y"}) == ""


def test_letters_go_before_texts() -> None:
    assert infer("A, it is blue", COLORS) == "A"
    assert infer("it is blue", COLORS) == "B"


def test_multiple_choice_is_a_share_of_right_letters_and_needs_no_judge() -> None:
    scorer = make_scorer("mcq")
    items = [make(str(k), "B", **COLORS) for k in range(4)]
    assert score(scorer, items, ["B", "blue", "C", "who knows"]) == 50
    assert all(scorer.ask(item, "who knows") is None for item in items)
    assert [scorer.unit(item) for item in items] == ["0", "1", "2", "3"]


@pytest.mark.parametrize(
    ("answer", "prediction", "right"),
    [
        ("2.5", "it is 2.5 cm", True),
        ("2.5", "A", True),
        ("2.5", "3", False),
        ("2.5", "B", False),
        ("2.5", "other answers", False),
        ("B", "A", False),  # VLMEvalKit takes a lone capital for the right letter even here
        ("B", "B", True),
    ],
)
def test_open_questions_become_the_answer_or_another(answer: str, prediction: str, right: bool) -> None:
    assert make_scorer("mcq").grade(make("1", answer), prediction, None).score == right


def test_an_answer_that_is_no_letter_means_the_first_option() -> None:
    item = make("1", "red", **COLORS)
    assert make_scorer("mcq").grade(item, "A", None).score == 1


# MMBench


def family(index: int, turns: int = 4, **fields: str) -> list[Item]:
    return [make(str(index + 1_000_000 * turn), "A", **COLORS, **fields) for turn in range(turns)]


def test_mmbench_counts_families_that_are_right_as_a_whole() -> None:
    scorer = make_scorer("mmbench")
    items = [*family(3), *family(7), *family(8, turns=2)]
    assert score(scorer, items, ["A"] * 10) == 100
    assert score(scorer, items, ["A"] * 7 + ["B", "A", "A"]) == pytest.approx(200 / 3)
    assert score(scorer, items, ["A"] * 7 + ["who knows", "A", "A"]) == pytest.approx(200 / 3)
    assert score(scorer, items, ["B"] * 10) == 0


def test_mmbench_units_are_families() -> None:
    scorer = make_scorer("mmbench")
    assert {scorer.unit(i) for i in family(3)} == {"3"}
    assert {scorer.unit(i) for i in family(3, g_index="5")} == {"5"}


def test_mmbench_leaves_out_copies_without_their_first() -> None:
    items = [*family(3), *family(7)[1:]]
    assert score(make_scorer("mmbench"), items, ["A"] * 4 + ["B"] * 3) == 100


# OCRBench


@pytest.mark.parametrize(
    ("category", "answer", "prediction", "right"),
    [
        ("Regular Text Recognition", "['Stop']", "the sign says STOP.", True),
        ("Regular Text Recognition", "['Stop']", "st op", False),
        ("Regular Text Recognition", "['a', 'Stop here']", "stop\nhere", True),
        ("Regular Text Recognition", "['first\\nsecond']", "first second", True),
        ("Doc-oriented VQA", "['$ 5', ' five ']", "Five dollars", True),
        ("Doc-oriented VQA", "[5]", "15", True),
        ("Key Information Extraction", "['x']", "", False),
        ("Handwritten Mathematical Expression Recognition", "['x ^ 2 + y']", "x^2+ y", True),
        ("Handwritten Mathematical Expression Recognition", "['X ^ 2']", "x^2", False),  # case matters here
        ("Handwritten Mathematical Expression Recognition", "['x\\n^ 2']", "x\n^2", True),
    ],
)
def test_ocr(category: str, answer: str, prediction: str, right: bool) -> None:
    scorer = make_scorer("ocrbench")
    item = make("1", answer, category=category)
    assert scorer.grade(item, prediction, None).score == right
    assert scorer.ask(item, prediction) is None


# MathVista


def math(answer: str, kind: str, choices: str = "", option: str = "") -> Item:
    fields = {"question_type": "multi_choice" if choices else "free_form", "answer_type": kind}
    fields |= {"choices": choices, "answer_option": option} if choices else {}
    return make("1", answer, question="how many ?", **fields)


NUMBER, DECIMAL, ZERO, LIST = math("3", "integer"), math("2.5", "float"), math("0", "integer"), math("[1, 2]", "list")
CHOICE = math("blue", "text", "['red', 'blue', 10]", "B")


@pytest.mark.parametrize(
    ("item", "prediction", "verdict", "right"),
    [
        (NUMBER, "3", None, True),  # the rules read it: nothing is asked
        (NUMBER, " 3 ", None, True),
        (NUMBER, "there are 3", "3", True),
        (NUMBER, "4", "4", False),  # read but wrong: the judge is asked all the same
        (NUMBER, "4", "3", True),
        (NUMBER, "3.0", "3.0", False),  # an integer must be written as one
        (NUMBER, "three", "three", False),
        (NUMBER, "", "", False),
        (DECIMAL, "2.50", None, True),
        (DECIMAL, "2.5 cm", "2.5", True),
        (DECIMAL, "nan", "nan", False),
        (ZERO, "0", "0", True),  # a right zero is asked about: the rule tests the value's truth
        (LIST, "[1, 2]", "[1, 2]", False),  # the rule compares an empty result: no list is ever right
        (math("red", "text"), "red", "red", False),
        (math("many", "integer"), "3", "3", False),  # a malformed reference
        (CHOICE, "B", None, True),
        (CHOICE, "it is blue", None, True),
        (CHOICE, "red", None, False),  # an option that is named settles it, right or wrong
        (CHOICE, "10", None, False),
        (CHOICE, "Cannot determine the answer", None, False),
        (CHOICE, "the second", "B", True),
        (CHOICE, "the second", "blue", True),
        (CHOICE, "the second", "no idea", False),
    ],
)
def test_mathvista(item: Item, prediction: str, verdict: str | None, right: bool) -> None:
    scorer = make_scorer("mathvista")
    assert (scorer.ask(item, prediction) is None) == (verdict is None)
    assert scorer.grade(item, prediction, verdict).score == right


def test_mathvista_does_not_tell_the_judge_the_answer() -> None:
    request = make_scorer("mathvista").ask(NUMBER, "there are 7")
    assert case_of(request) == {
        "question": "how many ?", "reference": "", "prediction": "there are 7", "rule": "mathvista"
    }  # fmt: skip
    assert request is not None
    assert request.accept("whatever it says")


# MMVet


def test_mmvet_takes_the_judges_number() -> None:
    scorer = make_scorer("mmvet")
    item = make("v1_0", "red<AND>circle<OR>ball", question="what ?")
    request = scorer.ask(item, "a red thing")
    assert case_of(request) == {
        "question": "what ?", "reference": "red <AND> circle <OR> ball", "prediction": "a red thing", "rule": "mmvet"
    }  # fmt: skip
    grades = [scorer.grade(item, "a red thing", verdict) for verdict in ("0.4", "1", " 1.0 ")]
    assert [grade.score for grade in grades] == [0.4, 1.0, 1.0]
    assert scorer.score([item] * 3, grades) == pytest.approx(80)


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("0", True),
        ("1.0", True),
        (" 0.3\n", True),
        ("1.1", False),
        ("-0.1", False),
        ("nan", False),
        ("0.5 or so", False),
        ("", False),
    ],
)
def test_mmvet_accepts_numbers_from_0_to_1(text: str, good: bool) -> None:
    request = make_scorer("mmvet").ask(make("v1_0", "red"), "red")
    assert request is not None
    assert request.accept(text) == good


# LLaVABench


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        ("9 7", (9.0, 7.0)),
        ("9,7\nbecause", (9.0, 7.0)),
        ("8.5 10\n", (8.5, 10.0)),
        ("9, 7", None),  # VLMEvalKit splits at every single space
        ("9", None),
        ("9 7 8", None),
        ("nine seven", None),
        ("\n9 7", None),
    ],
)
def test_two_scores(text: str, pair: tuple[float, float] | None) -> None:
    assert two_scores(text) == pair


def test_llavabench_is_the_ratio_of_mean_ratings() -> None:
    scorer = make_scorer("llavabench")
    item = make("1", "a dog", category="conv", question="what ?", gpt4_ans="a dog runs", caption="A dog {runs}.")
    request = scorer.ask(item, "a cat")
    assert request is not None
    assert "Context: A dog {runs}." in request.message
    assert case_of(request) == {
        "question": "what ?", "reference": "a dog runs", "prediction": "a cat", "rule": "llavabench"
    }  # fmt: skip
    assert all(request.accept(text) for text in ("9 7", "9 0"))
    assert not any(request.accept(text) for text in ("0 7", "-1 -1", "inf 9", "9 nan", "good"))
    grades = [scorer.grade(item, "a cat", verdict) for verdict in ("8 4\nshort", "10 2")]
    assert [(g.score, g.extra) for g in grades] == [(0.4, 0.8), (0.2, 1.0)]
    assert scorer.score([item] * 2, grades) == pytest.approx(100 * 6 / 18)
