"""The generator: worlds, pools and the suite are what they say, and the same everywhere."""

import base64
import csv
import functools
import importlib.util
import io
import math
import operator
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from curation_env.assets import prepared
from curation_env.errors import TaskMismatch
from curation_env.mini import world as world_module
from curation_env.mini.fingerprint import check_fingerprint
from curation_env.mini.language import CATEGORY, draw_clip_art
from curation_env.mini.pool import build_pool, world_rows
from curation_env.mini.questions import CLIP_ART_FORMS, FORMS, ask, draw_ask
from curation_env.mini.render import (
    CONTENTS,
    SIDE,
    ClipArt,
    alter,
    clip_art_set,
    encode_png,
    patches,
    pixels,
    resample,
)
from curation_env.mini.student import count_supervised, vocabulary, words
from curation_env.mini.suite import build_suite, suite_items
from curation_env.mini.world import MINI, N_SOURCES, NANO, SCALES, TEST_WORLDS, WorldSpec, generator_hash
from curation_env.pool import Pool
from curation_env.task import Task

csv.field_size_limit(sys.maxsize)


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mini")
    build_pool(0, path / "pool", NANO)
    build_suite(path / "suite", NANO)
    return path


@pytest.mark.parametrize("seed", [0, 1, 2, 3, 1_000_000, 1_000_001])
def test_a_world_is_its_seed(seed: int) -> None:
    world = WorldSpec.draw(seed)
    assert world == WorldSpec.draw(seed)
    assert len(world.sources) == N_SOURCES
    assert sum(s.share for s in world.sources) == pytest.approx(1)
    assert min(s.share for s in world.sources) > 0.004


def test_worlds_share_no_names_by_position() -> None:
    names = [tuple(s.name for s in WorldSpec.draw(seed).sources) for seed in range(20)]
    assert len(set(names)) == 20


def in_turn(numbers: Iterable[float]) -> float:
    return functools.reduce(operator.add, numbers, 0.0)


@pytest.mark.parametrize("add", [math.fsum, in_turn])
def test_worlds_do_not_depend_on_how_python_adds_floats(
    add: Callable[..., float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The built-in `sum` adds floats in turn up to Python 3.11, and makes up for what is lost from 3.12 on."""
    monkeypatch.setattr(world_module, "sum", add, raising=False)
    assert generator_hash.__wrapped__() == generator_hash()


@pytest.mark.parametrize("seed", [0, 1, 2, *TEST_WORLDS[:5]])
def test_two_sources_of_every_world_show_clip_art(seed: int) -> None:
    parts = []
    for source in WorldSpec.draw(seed).sources:
        shown = math.fsum(w for form, w in source.forms.items() if form in CLIP_ART_FORMS)
        parts.append(source.share * shown / math.fsum(source.forms.values()))
    assert sum(part > 0 for part in parts) == 2
    assert 0.02 <= math.fsum(parts) <= 0.03


def test_pool_and_truth_agree(nano: Path) -> None:
    pool = Pool.open(nano / "pool")
    truth = pq.read_table(nano / "pool" / "truth.parquet").to_pydict()
    assert truth["id"] == pool.ids
    assert len(pool) == NANO.pool_rows == len(set(pool.ids))
    assert Counter(bool(leak) for leak in truth["leak_of"])[True] == NANO.leaks
    assert set(truth["duplicate_of"]) - {""} <= set(pool.ids)
    for k in range(0, len(pool), 37):
        row = pool.row(k)
        assert row["n_tokens"] == count_supervised(row["conversation"])
        if row["image"] is not None:
            assert Image.open(io.BytesIO(row["image"]["bytes"])).size == (32, 32)


def test_the_same_world_gives_the_same_bytes(nano: Path, tmp_path: Path) -> None:
    assert build_pool(0, tmp_path / "pool", NANO) == Pool.open(nano / "pool").hash
    assert build_suite(tmp_path / "suite", NANO) == build_suite(nano / "suite", NANO)
    assert build_pool(1, tmp_path / "other", NANO) != Pool.open(nano / "pool").hash


def test_every_word_is_in_the_vocabulary() -> None:
    known = set(vocabulary())
    texts = [
        t
        for seed in (0, 1, 7, 1_000_003)
        for row in world_rows(WorldSpec.draw(seed), NANO)
        for turn in row.conversation
        for t in turn.values()
    ]
    texts += [t for items in suite_items(MINI).values() for item in items for t in (item.prompt, item.gold)]
    assert {w for text in texts for w in words(text)} <= known


@pytest.mark.parametrize("form", CLIP_ART_FORMS)
def test_questions_about_clip_art(form: str) -> None:
    rng, known = random.Random(form), set(vocabulary())
    for sample in range(len(clip_art_set()[1])):
        found = ask(rng, form, ClipArt(sample, SIDE, 0, 0, False, (255, 255, 255)))
        assert found is not None
        assert set(words(" ".join((found.question, *found.answers)))) <= known
        assert found.answer in found.answers
        assert found.wrong(rng) != found.answer


def test_only_the_pool_shows_clip_art() -> None:
    rows = world_rows(WorldSpec.draw(1), MINI)
    shown = [row for row in rows if isinstance(row.picture, ClipArt)]
    assert {row.skill for row in shown} == {"clip art"}
    assert {row.fault for row in shown} > {"", "wrong", "garbage"}
    assert any(row.original for row in shown)
    images = [row.pixels() for row in shown]
    assert {(image.shape, str(image.dtype)) for image in images if image is not None} == {((32, 32, 3), "uint8")}
    asked = ("what is this ?", "which kind of thing", "is this ")
    assert not any(
        i.prompt.startswith(asked) for scale in SCALES.values() for b in suite_items(scale).values() for i in b
    )


def test_clip_art_is_shown_as_it_says() -> None:
    picture = draw_clip_art(random.Random(0))
    image, thumbnail = pixels(picture), clip_art_set()[0][picture.sample]
    inside = np.zeros((SIDE, SIDE), bool)
    inside[picture.top : picture.top + picture.side, picture.left : picture.left + picture.side] = True
    assert (image[~inside] == picture.ground).all()
    whole = ClipArt(picture.sample, SIDE, 0, 0, True, (0, 0, 0))
    assert np.array_equal(pixels(whole), thumbnail[:, ::-1, :3])


def test_scaling_is_by_area_and_rounds_halves_up() -> None:
    image = np.arange(9, dtype=np.uint8).reshape(3, 3, 1)
    assert np.array_equal(resample(image, 3, 3), image)
    assert resample(image, 1, 1).item() == 4
    assert resample(np.array([[[0], [1]]]), 1, 1).item() == 1
    # Two columns of three: each new one holds a whole old one and half of the middle one.
    assert resample(np.array([[[30], [60], [90]]]), 1, 2).ravel().tolist() == [40, 80]


def test_the_shipped_clip_art_is_what_its_script_picks() -> None:
    path = Path(__file__).parents[1] / "experiments" / "mini" / "clip_art.py"
    spec = importlib.util.spec_from_file_location("clip_art", path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    images, shown = clip_art_set()
    assert shown == tuple(word for word, names in script.PICKS.items() for _ in names)
    assert set(shown) <= CATEGORY.keys()
    assert (images.shape, images.dtype) == ((len(shown), SIDE, SIDE, 4), np.uint8)
    assert (images[..., :3] <= images[..., 3:]).all(), "colour is stored times opacity"


def test_clean_rows_never_show_an_evaluation_picture() -> None:
    shown = {encode_png(pixels(item.picture)) for items in suite_items(NANO).values() for item in items}
    rows = world_rows(WorldSpec.draw(2), NANO)
    clean = [row.pixels() for row in rows if not row.leak_of]
    assert not shown & {encode_png(image) for image in clean if image is not None}


def test_leaks_of_every_kind_are_planted() -> None:
    rows = [row for row in world_rows(WorldSpec.draw(0), MINI) if row.leak_of]
    kinds = Counter(row.leak_kind for row in rows)
    assert len(rows) == MINI.leaks
    assert set(kinds) == {
        "item", "image+question:reencoded", "image+question:cropped", "image+question:recolored",
        "image+answer:other question", "image+question:open", "question+answer:other image", "question+answer:no image",
    }  # fmt: skip
    assert len({row.leak_of for row in rows}) == len(rows)


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_benchmarks_are_vlmevalkit_tables(scale, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    build_suite(tmp_path, scale)
    for name, items in suite_items(scale).items():
        with (tmp_path / f"{name}.tsv").open(newline="") as file:
            table = list(csv.DictReader(file, delimiter="\t"))
        assert [row["index"] for row in table] == [item.index for item in items]
        images = {row["index"]: row["image"] for row in table}
        for row in table:
            image = row["image"] if len(row["image"]) > 64 else images[row["image"]]
            assert base64.b64decode(image).startswith(b"\x89PNG")
    sizes = {name: len(items) for name, items in suite_items(scale).items()}
    assert sizes == {name: n * (4 if name == "MiniMMBench" else 1) for name, n in scale.items.items()}


def test_circular_copies_turn_the_options() -> None:
    items = suite_items(NANO)["MiniMMBench"]
    for k in range(0, len(items), 4):
        family = items[k : k + 4]
        assert {int(i.index) % 1_000_000 for i in family} == {int(family[0].index)}
        assert sorted(str(i.columns["answer"]) for i in family) == list("ABCD")
        assert len({i.columns[str(i.columns["answer"])] for i in family}) == 1


def test_hallusion_sets_ask_the_same_of_two_figures() -> None:
    items = suite_items(NANO)["MiniHallusion"]
    for k in range(0, len(items), 6):
        first, second = items[k : k + 3], items[k + 3 : k + 6]
        assert [i.prompt for i in first] == [i.prompt for i in second]
        assert [i.gold for i in first] != [i.gold for i in second]


@pytest.mark.parametrize("form", FORMS)
def test_forms_answer_what_is_drawn(form: str) -> None:
    rng = random.Random(form)
    for suite in (False, True):
        picture, found = draw_ask(rng, form, suite)
        if found.answers:
            assert found.answer in found.answers
            assert found.wrong(rng) != found.answer
        labels = patches(picture)
        assert labels.shape == (16, 3)
        assert (labels[:, 0] > 0).sum() > 0
        assert labels[:, 0].max() < len(CONTENTS)


def test_alterations_change_pixels_but_not_the_picture() -> None:
    image = pixels(suite_items(NANO)["MiniOCR"][0].picture)
    for kind in ("reencoded", "cropped", "recolored"):
        other = alter(image, kind, random.Random(0))
        assert other.shape == image.shape
        assert not np.array_equal(other, image)
        assert np.corrcoef(other.ravel(), image.ravel())[0, 1] > 0.9


def test_a_mismatch_names_the_library() -> None:
    meta = {"libraries": {"Pillow": "9.9", "FreeType": "2.1"}}
    with pytest.raises(TaskMismatch, match=r"Pillow 9\.9 \(pinned with 10\.0\)"):
        check_fingerprint("pool x", "a" * 64, "b" * 64, {"Pillow": "10.0", "FreeType": "2.1"}, meta)


@pytest.mark.parametrize("name", ["nano", "mini", "mini-worlds", "mini-mixture"])
def test_tasks_pin_the_generator_and_the_suite(name: str) -> None:
    task = Task.load(name)
    assert task.pool.generator == generator_hash()
    assert task.suite_hash
    assert task.pool.world == "by seed" or task.pool.hash


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pool": {"generator": "0" * 64}}, "world generator has hash .* no library differs"),
        (
            {"pool": {"generator": "0" * 64}, "pinned_with": {"numpy": "1.0"}},
            r"world generator .*: numpy \S+ \(pinned with 1\.0\)\nUse the release that task 'nano' belongs to",
        ),
        ({"pool": {"hash": "0" * 64}}, "pool has hash .* no library differs"),
        ({"suite_hash": "0" * 64}, "suite has hash"),
    ],
)
def test_another_pool_suite_or_generator_is_refused(change: dict[str, Any], message: str, data_root: Path) -> None:
    task = Task.load("nano")
    update = {k: task.pool.model_copy(update=v) if k == "pool" else v for k, v in change.items()}
    with pytest.raises(TaskMismatch, match=message):
        prepared(task.model_copy(update=update), data_root)
