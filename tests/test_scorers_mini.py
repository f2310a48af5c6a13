"""The miniature's suite through prompts, rules and rubric: its real files, read back."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from curation_env.evaluation.scorers import SCORERS, make_scorer
from curation_env.evaluation.suite import Benchmark, Item, Suite, read_items
from curation_env.mini import judge as rubric
from curation_env.mini.suite import Item as Made
from curation_env.mini.suite import build_suite, suite_items
from curation_env.mini.world import NANO
from curation_env.task import Task


def test_a_choice_prompt_is_laid_out_as_llava_is_asked() -> None:
    item = Item("T", "1", "which ?", "A", "", (), {"A": "red", "B": "blue"}, {"hint": "Look up."})
    closing = "Answer with the option's letter from the given choices directly."
    assert item.prompt("choice") == f"Look up.\nwhich ?\nA. red\nB. blue\n{closing}"
    assert Item("T", "1", "how many ?", "3", "", ()).prompt("choice") == "how many ?\nAnswer the question directly."
    assert item.prompt("open") == "which ?"


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Item]]:
    folder: Path = tmp_path_factory.mktemp("suite")
    build_suite(folder, NANO)
    return {name: read_items(folder / f"{name}.tsv", name) for name in suite_items(NANO)}


SUITE = Suite.model_validate(Task.load("nano").suite_config)


def graded(benchmark: Benchmark, items: Sequence[Item], predictions: Sequence[str]) -> float:
    """Score with the miniature's own rubric as judge; every answer of it must be acceptable."""
    scorer, grades = make_scorer(benchmark.scorer), []
    for item, prediction in zip(items, predictions, strict=True):
        request = scorer.ask(item, prediction)
        assert request is None or benchmark.judge
        verdict = rubric.answer(request.message) if request is not None else None
        assert request is None or (verdict is not None and request.accept(verdict))
        grades.append(scorer.grade(item, prediction, verdict))
    return scorer.score(items, grades)


@pytest.mark.parametrize("name", SUITE.benchmarks)
def test_the_miniatures_prompts_are_what_its_pool_teaches(name: str, suite: dict[str, list[Item]]) -> None:
    assert [i.prompt(SUITE.benchmarks[name].prompt) for i in suite[name]] == [i.prompt for i in suite_items(NANO)[name]]


def recognised(item: Made) -> bool:
    """VLMEvalKit takes an option's text for an answer only where no other option is part of it: "16" holds "6"."""
    options = [str(item.columns[key]) for key in "ABCD" if key in item.columns]
    return sum(option in item.gold for option in options) == 1


@pytest.mark.parametrize("name", SUITE.benchmarks)
def test_true_answers_get_full_marks_and_none_get_nothing(name: str, suite: dict[str, list[Item]]) -> None:
    benchmark, items = SUITE.benchmarks[name], suite[name]
    made = suite_items(NANO)[name]
    told = [recognised(i) for i in made] if benchmark.scorer == "mcq" else [True]
    assert graded(benchmark, items, [i.gold for i in made]) == pytest.approx(100 * sum(told) / len(told))
    assert sum(told) >= 0.95 * len(told)
    assert graded(benchmark, items, [""] * len(items)) == pytest.approx(
        100 / 9 if benchmark.scorer == "llavabench" else 0
    )


def test_every_rule_is_used_by_the_miniature() -> None:
    assert {benchmark.scorer for benchmark in SUITE.benchmarks.values()} == set(SCORERS)
