"""Whether every way to take a step in bf16 takes the same step: what 50 of them change, from one init, on GPUs.

    python experiments/reproduce/same_update.py                # with two GPUs, two processes as well

The published recipe takes a row at a time, sixteen times. The trainer packs rows, compiles layers, forgets activations
and shares a step among processes where it must; in half precision each of these adds up in another order. So gradients
are not equal bit for bit, and a comparison of gradients says nothing of what is lost when a small update is added to a
bf16 weight. Compared is therefore the outcome: the share of weights that changed, and the loss on rows held out. Both
must lie within three standard deviations of what the order of the rows alone does, by the published way. Weights with
copies in fp32 behind them, which is another recipe, must not: a comparison that they pass would see nothing.

The model is LLaVA's architecture at 96 million parameters. Prints a table; ends with 1 where something lies outside.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

from curation_env.launch import write
from curation_env.students import card_of
from curation_env.training import engine as engines
from curation_env.training.data import Row
from curation_env.training.images import KeptFeatures
from curation_env.training.memory import config_of
from curation_env.training.model import Student, resolve_device
from curation_env.training.recipe import Recipe
from curation_env.training.vlm import windows

VOCABULARY, IMAGE_TOKEN, TOKENS_PER_IMAGE, VISION_WIDTH = 8192, 8000, 64, 256
SEEDS = (42, 1337, 2718, 3141, 1618)
HELD_OUT = 64
DEVIATIONS = 3.0


@dataclass(frozen=True)
class Way:
    """How steps are taken.

    Attributes:
        packed: Rows share a micro-batch.
        compiled: Layers are compiled.
        checkpointing: Activations of layers are computed again.
        processes: How many share a step.
        zero: DeepSpeed's stage; 0 for plain PyTorch.
        masters: Weights in fp32, which bf16 ones are a copy of: not the recipe.
    """

    packed: bool = True
    compiled: bool = False
    checkpointing: bool = False
    processes: int = 1
    zero: int = 0
    masters: bool = False


REFERENCE = Way(packed=False)
WAYS = {
    "packed": Way(),
    "packed, compiled": Way(compiled=True),
    "packed, compiled, checkpointing": Way(compiled=True, checkpointing=True),
    "two processes": Way(compiled=True, processes=2),
    "two processes, ZeRO-1": Way(compiled=True, processes=2, zero=1),
    "two processes, ZeRO-2": Way(compiled=True, processes=2, zero=2),
    "two processes, ZeRO-3": Way(compiled=True, processes=2, zero=3),
}
CONTROL = Way(masters=True)


def make_model(device: torch.device) -> Any:
    """LLaVA-1.5's architecture, small, with random weights in bf16."""
    from transformers import AutoModelForImageTextToText

    card = card_of("llava-1.5-7b")
    assert card is not None
    config = config_of(card)
    config.image_token_index = IMAGE_TOKEN
    small = {"vocab_size": VOCABULARY, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 6}
    config.text_config.update({**small, "num_attention_heads": 8, "num_key_value_heads": 8})
    few = {"hidden_size": VISION_WIDTH, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    config.vision_config.update({**few, "image_size": 112})
    torch.manual_seed(0)
    with device:
        return AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa").to(torch.bfloat16)


def make_rows(n: int) -> list[Row]:
    """Rows of many lengths whose words are of unequal frequency, so that there is something to learn."""
    rng = np.random.default_rng(0)
    frequency = 1.0 / np.arange(1, 2001)
    rows = []
    for k in range(n):
        text = int(np.clip(rng.lognormal(np.log(120), 0.8), 8, 700))
        tokens = 10 + rng.choice(2000, text, p=frequency / frequency.sum())
        supervised = np.zeros(text, bool)
        supervised[-max(2, int(0.45 * text)) :] = True
        image = None
        if k % 5:
            image = str(k % 40).encode()
            tokens = np.concatenate([tokens[:2], np.full(TOKENS_PER_IMAGE, IMAGE_TOKEN), tokens[2:]])
            supervised = np.concatenate([np.zeros(TOKENS_PER_IMAGE, bool), supervised])
        rows.append(Row(str(k), tokens, supervised, image))
    return rows


def outcome(way: Way, init: Path, seed: int, steps: int) -> dict[str, float] | None:
    """Share of trained weights that `steps` steps change, and the loss on rows held out (of rank 0; None elsewhere)."""
    rank, world = engines.rank_and_world()
    device = resolve_device("auto", rank)
    if world > 1:
        engines.join(device)
    recipe = Recipe.load("llava-1.5-7b-v1").model_copy(
        update={"tokens_per_micro_batch": 3600 if way.packed else 1, "max_length": 2048}
    )
    dtype = torch.float32 if way.masters else torch.bfloat16
    model = make_model(device)
    model.load_state_dict(load_file(init))
    start = {name: parameter.detach().cpu().clone() for name, parameter in model.named_parameters()}
    torch.compiler.set_stance("default" if way.compiled else "force_eager")
    student = Student.of(model.to(dtype), recipe, device, "packed")
    student.checkpointing = lambda load: way.checkpointing
    rows = make_rows(16 * steps + HELD_OUT)
    generator = torch.Generator().manual_seed(1)
    features = KeptFeatures(
        {
            str(k).encode(): torch.randn(TOKENS_PER_IMAGE, VISION_WIDTH, generator=generator).to(device, dtype)
            for k in range(40)
        }
    )
    trained, held_out = rows[:-HELD_OUT], rows[-HELD_OUT:]
    engine = engines.make(student, recipe, trained, features, way.zero)
    for step, window in enumerate(windows(len(trained), recipe, seed)):
        engine.step(window, recipe.lr_at(step, steps))
    with engine.whole(), torch.inference_mode():
        weights = {name: p.detach().to("cpu", torch.bfloat16) for name, p in student.model.named_parameters()}
        trains = [name for name, p in student.model.named_parameters() if p.requires_grad]
    if rank:
        return None
    torch.compiler.set_stance("force_eager")
    fresh = make_model(device)
    fresh.load_state_dict(weights)
    student = Student.of(fresh, recipe, device, "packed")
    with torch.inference_mode():
        half = {key: value.to(torch.bfloat16) for key, value in features.items()}
        loss = torch.cat([student.token_losses([row], half) for row in held_out]).mean()
    changed = sum(int((weights[name] != start[name]).sum()) for name in trains)
    return {"changed": changed / sum(start[name].numel() for name in trains), "loss": float(loss)}


def shared(names: list[str], init: Path, steps: int) -> Iterator[tuple[str, dict[str, float]]]:
    """The outcomes of ways that take two processes: one group of them runs them all."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    process = subprocess.Popen([*command, "--ways", *names, "--init", str(init), "--steps", str(steps)])
    for name in names:
        while not (out := init.with_name(f"{name}.json")).exists():
            if process.poll():
                raise SystemExit(f"{name}: the processes ended with exit code {process.returncode}")
            time.sleep(0.2)
        yield name, json.loads(out.read_text())
    process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", type=Path, help="write the figures here as well")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), help=argparse.SUPPRESS)  # one of several processes
    parser.add_argument("--init", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.ways:
        for name in arguments.ways:
            result = outcome(WAYS[name], arguments.init, SEEDS[0], arguments.steps)
            if result is not None:
                write(arguments.init.with_name(f"{name}.json"), result)
        torch.distributed.destroy_process_group()
        return
    found: dict[str, Any] = {}

    def note(name: str, result: dict[str, float] | None) -> None:
        found[name] = result
        print(name, result, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        init = Path(folder) / "init.safetensors"
        save_file(make_model(resolve_device("auto")).state_dict(), init)
        for seed in SEEDS:
            note(f"a row at a time, seed {seed}", outcome(REFERENCE, init, seed, arguments.steps))
        for name, way in WAYS.items():
            if way.processes == 1:
                note(name, outcome(way, init, SEEDS[0], arguments.steps))
        if torch.cuda.device_count() > 1:
            names = [name for name, way in WAYS.items() if way.processes > 1]
            for name, result in shared(names, init, arguments.steps):
                note(name, result)
        control = "packed, fp32 copies (another recipe)"
        note(control, outcome(CONTROL, init, SEEDS[0], arguments.steps))
    print_table(found, control)
    if arguments.out:
        arguments.out.write_text(json.dumps({"card": card(), **found}, indent=1) + "\n")
    inside = {name: all(abs(z) <= DEVIATIONS for z in deviations(found, name).values()) for name in found}
    sys.exit(inside.pop(control) or not all(inside.values()))


def card() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def deviations(found: dict[str, Any], name: str) -> dict[str, float]:
    """How far an outcome lies from the mean of the seeds, in standard deviations of theirs."""
    band = list(found.values())[: len(SEEDS)]
    off = {}
    for key, value in found[name].items():
        values = np.array([result[key] for result in band])
        off[key] = float((value - values.mean()) / values.std(ddof=1))
    return off


def print_table(found: dict[str, Any], control: str) -> None:
    table = Table("way", "weights changed", "sd", "held-out loss", "sd", title=card())
    for name, result in found.items():
        off = deviations(found, name)
        cells = f"{result['changed']:.3%}", f"{off['changed']:+.1f}", f"{result['loss']:.5f}", f"{off['loss']:+.1f}"
        table.add_row(name, *cells, end_section=name.endswith(str(SEEDS[-1])))
    Console(width=100).print(table)
    print(f"sd: distance from the mean of the seeds; all but {control!r} must be within {DEVIATIONS:g}")


if __name__ == "__main__":
    main()
