"""The fixed trainer: packing changes nothing, runs repeat bit for bit, what can't train is an error."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training_support import make_init, make_pool, make_rows, png

from curation_env.errors import MissingAssets, NonFiniteLoss, UnsupervisedRow
from curation_env.pool import Pool
from curation_env.training import vlm
from curation_env.training.data import Encoder, even_micro_batches, micro_batches, read_rows
from curation_env.training.engine import SingleProcess
from curation_env.training.graph import GraphedProcess
from curation_env.training.images import image_features
from curation_env.training.model import Student
from curation_env.training.recipe import Recipe

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def init(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_init(tmp_path_factory.mktemp("student") / "init", width=32, layers=2)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pool(tmp_path_factory.mktemp("pools") / "toy", make_rows(40))


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return Recipe.load("mini-v1").model_copy(update={"epochs": 1, "lr": 1e-3})


def run(init: Path, pool: Path, recipe: Recipe, out: Path, **changes: object) -> dict:
    ids = Pool.open(pool).ids
    arguments: dict = {"ids": ids, "seed": 42, "device": "cpu"} | changes
    return vlm.train(init=init, recipe=recipe, pool=pool, out=out, **arguments)


def weights(result: dict) -> dict[str, torch.Tensor]:
    return load_file(Path(result["checkpoint"]) / "model.safetensors")


def test_recipe_is_a_pinned_file_with_a_pure_schedule() -> None:
    recipe = Recipe.load("mini-v1")
    assert len(set(recipe.seeds)) >= 8
    assert recipe.total_steps(1000) == 189
    rates = [recipe.lr_at(step, 189) for step in range(189)]
    assert rates[0] == 0
    assert max(rates) == recipe.lr
    assert rates[-1] < 1e-3 * recipe.lr
    assert rates[6:] == sorted(rates[6:], reverse=True)
    assert recipe.hash == Recipe.model_validate(recipe.payload()).hash
    with pytest.raises(MissingAssets, match="mini-v1"):
        Recipe.load("no-such-recipe")


def test_only_answers_and_their_end_are_supervised(init: Path, recipe: Recipe) -> None:
    encoder = Encoder.load(init, recipe)
    conversation = [{"user": "is it red ?", "assistant": "no"}, {"user": "colour ?", "assistant": "the blue"}]
    raw = {"id": "r", "image": {"bytes": png("blue"), "path": "b"}, "conversation": conversation}
    (row,) = encoder.encode_rows([raw])
    spoken = encoder.tokenizer.convert_ids_to_tokens(row.tokens[row.supervised].tolist())
    assert spoken == ["no", "</s>", "the", "blue", "</s>"]
    assert (row.tokens == encoder.image_token).sum() == 16
    assert row.tokens[0] == encoder.tokenizer.bos_token_id


def test_truncation_counts_image_tokens(init: Path, recipe: Recipe) -> None:
    conversation = [{"user": "colour ?", "assistant": "the blue " * 20}]
    raw = {"id": "r", "image": {"bytes": png("blue"), "path": "b"}, "conversation": conversation}
    (short,) = Encoder.load(init, recipe.model_copy(update={"max_length": 30})).encode_rows([raw])
    (whole,) = Encoder.load(init, recipe).encode_rows([raw])
    assert len(short.tokens) == 30 < len(whole.tokens)
    assert np.array_equal(short.tokens, whole.tokens[:30])
    assert 0 < short.n_supervised < whole.n_supervised


def test_images_are_padded_to_a_square(init: Path, recipe: Recipe) -> None:
    encoder = Encoder.load(init, recipe)
    pixels = encoder.pixels([png("red", size=(32, 16)), None])
    assert pixels.shape == (2, 3, 32, 32)
    assert pixels[0, :, 0].abs().max() < 0.02  # the processor's mean colour, normalised
    assert pixels[0, 0, 16].min() > 0.5
    assert torch.all(pixels[1] == -1)  # black


def test_packed_loss_equals_one_row_at_a_time_of_plain_transformers(init: Path, pool: Path, recipe: Recipe) -> None:
    from transformers import LlavaForConditionalGeneration

    encoder = Encoder.load(init, recipe)
    rows = encoder.encode(read_rows(Pool.open(pool), Pool.open(pool).ids[:16], {}))
    student = Student.load(init, recipe, CPU)
    features = image_features(student, encoder, {row.image: row.image_bytes for row in rows if row.image})
    packed = student.token_losses(rows, features)
    packed.sum().backward()
    plain = LlavaForConditionalGeneration.from_pretrained(init)
    losses = []
    for row in rows:
        tokens = torch.from_numpy(row.tokens)[None]
        labels = torch.where(torch.from_numpy(row.supervised)[None], tokens, -100)
        pixels = encoder.pixels([row.image_bytes]) if row.image else None
        out = plain(input_ids=tokens, pixel_values=pixels, labels=labels)
        losses.append(out.loss * row.n_supervised)
    torch.stack(losses).sum().backward()
    assert packed.sum().item() == pytest.approx(torch.stack(losses).sum().item(), rel=1e-5)
    reference = dict(plain.named_parameters())
    trained = 0
    for name, parameter in student.model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, reference[name].grad, rtol=2e-3, atol=2e-5)
            trained += 1
    assert trained
    assert not any(p.requires_grad for p in student.model.model.vision_tower.parameters())


def test_no_attention_across_rows(init: Path, pool: Path, recipe: Recipe) -> None:
    encoder = Encoder.load(init, recipe)
    rows = encoder.encode(read_rows(Pool.open(pool), Pool.open(pool).ids[:3], {}))
    student = Student.load(init, recipe, CPU)
    features = image_features(student, encoder, {row.image: row.image_bytes for row in rows if row.image})
    alone = student.token_losses(rows[:1], features)
    together = student.token_losses([rows[1], rows[0], rows[2]], features)
    start = rows[1].n_supervised
    torch.testing.assert_close(together[start : start + len(alone)], alone, rtol=1e-5, atol=1e-6)


def test_runs_repeat_bit_for_bit_whatever_the_order_of_ids(
    init: Path, pool: Path, recipe: Recipe, tmp_path: Path
) -> None:
    ids = Pool.open(pool).ids
    first = run(init, pool, recipe, tmp_path / "a")
    second = run(init, pool, recipe, tmp_path / "b", ids=ids[::-1])
    other = run(init, pool, recipe, tmp_path / "c", seed=1337)
    a, b, c = weights(first), weights(second), weights(other)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)
    assert (tmp_path / "a/training.jsonl").read_text() == (tmp_path / "b/training.jsonl").read_text()


def test_the_step_does_not_depend_on_packing(init: Path, pool: Path, recipe: Recipe, tmp_path: Path) -> None:
    whole = run(init, pool, recipe, tmp_path / "whole")
    small = run(init, pool, recipe.model_copy(update={"tokens_per_micro_batch": 60}), tmp_path / "small")
    assert whole["steps"] == small["steps"] == 3
    assert whole["final_loss"] == pytest.approx(small["final_loss"], rel=1e-4)
    a, b = weights(whole), weights(small)
    start = load_file(init / "model.safetensors")
    for name in a:
        moved = (a[name] - start[name]).abs().max()
        assert (a[name] - b[name]).abs().max() <= 0.05 * moved + 1e-9, name


def test_training_learns_and_says_how_far_it_is(init: Path, pool: Path, recipe: Recipe, tmp_path: Path) -> None:
    from transformers import LlavaForConditionalGeneration

    events: list[dict] = []
    longer = recipe.model_copy(update={"epochs": 8, "lr": 3e-3})
    result = run(init, pool, longer, tmp_path, on_progress=events.append)
    lines = [json.loads(line) for line in (tmp_path / "training.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 25))
    assert set(lines[0]) == {"step", "loss", "lr", "tokens", "grad_norm"}
    assert lines[-1]["loss"] == result["final_loss"] < 0.7 * lines[0]["loss"]
    last = events[-1]
    assert (last["stage"], last["unit"], last["done"], last["total"]) == ("train", "steps", 24, 24)
    assert {"images", "train"} == {event["stage"] for event in events}
    tuned, start = weights(result), load_file(init / "model.safetensors")
    for name in start:
        assert torch.equal(tuned[name], start[name]) == ("vision_tower" in name), name
    LlavaForConditionalGeneration.from_pretrained(result["checkpoint"])
    assert (Path(result["checkpoint"]) / "tokenizer.json").is_file()


def test_repeats_and_rewrites_count(init: Path, pool: Path, recipe: Recipe, tmp_path: Path) -> None:
    ids = Pool.open(pool).ids[:4]
    conversation = [{"user": "hello", "assistant": "yes yes yes"}]
    result = run(init, pool, recipe, tmp_path, ids=[ids[0]] * 3, rewrites={ids[0]: conversation})
    assert result["supervised_tokens"] == 3 * 4
    assert result["steps"] == 1


def test_rows_without_a_target_are_an_error(init: Path, pool: Path, recipe: Recipe, tmp_path: Path) -> None:
    ids = Pool.open(pool).ids
    with pytest.raises(UnsupervisedRow, match="no supervised token within 20 tokens") as caught:
        run(init, pool, recipe.model_copy(update={"max_length": 20}), tmp_path)
    assert set(caught.value.details.splitlines()) < set(ids)
    assert not (tmp_path / "checkpoint").exists()


def test_a_non_finite_loss_stops_the_run(init: Path, pool: Path, recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLoss, match="step"):
        run(init, pool, recipe.model_copy(update={"lr": 1e38, "epochs": 4, "grad_clip": 1e30}), tmp_path)
    assert not (tmp_path / "checkpoint").exists()


def test_missing_files_are_named(init: Path, pool: Path, recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(MissingAssets, match="nowhere"):
        run(tmp_path / "nowhere", pool, recipe, tmp_path / "out")


def test_micro_batches_hold_the_tokens_they_may(init: Path, pool: Path, recipe: Recipe) -> None:
    rows = Encoder.load(init, recipe).encode(read_rows(Pool.open(pool), Pool.open(pool).ids, {}))
    batches = micro_batches(rows, 100)
    assert [row for batch in batches for row in batch] == rows
    assert all(sum(len(row.tokens) for row in batch) <= 100 for batch in batches)
    assert len(micro_batches(rows, 1)) == len(rows)


def test_features_that_do_not_fit_are_made_window_by_window(
    init: Path, pool: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = Pool.open(pool).ids
    kept = run(init, pool, recipe.model_copy(update={"epochs": 2}), tmp_path / "kept", ids=ids + ids[:9])
    monkeypatch.setattr(vlm, "CACHE_BYTES", 0)
    streamed = run(init, pool, recipe.model_copy(update={"epochs": 2}), tmp_path / "streamed", ids=ids + ids[:9])
    assert streamed["steps"] == kept["steps"] == 8
    a, b, start = weights(kept), weights(streamed), load_file(init / "model.safetensors")
    for name, tensor in start.items():
        assert (a[name] - b[name]).abs().max() <= 0.01 * (a[name] - tensor).abs().max(), name


def test_a_window_is_shared_out_evenly() -> None:
    lengths = [100, 90, 20, 60, 50, 40, 35, 5]
    batches = even_micro_batches(lengths, 150)
    assert sorted(k for batch in batches for k in batch) == list(range(8))
    used = [sum(lengths[k] for k in batch) for batch in batches]
    assert len(batches) == 3
    assert max(used) <= 150
    assert max(used) - min(used) <= 20
    assert all([lengths[k] for k in batch] == sorted(lengths[k] for k in batch) for batch in batches)
    assert even_micro_batches([300, 10], 150) == [[0], [1]]
    assert even_micro_batches([], 150) == []


@pytest.mark.parametrize("text_only_every", [1, 4])
def test_steps_of_padded_windows_equal_those_of_packed_rows(init: Path, tmp_path: Path, text_only_every: int) -> None:
    """What a GPU replays as one graph is the same step, short windows and rows without an image included."""
    recipe = Recipe.load("mini-v1").model_copy(update={"lr": 1e-3, "weight_decay": 0.1, "grad_clip": 0.5})
    pool = Pool.open(make_pool(tmp_path / "pool", make_rows(40, text_only_every=text_only_every)))
    weights, updates = [], []
    for engine in (SingleProcess, GraphedProcess):
        encoder, student = Encoder.load(init, recipe), Student.load(init, recipe, CPU)
        rows = encoder.encode(read_rows(pool, sorted(pool.ids), {}))
        features = image_features(student, encoder, {row.image: row.image_bytes for row in rows if row.image})
        assert bool(features) == (text_only_every > 1)
        steps = engine(student, recipe, rows, features)
        updates.append([steps.step(window, 1e-3) for window in vlm.windows(len(rows), recipe, 42)])
        weights.append({name: p.detach() for name, p in student.model.named_parameters()})
    assert len(updates[0]) == 9
    for packed, padded in zip(*updates, strict=True):
        assert padded == pytest.approx(packed, rel=1e-4)
    start = dict(Student.load(init, recipe, CPU).model.named_parameters())
    for name, packed in weights[0].items():
        moved = (packed - start[name]).abs().max()
        assert moved or packed.ndim == 1 or "vision_tower" in name, name
        assert (packed - weights[1][name]).abs().max() <= 0.01 * moved, name
