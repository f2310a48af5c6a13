"""The split: what belongs together stays together, every category is halved, and files alone decide."""

from __future__ import annotations

import io
import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from evaluation_support import SUITE, benchmark, make_suite
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from training_support import png

from curation_env.evaluation.scorers import make_scorer
from curation_env.evaluation.split import connected, split_items
from curation_env.evaluation.suite import Item, Suite, read_split, read_suite

PLAIN = Suite.model_validate(
    {
        "name": "plain",
        "benchmarks": {
            "One": benchmark("One.tsv", "mcq"),
            "Two": benchmark("Two.tsv", "mmbench"),
            "Whole": benchmark("Whole.tsv", "mcq", sealed=False),
        },
    }
)

RAW = st.tuples(
    st.sampled_from(["One", "Two", "Whole"]), st.integers(0, 40), st.integers(0, 30), st.sampled_from(["x", "y"])
)


@settings(max_examples=60, deadline=None)
@given(st.lists(RAW, min_size=1, max_size=80, unique_by=lambda raw: raw[:2]))
def test_groups_are_never_cut(raw: list[tuple[str, int, int, str]]) -> None:
    items: dict[str, list[Item]] = {"One": [], "Two": [], "Whole": []}
    for name, index, question, category in raw:
        number = index % 10 + 1_000_000 * (index // 10) if name == "Two" else index
        items[name].append(Item(name, str(number), f"question {question}", "A", category, ()))
    split = split_items(items, PLAIN)
    flat = [item for rows in items.values() for item in rows]
    assert all(item.index in split[item.benchmark] for item in flat)
    parts: dict[str, set[str]] = defaultdict(set)
    for rows in split.values():
        for part, group in rows.values():
            parts[group].add(part)
    assert all(len(found) == 1 for found in parts.values())
    assert all(part == "feedback" for part, _ in split["Whole"].values())
    asked = Counter(item.question for item in flat)
    by_question: dict[str, set[str]] = defaultdict(set)
    by_family: dict[str, set[str]] = defaultdict(set)
    for item in flat:
        group = split[item.benchmark][item.index][1]
        if asked[item.question] <= 3:
            by_question[item.question].add(group)
        if item.benchmark == "Two":
            by_family[make_scorer("mmbench").unit(item)].add(group)
    assert all(len(groups) == 1 for groups in (*by_question.values(), *by_family.values()))
    shuffled = {name: rows[::-1] for name, rows in reversed(items.items())}
    assert split_items(shuffled, PLAIN) == split


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(["x", "y", "z"]), min_size=1, max_size=100))
def test_lone_items_halve_every_category(categories: list[str]) -> None:
    items = {"One": [Item("One", str(k), f"question {k}", "A", c, ()) for k, c in enumerate(categories)]}
    split = split_items(items, Suite(name="one", benchmarks={"One": PLAIN.benchmarks["One"]}))
    for category, n in Counter(categories).items():
        of = [split["One"][str(k)][0] for k, c in enumerate(categories) if c == category]
        assert abs(of.count("feedback") - n / 2) <= 0.5


def test_near_equal_pictures_belong_together_and_others_do_not() -> None:
    rng = np.random.default_rng(0)

    def picture(noise: int, seed: int) -> bytes:
        base = np.random.default_rng(seed).integers(0, 255, (8, 8, 3)).repeat(8, 0).repeat(8, 1)
        pixels = np.clip(base + rng.integers(-noise, noise + 1, base.shape), 0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        return buffer.getvalue()

    pictures = {
        "a": picture(0, 1),
        "a again": picture(4, 1),
        "b": picture(0, 2),
        "blank": png("red"),
        "blank 2": png("blue"),
    }
    items = {"One": [Item("One", name, f"about {name}", "A", "", (data,)) for name, data in pictures.items()]}
    split = split_items(items, Suite(name="one", benchmarks={"One": PLAIN.benchmarks["One"]}))["One"]
    assert split["a"] == split["a again"]
    assert len({split[name][1] for name in ("a", "b", "blank", "blank 2")}) == 4


def test_components() -> None:
    found = connected(6, [("k", 0), ("k", 3), ("j", 4)], [(3, 5)])
    assert found[0] == found[3] == found[5]
    assert len({found[0], found[1], found[2], found[4]}) == 4


def test_a_suite_is_split_once_by_its_files(tmp_path: Path) -> None:
    suite = make_suite(tmp_path / "a")
    make_suite(tmp_path / "b")
    assert (tmp_path / "a/split.json").read_bytes() == (tmp_path / "b/split.json").read_bytes()
    items = read_suite(tmp_path / "a", suite)
    split = read_split(tmp_path / "a", items)
    for name, rows in items.items():
        parts = Counter(split[name][item.index][0] for item in rows)
        if SUITE["benchmarks"][name]["sealed"]:
            assert abs(parts["feedback"] - parts["sealed"]) <= 4
    assert json.loads((tmp_path / "a/split.json").read_text())["suite"] == "toy"
