"""Memory of training: what is counted is what autograd keeps, the way that is chosen fits, no way is another recipe."""

from __future__ import annotations

import contextlib
import functools
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families_support import make_qwen, make_smolvlm
from families_support import make_rows as make_family_rows
from training_support import make_init, make_pool, make_rows

from curation_env.choices import check_gib
from curation_env.doctor import examine
from curation_env.errors import InvalidSetting, OutOfMemory, by_code
from curation_env.executor import Pipes
from curation_env.pool import Pool
from curation_env.students import card_of, student_names
from curation_env.training import model as models
from curation_env.training import plan as plans
from curation_env.training.data import Encoder, Rectangle, Row, read_rows
from curation_env.training.engine import SingleProcess
from curation_env.training.memory import Footprint, Layer, Load, config_of, skeleton, tower_blocks
from curation_env.training.model import Student
from curation_env.training.offload import OffloadedProcess
from curation_env.training.plan import GIB, Machine, Shares, choose, of_worst
from curation_env.training.recipe import Recipe

CPU = torch.device("cpu")
PUBLIC = [name for name in student_names() if card_of(name) is not None]
KINDS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "llava": (lambda folder: make_init(folder, width=32, layers=2), "mini-v1"),
    "qwen2_vl": (lambda folder: make_qwen(folder, "qwen2_vl"), "qwen2-vl-2b-v1"),
    "qwen2_5_vl": (make_qwen, "qwen2.5-vl-3b-v1"),
    "idefics3": (make_smolvlm, "smolvlm-v1"),
}


@pytest.fixture(scope="module", params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def init(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory") / kind
    folder.mkdir()
    return KINDS[kind][0](folder)


def kept(compute: Callable[[], Any], model: torch.nn.Module) -> int:
    """Bytes that autograd keeps of a computation, the weights left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage  # held, so that nothing else comes to lie there
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        compute()
    return sum(storage.nbytes() for storage in found.values())


def per_layer(compute: Callable[[], Any], model: torch.nn.Module, owner: Any, name: str) -> int:
    """Bytes that one more layer of a stack keeps."""
    whole = getattr(owner, name)
    two = kept(compute, model)
    setattr(owner, name, whole[:1])
    one = kept(compute, model)
    setattr(owner, name, whole)
    return two - one


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_a_layer_keeps_is_counted(init: Path, kind: str, precision: str) -> None:
    recipe = Recipe.load(KINDS[kind][1]).model_copy(update={"precision": precision, "freeze": ()})
    student, tokens = Student.load(init, recipe, CPU), 64
    size = student.model.dtype.itemsize
    text = student.parts.text
    places = torch.arange(tokens)
    positions = places.expand(3, 1, tokens) if kind.startswith("qwen") else places[None]
    inputs = torch.randn(1, tokens, text.config.hidden_size, dtype=student.model.dtype, requires_grad=True)
    rows = [Rectangle(tokens, 1, tokens, places)]
    found = per_layer(
        lambda: text(inputs_embeds=inputs, position_ids=positions, use_cache=False, layout=rows),
        student.model,
        text,
        "layers",
    )
    # Heads of keys and values are fewer than those of queries; sums of each row of a softmax or a norm come on top.
    assert found / tokens == pytest.approx(Layer.of(text.layers[0]).kept(size, compiled=False), rel=0.12)

    tower = student.parts.tower
    owner = tower if kind.startswith("qwen") else tower.encoder
    blocks = tower_blocks(tower)
    encoder = Encoder.load(init, recipe)
    pixels = encoder.pixels([None, None])
    pixels = student._moved(pixels)
    footprint = Footprint.of(student.model, recipe)
    patches = sum(part.numel() for part in pixels) // footprint.pixels
    found = per_layer(lambda: student.parts.see(pixels), student.model, owner, "blocks" if owner is tower else "layers")
    assert len(blocks) == 2
    assert found / patches == pytest.approx(footprint.tower.kept(size, compiled=False), rel=0.2)


def test_what_a_compiled_layer_keeps_is_counted(tmp_path: Path) -> None:
    """The same partition of a layer into forward and backward pass as on a GPU, without its kernels."""
    from transformers import LlamaConfig, LlamaModel

    torch.compiler.reset()
    tokens, config = (
        64,
        LlamaConfig(vocab_size=8, hidden_size=256, intermediate_size=704, num_hidden_layers=1, num_attention_heads=16),
    )
    model = LlamaModel(config).bfloat16()
    model.set_attn_implementation("packed")
    places = torch.arange(tokens)
    inputs = torch.randn(1, tokens, 256, dtype=torch.bfloat16, requires_grad=True)
    angles = model.rotary_emb(inputs, places[None])
    forward = torch.compile(model.layers[0].forward, dynamic=True, backend="aot_eager_decomp_partition")
    rows = [Rectangle(tokens, 1, tokens, places)]
    found = kept(lambda: forward(inputs, position_embeddings=angles, layout=rows), model) / tokens
    counted = Layer.of(model.layers[0]).kept(2, compiled=True)
    # On a CPU the result of attention lies in memory twice, as its heads and as its rows; on top, sums of each row.
    assert counted <= found <= counted + 2 * 256 + 160


def rows_of(init: Path, recipe: Recipe, folder: Path) -> tuple[Encoder, list[Row]]:
    pool = Pool.open(make_pool(folder / "pool", make_family_rows(16)))
    encoder = Encoder.load(init, recipe)
    return encoder, encoder.encode(read_rows(pool, pool.ids, {}))


def test_layers_computed_twice_change_no_loss_and_no_gradient(
    init: Path, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForImageTextToText

    recipe = Recipe.load(KINDS[kind][1]).model_copy(update={"precision": "fp32", "max_length": 200})
    encoder, rows = rows_of(init, recipe, tmp_path)
    monkeypatch.setattr(models, "TARGETS_AT_ONCE", 7)
    found = {}
    for twice in (False, True):
        model = AutoModelForImageTextToText.from_pretrained(init, attn_implementation="sdpa").double()
        student = Student.of(model, recipe, CPU, "packed")
        student.checkpointing = lambda load, twice=twice: twice
        images = {row.image: row.image_bytes for row in rows if row.image is not None}
        features = student.image_features(encoder, images)
        compute = functools.partial(student.token_losses, rows, features)
        taken = kept(compute, student.model)
        losses = compute()
        losses.sum().backward()
        found[twice] = (losses.detach(), {n: p.grad for n, p in student.model.named_parameters()}, taken)
    (losses, gradients, taken), (again, gradients_again, taken_again) = found[False], found[True]
    torch.testing.assert_close(again, losses, rtol=1e-12, atol=1e-12)
    assert sum(gradient is not None for gradient in gradients.values()) > 10
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_again[name], gradient, rtol=1e-9, atol=1e-10, msg=name)
    assert taken_again < taken / 4


def test_compiled_layers_are_computed_twice_as_well(tmp_path: Path) -> None:
    """As a GPU's layers are; by the compiler's first half alone, which needs no compiler of C++."""
    torch.compiler.reset()
    recipe = Recipe.load("mini-v1")
    init = make_init(tmp_path / "init", width=32, layers=1)
    encoder, rows = rows_of(init, recipe, tmp_path)
    student = Student.load(init, recipe, CPU)
    (layer,) = student.parts.text.layers
    forward = torch.compile(type(layer).forward.__get__(layer), dynamic=True, backend="aot_eager")
    layer.forward = models._twice_where_asked(student, forward)
    features = student.image_features(encoder, {row.image: row.image_bytes for row in rows if row.image is not None})
    gradients = []
    for twice in (False, True):
        student.checkpointing = lambda load, twice=twice: twice
        student.token_losses(rows[:4], features).sum().backward()
        gradients.append({name: p.grad for name, p in student.model.named_parameters() if p.grad is not None})
        student.model.zero_grad(set_to_none=True)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradients_and_moments_on_the_host_give_the_same_bits(tmp_path: Path, precision: str) -> None:
    init = make_init(tmp_path / "init", width=32, layers=2)
    changes = {"precision": precision, "tokens_per_micro_batch": 110, "grad_clip": 0.5, "lr": 1e-3}
    recipe = Recipe.load("mini-v1").model_copy(update=changes)
    encoder = Encoder.load(init, recipe)
    pool = Pool.open(make_pool(tmp_path / "pool", make_rows(32)))
    rows = encoder.encode(read_rows(pool, pool.ids, {}))
    without = [k for k, row in enumerate(rows) if row.image is None]
    found = []
    for engine_of in (SingleProcess, OffloadedProcess):
        student = Student.load(init, recipe, CPU)
        features = student.image_features(encoder, {row.image: row.image_bytes for row in rows if row.image})
        engine = engine_of(student, recipe, rows, features)
        # One window has no image: the projector has no gradient, but moments.
        updates = [engine.step(window, recipe.lr) for window in (range(16), range(16, 32), without, range(16))]
        assert all(p.grad is None for p in student.model.parameters())
        found.append((updates, student.model.state_dict()))
    (updates, weights), (offloaded, weights_offloaded) = found
    assert offloaded == updates
    for name, tensor in weights.items():
        assert torch.equal(weights_offloaded[name], tensor), name


#: What `experiments/benchmarks/memory.py` prints for docs/performance.md.
WAYS = {
    "llava-1.5-7b": ("offload", "offload", "recipe"),
    "qwen2-vl-2b": ("smaller", "checkpointing", "recipe"),
    "qwen2.5-vl-3b": ("offload", "checkpointing", "recipe"),
    "smolvlm": ("checkpointing", "recipe", "recipe"),
    "smolvlm-500m": ("checkpointing", "recipe", "recipe"),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_worst_steps_of_every_student_have_a_way_on_every_card(name: str) -> None:
    card, recipe = card_of(name), Recipe.load(f"{name}-v1")
    assert card is not None
    found = []
    for size in plans.SIZES:
        free = plans.machine_of(size).free
        plan = of_worst(card, recipe, Machine(free, 64 * GIB))
        assert plan.needed * plans.INACCURACY <= free
        assert plan.tokens_per_micro_batch >= recipe.max_length
        assert bool(plan.host) == (plan.way == "offload")
        found.append(plan.way)
    assert tuple(found) == WAYS[name]
    assert of_worst(card, recipe, Machine(80 * GIB, 0)).way == "recipe"


def test_architectures_are_those_that_were_published() -> None:
    """By their numbers of parameters, in thousands of millions."""
    published = {
        "llava-1.5-7b": 7.063,
        "qwen2-vl-2b": 2.209,
        "qwen2.5-vl-3b": 3.755,
        "smolvlm": 2.246,
        "smolvlm-500m": 0.507,
    }
    for name in PUBLIC:
        card = card_of(name)
        assert card is not None
        model = skeleton(config_of(card))
        assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(published[name], abs=0.001)


def test_the_peak_that_was_measured_on_an_h100_is_what_is_computed() -> None:
    """docs/performance.md: 65.2 GiB, the largest micro-batch of that run being of 3,495 tokens, 534 of them targets."""
    card = card_of("llava-1.5-7b")
    assert card is not None
    footprint = Footprint.of(skeleton(config_of(card)), Recipe.load("llava-1.5-7b-v1"))
    peak = footprint.weights + 3 * footprint.trained + footprint.activations(Load(3495, 4 * 576, 534))
    assert peak / GIB == pytest.approx(65.2, rel=0.02)


def test_the_first_way_that_fits_is_taken_and_no_row_is_cut() -> None:
    card, recipe = card_of("smolvlm-500m"), Recipe.load("smolvlm-500m-v1")
    assert card is not None
    footprint, windows, seen = Footprint.of(skeleton(config_of(card)), recipe), plans.worst_windows(card, recipe), []
    for tenths in range(300, 20, -2):
        with contextlib.suppress(OutOfMemory):
            plan = choose(
                footprint,
                recipe.tokens_per_micro_batch,
                recipe.max_length,
                lambda tokens: plans.micro_batch_loads(windows, tokens),
                Machine(tenths * GIB // 10, 1 << 40),
            )
            assert plan.needed * plans.INACCURACY + plans.RESERVE <= tenths * GIB // 10 + 1024
            assert recipe.max_length <= plan.tokens_per_micro_batch <= recipe.tokens_per_micro_batch
            if plan.way not in seen:
                seen.append(plan.way)
    assert seen == ["recipe", "checkpointing", "smaller", "offload"]


def test_what_can_not_fit_says_what_it_needs_and_what_there_is() -> None:
    card, recipe = card_of("llava-1.5-7b"), Recipe.load("llava-1.5-7b-v1")
    assert card is not None
    with pytest.raises(
        OutOfMemory, match=r"takes 1\d\.\d GiB of GPU memory at the least, 8\.0 GiB are free: nothing was"
    ):
        of_worst(card, recipe, Machine(8 * GIB, 1 << 40))
    with pytest.raises(OutOfMemory, match=r"by offload, takes 50\.4 GiB of the host's memory, 32\.0 GiB are available"):
        of_worst(card, recipe, Machine(24 * GIB, 32 * GIB))


def test_processes_that_share_a_step_share_its_moments() -> None:
    card, recipe = card_of("llava-1.5-7b"), Recipe.load("llava-1.5-7b-v1")
    assert card is not None
    footprint = Footprint.of(skeleton(config_of(card)), recipe)
    row = Load(2048, 576, 1471)
    ways = {}
    for shares in (Shares(2, 1), Shares(2, 2), Shares(8, 2)):
        ways[shares] = choose(footprint, 3600, 2048, lambda tokens: [row], Machine(79 * GIB, 0), shares=shares).needed
    assert ways[Shares(2, 1)] > ways[Shares(2, 2)] > ways[Shares(8, 2)] > footprint.weights


def test_what_memory_is_computed_from_is_no_part_of_what_pins_a_student() -> None:
    card = card_of("smolvlm-500m")
    assert card is not None
    pinned = card.model_dump()
    assert pinned["shape"] == {"hidden_size": 960, "num_hidden_layers": 32}
    assert not {"architecture", "image_tokens"} & set(pinned)


def test_the_doctor_says_which_way_a_real_task_trains(tmp_path: Path) -> None:
    finding = examine("llava", tmp_path)[-1]
    assert finding.what == "GPU memory"
    if not torch.cuda.is_available():
        assert not finding.required
        assert "24 GB: by offload" in finding.text
        assert "50.4 GiB of the host's memory" in finding.text
        assert "80 GB: as the recipe says" in finding.text
    assert all(finding.what != "GPU memory" for finding in examine("nano", tmp_path))


#: As PyTorch words it.
SAID = (
    "CUDA out of memory. Tried to allocate 3.73 GiB. GPU 0 has a total capacity of 22.06 GiB of which 1.20 GiB is "
    "free. Process 7 has 20.86 GiB memory in use. Of the allocated memory 20.10 GiB is allocated by PyTorch, and "
    "96.00 MiB is reserved by PyTorch but unallocated."
)
FAILING_WORKER = """
import torch
from curation_env import worker

def run_stage(name, payload, on_progress):
    raise torch.OutOfMemoryError(payload["said"])

worker.run_stage = run_stage
worker.main()
"""


def test_the_end_of_a_gpus_memory_is_an_error_with_its_cause(tmp_path: Path) -> None:
    """Raised where a stage would raise it, and read as an executor reads it: a machine without a GPU can do no more."""
    process = subprocess.Popen(
        [sys.executable, "-c", FAILING_WORKER, "--log", str(tmp_path / "log")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
        start_new_session=True,
    )
    try:
        pipes = Pipes(process)
        pipes.send({"stage": "evaluate", "payload": {"said": SAID}, "gpu_memory_gib": 22.0})
        deadline = time.monotonic() + 120
        pipes.receive(deadline)  # that it is ready
        answer = pipes.receive(deadline)
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            stream.close()
    assert answer is not None
    error = answer["error"]
    assert by_code()[error["code"]] is OutOfMemory
    for part in ("evaluate ran out", "3.73 GiB", "22.06 GiB", "gpu_memory_gib"):
        assert part in error["message"]
    assert "Process 7" not in error["message"]
    assert "Process 7" in error["details"]


@pytest.mark.parametrize("value", [0, -1, "24", True])
def test_a_limit_of_a_gpus_memory_is_a_number(value: object) -> None:
    with pytest.raises(InvalidSetting, match="gpu_memory_gib must be a number of GiB above 0"):
        check_gib("gpu_memory_gib", value)
