"""A step over packed rows is that of one row at a time and of plain transformers, and compiled layers change nothing.

In fp64, of which transformers computes norms, rotations and the loss in fp32, whatever the weights are: equal means to
the rounding of fp32, 1e-6 of a tensor's largest value.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.nn import functional as F
from training_support import make_init, rows_of_every_kind

from curation_env.training.data import Encoder, Row
from curation_env.training.engine import SingleProcess, Update
from curation_env.training.images import image_features
from curation_env.training.model import Student
from curation_env.training.recipe import Recipe

CPU = torch.device("cpu")
ROUNDING = 1e-6
ONE_AT_A_TIME, SEVERAL_PACKS, ONE_PACK = 1, 150, 10_000
Gradients = dict[str, torch.Tensor]


class Material(NamedTuple):
    """What every test works on; features are those of the frozen tower."""

    init: Path
    recipe: Recipe
    encoder: Encoder
    rows: list[Row]

    def plain(self) -> Any:
        from transformers import LlavaForConditionalGeneration

        return LlavaForConditionalGeneration.from_pretrained(self.init, attn_implementation="sdpa").double()

    def student(self, kind: type[Student] = Student) -> Student:
        return kind.of(self.plain(), self.recipe, CPU, "packed")

    def features(self, student: Student) -> dict[bytes, torch.Tensor]:
        return image_features(student, self.encoder, {r.image: r.image_bytes for r in self.rows if r.image is not None})


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    """Rows with and without an image, two cut at `max_length`, one with a single target."""
    recipe = Recipe.load("mini-v1").model_copy(update={"max_length": 48, "grad_clip": 1e9})
    init = make_init(tmp_path_factory.mktemp("student") / "init", width=32, layers=2)
    encoder = Encoder.load(init, recipe)
    raw = rows_of_every_kind(init, recipe)[:12]
    rows = encoder.encode([{"id": f"r{k:02}", **row} for k, row in enumerate(raw)])
    cut = [row for row in rows if len(row.tokens) == recipe.max_length]
    assert {row.image is None for row in cut} == {row.image is None for row in rows} == {True, False}
    assert min(row.n_supervised for row in rows) == 1
    return Material(init, recipe, encoder, rows)


@pytest.fixture(scope="module")
def reference(material: Material) -> tuple[list[torch.Tensor], Gradients]:
    """Token losses, a row each, and gradients of their mean, by the library's own model over one row at a time."""
    model, losses = material.plain(), []
    total = sum(row.n_supervised for row in material.rows)
    for row in material.rows:
        tokens = torch.from_numpy(row.tokens)[None]
        labels = torch.where(torch.from_numpy(row.supervised)[None], tokens, -100)
        pixels = material.encoder.pixels([row.image_bytes]).double() if row.image else None
        out = model(input_ids=tokens, pixel_values=pixels, labels=labels)
        (out.loss * (row.n_supervised / total)).backward()
        each = F.cross_entropy(out.logits[0, :-1].detach(), labels[0, 1:], reduction="none")
        losses.append(each[labels[0, 1:] != -100])
    return losses, gradients_of(model)


def gradients_of(model: torch.nn.Module) -> Gradients:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(found: torch.Tensor, expected: torch.Tensor, what: str = "") -> None:
    """Equal to rounding, measured by the largest value of the tensor."""
    bound = ROUNDING * expected.abs().max().item()
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=bound, msg=lambda m: f"{what}: {m}")


def assert_same_gradients(found: Gradients, expected: Gradients) -> None:
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        assert_equal(found[name], gradient, name)


def step(material: Material, tokens_per_micro_batch: int) -> tuple[Update, Gradients]:
    """A step over all rows as one window, and the gradients with which the optimizer took it."""
    student, found = material.student(), {}
    recipe = material.recipe.model_copy(update={"tokens_per_micro_batch": tokens_per_micro_batch})
    engine = SingleProcess(student, recipe, material.rows, material.features(student))
    engine.optimizer.register_step_pre_hook(lambda *_: found.update(gradients_of(student.model)))
    return engine.step(range(len(material.rows)), 1e-3), found


@pytest.mark.parametrize("tokens", [ONE_PACK, SEVERAL_PACKS, ONE_AT_A_TIME])
def test_a_window_has_the_gradients_of_plain_transformers_however_it_is_packed(
    material: Material, reference: tuple[list[torch.Tensor], Gradients], tokens: int
) -> None:
    losses, gradients = reference
    update, found = step(material, tokens)
    assert update.loss == pytest.approx(torch.cat(losses).mean().item(), rel=ROUNDING)
    norm = torch.stack([gradients[name].norm() for name in found]).norm().item()
    assert update.grad_norm == pytest.approx(norm, rel=ROUNDING)
    trained = {name: g for name, g in gradients.items() if "vision_tower" not in name}
    assert found.keys() == trained.keys()
    assert_same_gradients(found, trained)


def test_every_token_loss_is_that_of_its_row_alone(
    material: Material, reference: tuple[list[torch.Tensor], Gradients]
) -> None:
    rows, student = material.rows, material.student()
    features = material.features(student)
    order = np.random.default_rng(0).permutation(len(rows)).tolist()
    packed = student.token_losses([rows[k] for k in order], features)
    for k, losses in zip(order, packed.split([rows[k].n_supervised for k in order]), strict=True):
        assert_equal(losses, reference[0][k], rows[k].id)
        assert_equal(student.token_losses([rows[k]], features), losses, rows[k].id)


def test_what_a_row_says_reaches_no_other_row(material: Material) -> None:
    """Other tokens or another image in one row: not a bit of the other rows' losses moves."""
    rows, student = material.rows, material.student()
    features = material.features(student)
    sizes = [row.n_supervised for row in rows]
    before = student.token_losses(rows, features).split(sizes)
    keys = [row.image for row in rows if row.image is not None]
    for k, row in enumerate(rows):
        words = np.where(row.tokens > material.encoder.image_token, row.tokens % 20 + 5, row.tokens)
        image = None if row.image is None else next(key for key in keys if key != row.image)
        for changes in ({"tokens": words}, {"image": image}):
            if changes == {"image": None}:
                continue
            changed = [*rows[:k], dataclasses.replace(row, **changes), *rows[k + 1 :]]
            after = student.token_losses(changed, features).split(sizes)
            equal = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
            assert equal == [other != k for other in range(len(rows))], (row.id, list(changes))


def test_positions_start_again_with_every_row(material: Material) -> None:
    """Rotations are relative: no loss would tell. So this is what the decoder is told."""
    student, told = material.student(), []
    student.parts.text.register_forward_pre_hook(lambda *call: told.append(call[2]["position_ids"]), with_kwargs=True)
    student.token_losses(material.rows, material.features(student))
    (positions,) = told
    assert positions.flatten().tolist() == [place for row in material.rows for place in range(len(row.tokens))]


class Compiled(Student):
    """Its layers are compiled as they are on a GPU; rows are padded for attention, as a CPU asks."""

    any_length = True

    @classmethod
    def of(cls, model: Any, *arguments: Any) -> Student:
        student = super().of(model, *arguments)
        student.any_length = False
        return student


def computed(material: Material, student: Student, packs: list[list[Row]]) -> list[tuple[torch.Tensor, Gradients]]:
    """Losses and gradients of packs: each first as it is, then with its layers computed twice."""
    features, found = material.features(student), []
    for rows in packs:
        for twice in (False, True):
            student.checkpointing = lambda load, twice=twice: twice
            student.model.zero_grad(set_to_none=True)
            losses = student.token_losses(rows, features)
            losses.sum().backward()
            found.append((losses.detach(), gradients_of(student.model)))
    return found


def test_compiled_layers_give_the_losses_and_gradients_of_those_that_are_not(
    material: Material, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced and differentiated by what compiles on a GPU, all but the kernels.

    Those of a CPU want a C++ compiler, which neither PyTorch nor the tests need for anything else, take several times
    as long to make, and are not the ones that train anybody's student.
    """
    backend = CompileCounterWithBackend("aot_eager")
    rows = sorted(material.rows, key=lambda row: len(row.tokens))
    # Two rectangles each, none as long as the student is wide: other code, in a number of ways that no GPU has.
    packs = [rows[2:7], rows[:7], rows[5:]]
    expected = computed(material, material.student(), packs)
    torch.compiler.reset()
    counters.clear()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
        student = material.student(Compiled)
    found = computed(material, student, packs)
    for (losses, gradients), (losses_compiled, gradients_compiled) in zip(expected, found, strict=True):
        assert_equal(losses_compiled, losses)
        assert_same_gradients(gradients_compiled, gradients)
    assert 1 <= backend.frame_count <= 3, "code was made again for packs of other lengths"
    assert not counters["graph_break"]
