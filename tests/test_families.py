"""Every family of students: rows as the library's processors make them, packing and decoding as plain transformers."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families_support import SIZES, make_qwen, make_rows, make_smolvlm, picture
from PIL import Image
from safetensors.torch import load_file
from training_support import make_pool

from curation_env.errors import StageFailed, UnsupervisedRow
from curation_env.evaluation import generate as generation
from curation_env.evaluation import static
from curation_env.evaluation.generate import Prompt, generate, suite_features
from curation_env.pool import Pool
from curation_env.training import vlm
from curation_env.training.data import Encoder, Row, image_key, read_rows
from curation_env.training.families import images_of
from curation_env.training.images import image_features
from curation_env.training.model import Student
from curation_env.training.recipe import Recipe
from curation_env.training.signals import mean_losses
from curation_env.training.tokens import TokenCounter

CPU = torch.device("cpu")
KINDS: dict[str, tuple[Callable[[Path, str], Path], str]] = {
    "qwen2_5_vl": (make_qwen, "qwen2.5-vl-3b-v1"),
    "qwen2_vl": (make_qwen, "qwen2-vl-2b-v1"),
    "idefics3": (make_smolvlm, "smolvlm-v1"),
    "smolvlm": (make_smolvlm, "smolvlm-500m-v1"),
}


@pytest.fixture(scope="module", params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def init(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    make, _ = KINDS[kind]
    folder = tmp_path_factory.mktemp("student") / kind
    folder.mkdir()
    return make(folder, kind)


@pytest.fixture(scope="module")
def recipe(kind: str) -> Recipe:
    """The real recipe, in a precision in which equality can be seen; some rows are cut."""
    longest = 150 if kind.startswith("qwen") else 210
    return Recipe.load(KINDS[kind][1]).model_copy(update={"precision": "fp32", "max_length": longest})


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pool(tmp_path_factory.mktemp("pools") / "toy", make_rows(18))


@pytest.fixture(scope="module")
def rows(init: Path, pool: Path, recipe: Recipe) -> list[Row]:
    encoded = Encoder.load(init, recipe).encode(read_rows(Pool.open(pool), Pool.open(pool).ids, {}))
    assert any(row.image is None for row in encoded) == (recipe.text_only_image == "none")
    assert any(len(row.tokens) == recipe.max_length for row in encoded)
    return encoded


def plain_inputs(encoder: Encoder, tokens: np.ndarray, images: list[bytes | None]) -> dict[str, Any]:
    """What the library's own model takes for one row, pixels straight from its image processor."""
    inputs: dict[str, Any] = {"input_ids": torch.from_numpy(tokens)[None]}
    if images:
        opened = [encoder._open(data) for data in images]
        if encoder.images.placeholder == "<|image_pad|>":
            inputs |= encoder.images.processor(opened, return_tensors="pt")
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == encoder.image_token).int()
        else:
            inputs |= encoder.images.processor([opened], return_tensors="pt")
            inputs.pop("rows", None), inputs.pop("cols", None)
    return inputs


def load_plain(init: Path) -> Any:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(init, attn_implementation="eager")


def test_packed_losses_and_gradients_are_those_of_one_row_at_a_time(
    init: Path, rows: list[Row], recipe: Recipe
) -> None:
    encoder, student = Encoder.load(init, recipe), Student.load(init, recipe, CPU)
    features = image_features(student, encoder, {row.image: row.image_bytes for row in rows if row.image})
    packed = student.token_losses(rows, features)
    packed.sum().backward()
    plain = load_plain(init)
    losses = []
    for row in rows:
        tokens = torch.from_numpy(row.tokens)[None]
        labels = torch.where(torch.from_numpy(row.supervised)[None], tokens, -100)
        inputs = plain_inputs(encoder, row.tokens, [row.image_bytes] if row.image else [])
        losses.append(plain(**inputs, labels=labels).loss * row.n_supervised)
    torch.stack(losses).sum().backward()
    ours = torch.stack([part.sum() for part in packed.split([row.n_supervised for row in rows])])
    torch.testing.assert_close(ours, torch.stack(losses), rtol=1e-5, atol=1e-5)
    reference = dict(plain.named_parameters())
    for name, parameter in student.model.named_parameters():
        if not parameter.requires_grad:
            assert name.startswith("model.vision_model"), name
            continue
        torch.testing.assert_close(parameter.grad, reference[name].grad, rtol=5e-3, atol=1e-4, msg=name)
    frozen = {name for name, parameter in student.model.named_parameters() if not parameter.requires_grad}
    assert bool(frozen) == bool(recipe.freeze)


def test_greedy_answers_are_those_of_transformers_generate(
    init: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, student = Encoder.load(init, recipe), Student.load(init, recipe, CPU, attention="sdpa")
    shown = [[picture(0, SIZES[0])], [picture(1, SIZES[1])], [], [picture(2, SIZES[2]), picture(0, SIZES[0])]]
    shown += [[picture(3, SIZES[3])], [picture(1, SIZES[1])]]
    prompts = []
    for k, images in enumerate(shown):
        tokens, positions = encoder.prompt("what colour is it ? " + "please " * (k % 4), images)
        prompts.append(Prompt(tokens, tuple(image_key(data) for data in images), 5 + k, positions))
    images = {image_key(data): data for group in shown for data in group}
    features = image_features(student, encoder, images)
    plain = load_plain(init)
    ends = [encoder.end_token, *encoder.stop_tokens]
    # Some token that the random student does say ends its answers, so that rows leave the batch at different times.
    said = generate(student, prompts, features, end_token=ends[0])
    ends.append(said[5][4])
    answers = generate(student, prompts, features, end_token=ends[0], stop_tokens=ends[1:])
    for prompt, images_of_prompt, answer in zip(prompts, shown, answers, strict=True):
        out = plain.generate(
            **plain_inputs(encoder, prompt.tokens, list(images_of_prompt)),
            max_new_tokens=prompt.max_new_tokens,
            do_sample=False,
            eos_token_id=ends,
            pad_token_id=0,
        )[0, len(prompt.tokens) :].tolist()
        assert answer == [token for token in out if token not in ends]
    assert len({len(answer) for answer in answers}) > 1
    packed = Student.load(init, recipe, CPU, attention="packed")
    packed.model.requires_grad_(False)
    with torch.inference_mode():
        # What a GPU records as a graph.
        assert static.Decoder(packed, [prompts]).decode(prompts, features, ends) == answers
    monkeypatch.setattr(generation, "FEATURE_BYTES", 0)
    monkeypatch.setattr(generation, "PROMPTS_PER_WINDOW", 2)
    streamed = suite_features(student, encoder, prompts, images)
    assert not isinstance(streamed, dict)
    assert generate(student, prompts, streamed, end_token=ends[0], stop_tokens=ends[1:]) == answers


def test_images_become_the_tokens_that_the_processor_makes_of_them(init: Path, recipe: Recipe) -> None:
    """The whole of the text side, layouts of every shape, against the library's own processors."""
    from transformers import AutoTokenizer
    from transformers.models.idefics3.processing_idefics3 import Idefics3Processor

    encoder = Encoder.load(init, recipe)
    images, tokenizer = encoder.images, AutoTokenizer.from_pretrained(init)
    qwen = images.placeholder == "<|image_pad|>"
    rng = np.random.default_rng(0)
    sizes = [*SIZES, (1, 1), (200, 1), (1, 150), *map(tuple, rng.integers(1, 130, (40, 2)).tolist())]
    for size in sizes:
        image = Image.new("RGB", size)
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        tokens, positions = encoder.prompt("is it red ?", [buffer.getvalue()])
        text, _ = recipe.chat.render([("is it red ?", None)], images=[recipe.chat.image])
        if qwen:  # its processor wants a video processor, which wants torchvision; this is all that its text side does
            patches = images.processor(image, return_tensors="pt")["image_grid_thw"][0].prod().item()
            expected = tokenizer(text.replace(images.placeholder, images.placeholder * (patches // 4)))["input_ids"]
            assert positions is not None
            assert positions.shape == (3, len(tokens))
        else:
            processor = Idefics3Processor(images.processor, tokenizer, image_seq_len=4)
            expected = processor(text=text, images=[[image]])["input_ids"][0]
            assert positions is None
        assert tokens.tolist() == list(expected), size
        assert len(images.pixels([image])[0]) > 0
    if qwen:
        with pytest.raises(StageFailed, match="200 times"):
            images.layout(1000, 4)


def test_answers_their_end_and_nothing_else_are_supervised(init: Path, rows: list[Row], recipe: Recipe) -> None:
    encoder = Encoder.load(init, recipe)
    short = next(row for row in rows if row.supervised.sum() < 40 and len(row.tokens) < recipe.max_length)
    spoken = encoder.tokenizer.decode(short.tokens[short.supervised], skip_special_tokens=False)
    assert spoken.lstrip().startswith("the colour is")
    assert spoken.rstrip("\n").endswith(recipe.chat.end)
    assert spoken.endswith("\n") == (recipe.chat.supervised == "after")
    assert "what" not in spoken
    without = recipe.model_copy(update={"chat": recipe.chat.model_copy(update={"supervised": "answer"})})
    raw = {"id": "r", "image": None, "conversation": [{"user": "is it ?", "assistant": "yes it is"}]}
    (bare,) = Encoder.load(init, without).encode_rows([raw])
    assert (
        bare.tokens[bare.supervised].tolist()
        == encoder.tokenizer(recipe.chat.answer.replace("{text}", "yes it is")).input_ids
    )


def test_tokens_are_counted_as_the_trainer_supervises_them(init: Path, pool: Path, recipe: Recipe) -> None:
    count = TokenCounter(init, recipe)
    opened = Pool.open(pool)
    encoder = Encoder.load(init, recipe)
    for raw in opened.rows(range(len(opened))):
        data = raw["image"]["bytes"] if raw["image"] else None
        assert count(raw["conversation"], data) == encoder.encode_rows([raw])[0].n_supervised
    with pytest.raises(ValueError, match="bytes"):
        count([{"user": "x", "assistant": "y"}], True)


def test_a_row_whose_image_fills_the_cut_never_trains(init: Path, recipe: Recipe) -> None:
    short = recipe.model_copy(update={"max_length": 24})
    encoder, student = Encoder.load(init, short), Student.load(init, short, CPU)
    conversation = [{"user": "is it red ?", "assistant": "yes"}]
    raw = {"id": "r", "image": {"bytes": picture(0, SIZES[0]), "path": "p"}, "conversation": conversation}
    assert TokenCounter(init, short)(conversation, raw["image"]["bytes"]) == 0
    assert np.isnan(mean_losses(student, encoder, encoder.encode_rows([raw]))).all()
    with pytest.raises(UnsupervisedRow, match="within 24 tokens"):
        encoder.encode([raw])


def test_a_text_that_spells_an_image_token_out_is_an_error(init: Path, recipe: Recipe) -> None:
    encoder = Encoder.load(init, recipe)
    conversation = [{"user": f"what is {encoder.images.placeholder} ?", "assistant": "a tag"}]
    with pytest.raises(StageFailed, match="spells one out"):
        encoder.encode_rows([{"id": "r", "image": None, "conversation": conversation}])


def test_training_repeats_and_moves_what_the_recipe_trains(
    init: Path, pool: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faster = recipe.model_copy(update={"lr": 1e-3, "epochs": 2, "examples_per_step": 8})
    ids = Pool.open(pool).ids

    def run(name: str) -> dict[str, torch.Tensor]:
        out = tmp_path / name
        result = vlm.train(init=init, recipe=faster, pool=pool, ids=ids, seed=42, out=out, device="cpu")
        return load_file(Path(result["checkpoint"]) / "model.safetensors")

    first, second = run("a"), run("b")
    monkeypatch.setattr(vlm, "CACHE_BYTES", 0)
    streamed, start = run("c"), load_file(init / "model.safetensors")
    assert first.keys() == start.keys()
    for name, tensor in start.items():
        assert torch.equal(first[name], second[name]), name
        assert torch.equal(first[name], tensor) == any(name.startswith(part) for part in recipe.freeze), name
        assert (first[name] - streamed[name]).abs().max() <= 0.02 * (first[name] - tensor).abs().max(), name


def test_the_loss_signal_is_each_rows_own(init: Path, rows: list[Row], recipe: Recipe) -> None:
    encoder, student = Encoder.load(init, recipe), Student.load(init, recipe, CPU)
    values = mean_losses(student, encoder, rows[:6])
    for row, value in zip(rows[:6], values, strict=True):
        images = {row.image: row.image_bytes} if row.image else {}
        own = student.token_losses([row], image_features(student, encoder, images)).mean().item()
        assert value == pytest.approx(own, rel=1e-4)


def test_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(StageFailed, match="'bert'"):
        images_of(tmp_path)
