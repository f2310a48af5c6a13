"""The evaluation stage end to end, its greedy engine, and what must be an error rather than a score."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_support import SUITE, make_suite, toy_tables
from training_support import make_init, make_pool, make_rows

import curation_env.evaluation.run as halves
from curation_env.errors import JudgeUnavailable, MissingAssets, StageFailed
from curation_env.evaluation import static
from curation_env.evaluation.generate import Prompt, batches, generate
from curation_env.evaluation.judge import Endpoint
from curation_env.evaluation.run import evaluate, jackknife_variance
from curation_env.evaluation.scorers import Grade, make_scorer
from curation_env.evaluation.suite import Item, JudgeSpec, Suite, read_items, read_suite
from curation_env.mini.judge import MODEL, JudgeServer, serve
from curation_env.pool import Pool
from curation_env.training.data import Encoder, image_key
from curation_env.training.images import image_features
from curation_env.training.model import Student
from curation_env.training.recipe import Recipe
from curation_env.training.signals import signal_stage
from curation_env.training.vlm import train

CPU = torch.device("cpu")
RECIPE = Recipe.load("mini-v1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evaluation")


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Path:
    """A student that has learnt to answer in the pool's way, so that answers end and differ."""
    init = make_init(folder / "init", width=32, layers=2)
    pool = make_pool(folder / "pool", make_rows(160))
    recipe = RECIPE.model_copy(update={"epochs": 6, "lr": 4e-3})
    ids = Pool.open(pool).ids
    return Path(train(init=init, recipe=recipe, pool=pool, ids=ids, seed=42, out=folder / "run")["checkpoint"])


@pytest.fixture(scope="module")
def suite(folder: Path) -> Suite:
    return make_suite(folder / "suite")


@pytest.fixture(scope="module")
def server() -> Iterator[JudgeServer]:
    server = serve()
    yield server
    server.shutdown()
    server.server_close()


def run(checkpoint: Path, suite: Suite, suite_dir: Path, server: JudgeServer, out: Path, **more: Any) -> dict[str, Any]:
    judge = Endpoint(server.url, MODEL, "")
    settings = {"judge": judge, "device": "cpu", "recipe": RECIPE, **more}
    return evaluate(checkpoint=checkpoint, suite=suite, suite_dir=suite_dir, out=out, **settings)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_benchmark_is_scored_on_every_part(
    checkpoint: Path, suite: Suite, folder: Path, server: JudgeServer, tmp_path: Path
) -> None:
    events: list[dict[str, Any]] = []
    result = run(checkpoint, suite, folder / "suite", server, tmp_path, on_progress=events.append)
    names = set(SUITE["benchmarks"])
    assert set(result["scores"]["feedback"]) == set(result["scores"]["all"]) == names
    assert set(result["scores"]["sealed"]) == names - {"Small"}
    assert all(0 <= value <= 100 for part in result["scores"].values() for value in part.values())
    assert all(result["stderr"][part] >= 0 for part in ("feedback", "sealed", "all"))
    sizes = {name: len(rows) for name, rows in toy_tables().items()}
    assert result["n"]["all"] == sizes
    assert {name: result["n"]["feedback"][name] + result["n"]["sealed"].get(name, 0) for name in names} == sizes
    assert set(result["categories"]["Choice"]) == {"kind 0", "kind 1"}
    rows = lines(tmp_path / "predictions.jsonl")
    assert len(rows) == sum(sizes.values())
    assert {"benchmark", "index", "category", "part", "prediction", "score"} <= set(rows[0])
    assert any(row["prediction"] for row in rows)
    assert len({row["prediction"] for row in rows}) > 2
    judged = [row for row in rows if row["benchmark"] == "Open"]
    assert all("judge" in row for row in judged)
    assert result["scores"]["all"]["Open"] == pytest.approx(100 * np.mean([float(row["judge"]) for row in judged]))
    asked = lines(tmp_path / "judge.jsonl")
    assert any("what colour is it ?" in entry["request"] for entry in asked)
    assert {"images", "evaluate", "judge"} == {event["stage"] for event in events} | {"images"}


def test_a_warm_evaluation_repeats_itself(
    checkpoint: Path, suite: Suite, folder: Path, server: JudgeServer, tmp_path: Path
) -> None:
    first = run(checkpoint, suite, folder / "suite", server, tmp_path / "a")
    second = run(checkpoint, suite, folder / "suite", server, tmp_path / "b")
    assert first["scores"] == second["scores"]
    for name in ("predictions.jsonl", "judge.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_changed_files_are_read_again(
    checkpoint: Path, suite: Suite, folder: Path, server: JudgeServer, tmp_path: Path
) -> None:
    copy = tmp_path / "suite"
    shutil.copytree(folder / "suite", copy)
    before = run(checkpoint, suite, copy, server, tmp_path / "a")
    text = (copy / "Choice.tsv").read_text().replace("\tB\t", "\tC\t")
    (copy / "Choice.tsv").write_text(text + "")
    after = run(checkpoint, suite, copy, server, tmp_path / "b")
    golds = [item.answer for item in read_items(copy / "Choice.tsv", "Choice")]
    assert set(golds) == {"C"}
    assert before["scores"]["all"]["Open"] == after["scores"]["all"]["Open"]


def test_what_is_missing_is_an_error(
    checkpoint: Path, suite: Suite, folder: Path, server: JudgeServer, tmp_path: Path
) -> None:
    copy = tmp_path / "suite"
    shutil.copytree(folder / "suite", copy)
    with pytest.raises(MissingAssets, match="no checkpoint"):
        run(tmp_path / "none", suite, copy, server, tmp_path)
    (copy / "Open.tsv").rename(tmp_path / "Open.tsv")
    with pytest.raises(MissingAssets, match="Open"):
        run(checkpoint, suite, copy, server, tmp_path)
    (tmp_path / "Open.tsv").rename(copy / "Open.tsv")
    split = json.loads((copy / "split.json").read_text())
    del split["items"]["Open"]["v1_3"]
    (copy / "split.json").write_text(json.dumps(split))
    with pytest.raises(MissingAssets, match="Open/v1_3"):
        run(checkpoint, suite, copy, server, tmp_path)
    (copy / "split.json").unlink()
    with pytest.raises(MissingAssets, match=r"split\.json"):
        run(checkpoint, suite, copy, server, tmp_path)


def test_no_judge_is_an_error_before_anything_is_generated(
    checkpoint: Path, suite: Suite, folder: Path, server: JudgeServer, tmp_path: Path
) -> None:
    events: list[dict[str, Any]] = []
    with pytest.raises(JudgeUnavailable, match="no judge endpoint"):
        run(checkpoint, suite, folder / "suite", server, tmp_path, judge=None, on_progress=events.append)
    other = Endpoint(server.url, "another-model", "")
    with pytest.raises(JudgeUnavailable, match="does not serve 'another-model'"):
        run(checkpoint, suite, folder / "suite", server, tmp_path, judge=other, on_progress=events.append)
    assert not events
    assert not (tmp_path / "predictions.jsonl").exists()


def test_two_stages_give_what_one_gives(
    checkpoint: Path, suite: Suite, folder: Path, server: JudgeServer, tmp_path: Path
) -> None:
    whole = run(checkpoint, suite, folder / "suite", server, tmp_path / "whole")
    judge, out = Endpoint(server.url, MODEL, ""), tmp_path / "halves"
    common: dict[str, Any] = {"suite": suite, "suite_dir": folder / "suite", "out": out}
    first = halves.answer(checkpoint=checkpoint, recipe=RECIPE, device="cpu", **common)
    assert set(first["seconds"]) == {"load", "generate"}
    second = halves.grade(judge=judge, **common)
    assert {key: second[key] for key in ("scores", "stderr", "categories", "n")} == {
        key: whole[key] for key in ("scores", "stderr", "categories", "n")
    }
    for name in ("predictions.jsonl", "judge.jsonl"):
        assert (tmp_path / "whole" / name).read_bytes() == (out / name).read_bytes()
    assert not (out / "judge.json").exists()  # the built-in judge is a part of this package
    with pytest.raises(JudgeUnavailable, match="does not serve"):  # probed before anything is generated
        halves.answer(checkpoint=tmp_path / "none", recipe=RECIPE, judge=judge._replace(model="other"), **common)
    with pytest.raises(StageFailed, match="no answers to grade"):
        halves.grade(judge=judge, **{**common, "out": tmp_path})


def test_an_endpoint_is_asked_as_the_suite_says_and_recorded(
    checkpoint: Path, suite: Suite, folder: Path, server: JudgeServer, tmp_path: Path
) -> None:
    spec = JudgeSpec(kind="endpoint", model=MODEL)
    other = suite.model_copy(update={"judge": spec, "spreadsheets": True})
    found = run(checkpoint, other, folder / "suite", server, tmp_path)
    assert found["scores"]["all"].keys() == SUITE["benchmarks"].keys()
    assert json.loads((tmp_path / "judge.json").read_text()) == {
        "suite": "toy", "id": MODEL, "owned_by": "curation-env", "answers_as": MODEL, "fingerprints": []
    }  # fmt: skip


def test_one_prompt_alone_is_answered_as_among_others(checkpoint: Path, suite: Suite, folder: Path) -> None:
    encoder = Encoder.load(checkpoint, RECIPE)
    student = Student.load(checkpoint, RECIPE, CPU, attention="sdpa")
    items = [item for rows in read_suite(folder / "suite", suite).values() for item in rows]
    images = {image_key(data): data for item in items for data in item.images}
    features = image_features(student, encoder, images)
    prompts = [
        Prompt(
            encoder.prompt(item.prompt(suite.benchmarks[item.benchmark].prompt), item.images)[0],
            tuple(image_key(data) for data in item.images),
            3 + k % 4,
        )
        for k, item in enumerate(items)
    ]
    prompts.append(Prompt(encoder.prompt("hello how are you", ())[0], (), 6))
    together = generate(student, prompts, features, end_token=encoder.end_token)
    alone = [generate(student, [prompt], features, end_token=encoder.end_token)[0] for prompt in prompts]
    assert together == alone
    packed = Student.load(checkpoint, RECIPE, CPU, attention="packed")
    # What a GPU records as graphs: more of them than one, over one cache.
    parts = [prompts[:3], prompts[3:]]
    decoder = static.Decoder(packed, parts)
    with torch.inference_mode():
        answered = [decoder.decode(part, features, [encoder.end_token]) for part in parts]
    assert [answer for part in answered for answer in part] == together
    assert any(0 < len(answer) < prompt.max_new_tokens for answer, prompt in zip(together, prompts, strict=True))
    for prompt, answer in list(zip(prompts, together, strict=True))[::9]:
        pixels = encoder.pixels([images[key] for key in prompt.images]) if prompt.images else None
        reference = student.model.generate(
            input_ids=torch.from_numpy(prompt.tokens)[None],
            pixel_values=pixels,
            max_new_tokens=prompt.max_new_tokens,
            do_sample=False,
            eos_token_id=encoder.end_token,
            pad_token_id=0,
        )[0, len(prompt.tokens) :].tolist()
        assert answer == [token for token in reference if token != encoder.end_token]


def test_batches_are_bounded() -> None:
    rng = np.random.default_rng(0)
    prompts = [
        Prompt(np.zeros(int(n), np.int64), (), 4 + 44 * (k % 2)) for k, n in enumerate(rng.integers(5, 900, 400))
    ]
    cut = list(batches(prompts, 128, 16_384))
    assert sorted(k for batch in cut for k in batch) == list(range(400))
    for batch in cut:
        longest = max(len(prompts[k].tokens) for k in batch) + max(prompts[k].max_new_tokens for k in batch)
        assert len(batch) <= 128
        assert len(batch) * longest <= 16_384
    assert list(batches([Prompt(np.zeros(20_000, np.int64), (), 4)], 128, 16_384)) == [[0]]


def test_a_batch_holds_prompts_of_several_answer_limits(checkpoint: Path) -> None:
    encoder, student = Encoder.load(checkpoint, RECIPE), Student.load(checkpoint, RECIPE, CPU, attention="sdpa")
    tokens, _ = encoder.prompt("what is shown ?", ())
    prompts = [Prompt(tokens, (), limit) for limit in (1, 3, 9, 2)]
    answers = generate(student, prompts, {}, end_token=-1)  # never ends by itself
    assert [len(answer) for answer in answers] == [1, 3, 9, 2]
    assert all(answer == answers[2][: len(answer)] for answer in answers)


def test_items_are_read_as_vlmevalkit_reads_them(tmp_path: Path) -> None:
    long = base64.b64encode(b"x" * 60).decode()
    table = (
        "index\timage\tquestion\tA\tB\tC\tanswer\thint\n"
        f"1\t{long}\tq1\tone\tNone\t3.0\tA\t\n"
        "2\t1\tq2\tx\ty\t\tB\tlook\n"
        f"3\t\"['{long}', '{long}']\"\tq3\t\t\t\t7\t\n"
        "4\t\tq4\ta\tb\t\tA\t\n"  # no image: no item
    )
    (tmp_path / "T.tsv").write_text(table)
    first, second, third = read_items(tmp_path / "T.tsv", "T")
    assert first.options == {"A": "one", "C": "3.0"}  # "None" reads as missing
    assert first.images == second.images != ()
    assert second.prompt("choice").startswith("look\nq2\nA. x\nB. y\nAnswer with")
    assert second.prompt("open") == "q2"
    assert (len(third.images), third.options) == (2, {})
    assert third.prompt("choice") == "q3\nAnswer the question directly."
    (tmp_path / "T.tsv").write_text("index\tquestion\tA\tanswer\n1\tq1\ta\tA\n")
    assert read_items(tmp_path / "T.tsv", "T")[0].images == ()


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("index\tquestion\n1\tq\n", "no column answer"),
        ("index\tquestion\tanswer\n1\tq\ta\n1\tq\ta\n", "twice"),
        ("index\timage\tquestion\tanswer\n1\t7\tq\ta\n", "item 7"),
        ("index\timage\tquestion\tanswer\n1\t" + "*" * 80 + "\tq\ta\n", "base64"),
    ],
)
def test_a_malformed_file_is_named(table: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "T.tsv").write_text(table)
    with pytest.raises(StageFailed, match=message):
        read_items(tmp_path / "T.tsv", "T")


def test_the_standard_error_of_a_mean_is_the_usual_one() -> None:
    scorer = make_scorer("mcq")
    rng = np.random.default_rng(0)
    hits = rng.integers(0, 2, 2000).astype(float)
    graded = [(Item("B", str(k), "q", "A", "", ()), Grade(hit), f"{k:05d}") for k, hit in enumerate(hits)]
    usual = hits.std(ddof=1) / np.sqrt(len(hits)) * 100
    assert np.sqrt(jackknife_variance(scorer, graded)) == pytest.approx(usual, rel=0.4)
    assert jackknife_variance(scorer, graded[:1]) == 0


def test_the_loss_signal_is_each_rows_own_loss(checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    pool = folder / "pool"
    result = signal_stage(name="loss", init=checkpoint, recipe=RECIPE, pool=pool, out=tmp_path / "x/loss.npy")
    values = np.load(tmp_path / "x/loss.npy")
    opened = Pool.open(pool)
    assert values.dtype == np.float32
    assert values.shape == (len(opened),)
    assert result["price"] > 0
    encoder, student = Encoder.load(checkpoint, RECIPE), Student.load(checkpoint, RECIPE, CPU)
    for k in (0, 7, 80):
        row = encoder.encode_rows([opened.row(k)])[0]
        images = {row.image: row.image_bytes} if row.image is not None else {}
        features = image_features(student, encoder, images)
        own = student.token_losses([row], features).mean().item()
        assert values[k] == pytest.approx(own, rel=1e-4, abs=1e-6)
    with pytest.raises(StageFailed, match="no signal 'el2n'"):
        signal_stage(name="el2n", init=checkpoint, recipe=RECIPE, pool=pool, out=tmp_path / "y.npy")
