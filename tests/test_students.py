"""Students' inits: taken up, assembled and verified, or refused with the reason; each family goes the whole way."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from families_support import make_qwen, make_smolvlm
from llava_parts_support import LANGUAGE, PROJECTOR, VISION, make_parts
from training_support import png
from typer.testing import CliRunner

from curation_env import assemble, envs, students
from curation_env.actions import policy
from curation_env.assets import prepared
from curation_env.cli import app
from curation_env.doctor import examine
from curation_env.errors import MissingAssets, TaskMismatch
from curation_env.executor import LocalExecutor
from curation_env.ingest.catalog import Catalog
from curation_env.judge import Judge
from curation_env.pipeline import Pipeline
from curation_env.registry import ENTRIES
from curation_env.statuses import STATUSES
from curation_env.students import RECORD, Card, card_of, identity, prepare_student, student_names
from curation_env.submission import Submission
from curation_env.task import Task, conf_dir
from curation_env.training.data import Encoder
from curation_env.training.model import Student
from curation_env.training.recipe import Recipe

REAL = [entry for entry in ENTRIES if Task.load(entry.task).family == "llava"]
SMALL = {"hidden_size": 32, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_parts(tmp_path_factory.mktemp("parts") / "llava")


@pytest.fixture(autouse=True)
def _small_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The public cards, of students of the size that the tests write."""
    real = card_of

    def small(student: str) -> Card | None:
        card = real(student)
        return card and card.model_copy(update={"shape": SMALL})

    monkeypatch.setattr(students, "card_of", small)


@pytest.fixture(scope="module")
def llava(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("assembled")
    card = card_of("llava-1.5-7b")
    assert card is not None
    assemble.assemble_llava(card, parts, folder)
    return folder


# ------------------------------------------------------------------ assembling LLaVA


def test_the_assembled_model_computes_what_its_parts_do(llava: Path, parts: Path) -> None:
    """Logits against the parts put together by hand: Vicuna over CLIP's second last layer through the projector."""
    from transformers import CLIPVisionModel, LlamaForCausalLM, LlavaForConditionalGeneration

    recipe = Recipe.load("llava-1.5-7b-v1").model_copy(update={"precision": "fp32"})
    encoder = Encoder.load(llava, recipe)
    tokens, _ = encoder.prompt("what colour is it ?", [png("red")])
    pixels = encoder.pixels([png("red")])
    model = LlavaForConditionalGeneration.from_pretrained(llava, dtype=torch.float32)
    logits = model(input_ids=torch.from_numpy(tokens)[None], pixel_values=pixels).logits[0]
    language = LlamaForCausalLM.from_pretrained(parts / LANGUAGE, dtype=torch.float32)
    tower = CLIPVisionModel.from_pretrained(parts / VISION, dtype=torch.float16).float()
    layers = {k: v.float() for k, v in torch.load(parts / PROJECTOR, weights_only=True).items()}
    seen = tower(pixels, output_hidden_states=True).hidden_states[-2][0, 1:]
    names = [[f"model.mm_projector.{k}.{kind}" for kind in ("weight", "bias")] for k in (0, 2)]
    hidden = torch.nn.functional.linear(seen, *(layers[name] for name in names[0]))
    image = torch.nn.functional.linear(torch.nn.functional.gelu(hidden), *(layers[name] for name in names[1]))
    is_image = torch.from_numpy(tokens == encoder.image_token)
    assert int(is_image.sum()) == len(image) == 16
    words = torch.from_numpy(tokens).clamp_max(399)
    embedded = language.get_input_embeddings()(words)
    embedded[is_image] = image
    expected = language(inputs_embeds=embedded[None]).logits[0]
    torch.testing.assert_close(logits[:, :400], expected, rtol=1e-4, atol=1e-5)


def test_the_vocabulary_grows_as_in_the_library_converter(llava: Path, parts: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    config = json.loads((llava / "config.json").read_text())
    assert (config["image_token_index"], config["text_config"]["vocab_size"]) == (400, 448)  # a multiple of 64
    weights = load_file(llava / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    rows = next(tensor for name, tensor in weights.items() if name.endswith("embed_tokens.weight"))
    assert rows.shape == (448, 32)
    # Normal around the mean, with 1e-5 of the covariance: in many draws, what the converter draws from.
    embeddings = torch.randn(300, 8) @ torch.randn(8, 8) + 3
    drawn = assemble.added_rows(embeddings, 20_000, 0)
    assert torch.equal(drawn[:2], assemble.added_rows(embeddings, 20_000, 0)[:2])
    spread = torch.cov(embeddings.T, correction=0)
    torch.testing.assert_close(torch.cov((drawn - embeddings.mean(0)).T) / 1e-5, spread, rtol=0.2, atol=0.5)
    encoder = Encoder.load(llava, Recipe.load("llava-1.5-7b-v1"))
    assert encoder.tokenizer.convert_tokens_to_ids(["<image>", "<pad>", "</s>"]) == [400, 401, 2]
    assert encoder.tokenizer.pad_token == "<pad>"
    raw = {"id": "r", "image": None, "conversation": [{"user": "is it red ?", "assistant": "yes"}]}
    (row,) = encoder.encode_rows([raw])
    assert encoder.tokenizer.decode(row.tokens[row.supervised]).strip() == "yes</s>"


def test_shards_of_either_format_give_the_same_init(llava: Path, parts: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    again = make_parts(tmp_path / "parts", shards="safetensors")
    assert len(list((again / LANGUAGE).glob("*.safetensors"))) > 1
    card = card_of("llava-1.5-7b")
    assert card is not None
    (tmp_path / "out").mkdir()
    made_of = assemble.assemble_llava(card, again, tmp_path / "out")
    assert set(made_of) == set(card.parts.values())
    assert all(len(digest) == 64 for files in made_of.values() for digest in files.values())
    one, two = (load_file(folder / "model.safetensors") for folder in (llava, tmp_path / "out"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_an_instruction_tuned_llava_is_refused(llava: Path, parts: Path, tmp_path: Path) -> None:
    from transformers import LlavaForConditionalGeneration

    # In place of the parts: nothing can tell, so it is refused.
    with pytest.raises(
        MissingAssets, match=r"is a LLaVA checkpoint itself, which is refused.*llava-hf/llava-1.5-7b-hf"
    ):
        prepare_student("llava-1.5-7b", tmp_path / "root", llava)
    # Beside the parts: it is compared with them.
    source = tmp_path / "source"
    shutil.copytree(parts, source)
    shutil.copytree(llava, source / "llava")
    folder = prepare_student("llava-1.5-7b", tmp_path / "root", source)
    before = identity(folder)
    model = LlavaForConditionalGeneration.from_pretrained(llava)
    with torch.no_grad():
        model.model.language_model.layers[1].mlp.up_proj.weight[3, 4] += 0.25
    model.save_pretrained(source / "llava")
    with pytest.raises(TaskMismatch, match=r"1 tensors of its language model differ.*0\.25.*instruction tuning"):
        prepare_student("llava-1.5-7b", tmp_path / "root", source)
    assert identity(folder) == before  # a refused one replaces nothing
    assert [path.name for path in folder.parent.iterdir()] == ["llava-1.5-7b"]
    shutil.rmtree(source / "llava")
    (source / PROJECTOR).unlink()
    with pytest.raises(MissingAssets, match="stage-1 projector"):
        prepare_student("llava-1.5-7b", tmp_path / "root", source)


# ------------------------------------------------------------------ taking a student up


def test_a_published_checkpoint_is_checked_and_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "Qwen2.5-VL-3B-Instruct"
    source.mkdir()
    make_qwen(source)
    command = ["prepare", "qwen2.5vl-3b", "--student", str(source), "--data-root", str(tmp_path / "root")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    folder = tmp_path / "root/students/qwen2.5-vl-3b"
    record = json.loads((folder / RECORD).read_text())
    assert set(record["files"]) >= {"model.safetensors", "tokenizer.json", "preprocessor_config.json", "config.json"}
    findings = {finding.what: finding for finding in examine("qwen2.5vl-3b", tmp_path / "root")}
    assert findings["student"].ok
    (folder / RECORD).rename(tmp_path / RECORD)  # whoever put the files there, nobody has checked them
    unchecked = {finding.what: finding for finding in examine("qwen2.5vl-3b", tmp_path / "root")}["student"]
    assert not unchecked.ok
    assert "nobody has checked" in unchecked.text
    (tmp_path / RECORD).rename(folder / RECORD)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(TaskMismatch, match=r"tokenizer\.json is not the file"):
        identity(folder)
    with pytest.raises(TaskMismatch, match=r"'qwen2_5_vl', Qwen2-VL-2B is a 'qwen2_vl': get Qwen/Qwen2-VL-2B"):
        prepare_student("qwen2-vl-2b", tmp_path / "root", source)
    monkeypatch.undo()
    with pytest.raises(TaskMismatch, match=r"has hidden_size 32, Qwen2\.5-VL-3B-Instruct has 2,048"):
        prepare_student("qwen2.5-vl-3b", tmp_path / "root", source)
    (source / "config.json").unlink()
    with pytest.raises(MissingAssets, match=r"folder of Qwen/Qwen2\.5-VL-3B-Instruct"):
        prepare_student("qwen2.5-vl-3b", tmp_path / "root", source)


# ------------------------------------------------------------------ recipes and tasks


def test_recipes_are_the_published_ones() -> None:
    """lr, weight decay, beta2, examples a step, frozen parts, as published; what all share."""
    published = {
        "llava-1.5-7b-v1": (2e-5, 0.0, 0.999, 16, ("model.vision_tower",)),
        "qwen2.5-vl-3b-v1": (1e-5, 0.1, 0.999, 16, ()),
        "qwen2-vl-2b-v1": (1e-5, 0.1, 0.95, 8, ()),
        "smolvlm-v1": (1e-5, 0.0, 0.999, 16, ("model.vision_model",)),
        "smolvlm-500m-v1": (1e-5, 0.0, 0.999, 16, ("model.vision_model",)),
    }
    for name, (lr, decay, beta2, examples, frozen) in published.items():
        recipe = Recipe.load(name)
        assert recipe.name == name
        assert (recipe.lr, recipe.weight_decay, recipe.betas[1]) == (lr, decay, beta2)
        assert (recipe.examples_per_step, recipe.freeze) == (examples, frozen)
        assert (recipe.precision, recipe.epochs, recipe.warmup_ratio, recipe.max_length) == ("bf16", 1, 0.03, 2048)
        assert recipe.seeds[0] == 42
        assert recipe.chat.supervised != "answer"
    for name in ("qwen2.5-vl-3b", "qwen2-vl-2b"):
        old, new = (Recipe.load(f"{name}-v{k}") for k in (0, 1))
        assert old.hash != new.hash
        assert old.chat.supervised == "answer"
        mended = old.model_copy(update={"name": new.name, "chat": old.chat.model_copy(update={"supervised": "end"})})
        assert mended.hash == new.hash


def test_doctor_and_reset_list_everything_that_the_eight_real_tasks_lack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CURATION_JUDGE_URL", "CURATION_JUDGE_COMMAND", "CURATION_VLMEVALKIT"):
        monkeypatch.delenv(name, raising=False)
    assert len(REAL) == 8
    for entry in REAL:
        task = Task.load(entry.task)
        assert task.student in student_names()
        assert task.training_seeds == [42]
        assert len(task.benchmarks) == 8
        env: Any = gym.make(entry.id, data_root=tmp_path)
        with pytest.raises(MissingAssets) as caught:
            env.reset(seed=0)
        text = str(caught.value)
        card = card_of(task.student)
        assert card is not None
        public = [card.public] if card.public else list(card.parts.values())
        public += Catalog.load(task.pool.kind).public.values()
        public += [f"{one['url']}, md5 {one['md5']}" for one in task.suite_config["benchmarks"].values()]
        public += [f"prepare {entry.task} --{option} DIR" for option in ("source", "suite", "student")]
        public += [str(tmp_path / folder) for folder in ("pools", "suites", "views", "students")]
        assert [name for name in public if name not in text] == []
        findings = examine(entry.task, tmp_path)
        shown = "\n".join(finding.text for finding in findings if not finding.ok)
        assert [name for name in public if name not in shown] == []
        missing = {finding.what.strip() for finding in findings if finding.required and not finding.ok}
        assert missing >= {"pool", "suite", "view", "student", "judge"}
        assert "judge prompts" in {finding.what for finding in findings}
        assert any(finding.what.startswith("GPU") for finding in findings)
        env.close()
    sizes = [Task.load("llava", rows=rows) for rows in (20_000, 50_000, 100_000, 665_298)]
    assert len({task.hash for task in [Task.load("llava"), *sizes]}) == 5
    assert {path.stem for path in (conf_dir() / "student").glob("*.yaml")} == {Task.load(e.task).student for e in REAL}


# ------------------------------------------------------------------ the whole way


def own_task(file: Path, student: Path, recipe: str) -> Task:
    """Write a task file: the miniature's smallest pool and its suite, a student and its real recipe."""
    fields = (conf_dir() / "task/nano.yaml").read_text()
    fields = fields.replace("student: mini-llava", f"student: {student}").replace(
        "recipe: mini-v1", f"recipe: {recipe}"
    )
    file.write_text(fields.replace("rows: 96", "rows: 24"))
    return Task.load(str(file))


def test_a_student_goes_through_the_environment(llava: Path, tmp_path: Path, random_policy: str) -> None:
    """The base model, then one policy."""
    own_task(tmp_path / "own.yaml", llava, "llava-1.5-7b-v1")
    env: Any = envs.make(str(tmp_path / "own.yaml"), run_dir=tmp_path / "run", sandbox="none", device="cpu")
    try:
        _, info = env.reset(seed=0)
        assert info["score"] >= 0
        observation, _, _, _, info = env.step(policy(random_policy))
        assert STATUSES[observation["status"]] == "scored", observation["message"]
        assert info["n_rows"] == 24
    finally:
        env.close()


@pytest.fixture(scope="module")
def stages() -> Iterator[tuple[LocalExecutor, Judge]]:
    judge = Judge()
    with LocalExecutor() as executor:
        yield executor, judge
    judge.close()


@pytest.mark.parametrize(
    ("kind", "recipe"),
    [("qwen2_5_vl", "qwen2.5-vl-3b-v1"), ("qwen2_vl", "qwen2-vl-2b-v0"), ("idefics3", "smolvlm-v1")],
)
def test_every_family_goes_the_whole_way(
    kind: str, recipe: str, stages: tuple[LocalExecutor, Judge], data_root: Path, tmp_path: Path
) -> None:
    """Base, signal, and a submission trained and evaluated in a worker, as the environment asks for them."""
    folder = tmp_path / kind
    folder.mkdir()
    (make_smolvlm if kind == "idefics3" else make_qwen)(folder, kind)
    task = own_task(tmp_path / "own.yaml", folder, recipe)
    pipeline = Pipeline(task, prepared(task, data_root), *stages, cache=False, device="cpu", data_root=data_root)
    base = pipeline.base()
    outcome = pipeline.score(Submission.of(pipeline.view.ids[:24]))
    assert outcome.rows == 24
    assert set(outcome.scores.parts["all"]) == set(base.scores.parts["all"]) == set(task.benchmarks)
    log = outcome.files["seed-42/training.jsonl"].decode().splitlines()
    assert len(log) == Recipe.load(recipe).total_steps(24)
    losses, _ = pipeline.signal("loss")
    assert len(losses) == len(pipeline.view)
    assert np.isfinite(losses).all()


def test_what_the_student_trains_is_what_the_recipe_says(llava: Path) -> None:
    student = Student.load(llava, Recipe.load("llava-1.5-7b-v1"), torch.device("cpu"))
    assert student.model.dtype == torch.bfloat16
    assert not student.tower_trains
