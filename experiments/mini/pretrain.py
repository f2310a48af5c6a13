"""Make the student's init: a tower that sees, then a language model firm on some tasks and weak on the rest.

    python experiments/mini/pretrain.py --out DIR
    python experiments/mini/pretrain.py --examine  # what the shipped init knows
    python experiments/mini/pretrain.py --out DIR --variants 96x190x10x3,96x190x20x3 --procs 16  # side by side

1. Vision tower: three linear heads on every patch say what covers it; they are dropped, the tower is frozen for good.
2. Projector and Llama: captions, statements, facts, chat, and question form for the known tasks only.
3. Two short tunes on a few mixed rows, so that question forms never seen have a moderate loss. After one, the model
   still recites what it sees: benchmarks that look for the answer inside the text then score too high to rise.

A variant is `<width>x<rows of a last tune>x<learning rate in 1e-4>x<layers>`. Each is saved under `--out` and asked
the benchmarks (exact match under teacher forcing); `--probe` also fine-tunes it on random rows and on the whole of
world 0's pool.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
if (
    importlib.util.find_spec("gymnasium") is None
):  # a GPU machine may hold torch alone, and no environment is needed here
    bare = types.ModuleType("curation_env")
    bare.__path__ = [str(ROOT / "curation_env")]
    sys.modules["curation_env"] = bare
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import torch  # noqa: E402
from lessons import Lesson, draw_lessons, encode, last_tune, spoken  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from curation_env.mini import questions as q  # noqa: E402
from curation_env.mini.render import COLORS, CONTENTS, EXTENTS, patches, pixels  # noqa: E402
from curation_env.mini.student import build_model, save_student  # noqa: E402
from curation_env.mini.suite import suite_items  # noqa: E402

PAD, IMAGE = 0, 4


def normalised(images: np.ndarray, device: torch.device) -> torch.Tensor:
    """uint8 (n, 32, 32, 3) -> float (n, 3, 32, 32) as the processor does."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def rate(step: int, steps: int, peak: float, warmup: float = 0.03) -> float:
    """Linear warm-up, then a cosine to zero."""
    ramp = max(1.0, warmup * steps)
    if step < ramp:
        return peak * (step + 1) / ramp
    return peak * 0.5 * (1 + np.cos(np.pi * (step - ramp) / max(1.0, steps - ramp)))


def see(tower: torch.nn.Module, images: np.ndarray, device: torch.device) -> torch.Tensor:
    """Features of all pictures, (n, 16, width); the tower is frozen, so this is done once."""
    with torch.no_grad():
        parts = [
            tower(normalised(images[k : k + 512], device)).last_hidden_state[:, 1:] for k in range(0, len(images), 512)
        ]
    return torch.cat(parts)


def train_tower(
    tower: torch.nn.Module, images: np.ndarray, labels: np.ndarray, device: torch.device, epochs: int
) -> None:
    """Supervise every patch's output by what covers the patch."""
    width = tower.config.hidden_size
    heads = torch.nn.Linear(width, len(CONTENTS) + 1 + len(COLORS) + len(EXTENTS)).to(device)
    sizes = [len(CONTENTS), 1 + len(COLORS), len(EXTENTS)]
    parameters = [p for p in (*tower.parameters(), *heads.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.01)
    order, batch = np.random.default_rng(0), 256
    steps = epochs * (len(images) // batch)
    start, step = time.time(), 0
    for epoch in range(epochs):
        shuffled = order.permutation(len(images))
        for k in range(len(images) // batch):
            chosen = shuffled[k * batch : (k + 1) * batch]
            target = torch.from_numpy(labels[chosen]).to(device).long()
            scores = heads(tower(normalised(images[chosen], device)).last_hidden_state[:, 1:]).split(sizes, dim=-1)
            loss = sum(F.cross_entropy(s.flatten(0, 1), target[..., j].flatten()) for j, s in enumerate(scores))
            optimizer.param_groups[0]["lr"] = rate(step, steps, 2e-3)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            step += 1
        print(f"tower: epoch {epoch + 1}/{epochs} loss {loss.item():.4f} {time.time() - start:.0f} s", flush=True)
    tower.requires_grad_(False)
    held = [item.picture for items in suite_items().values() for item in items]
    truth = torch.from_numpy(np.stack([patches(p) for p in held])).to(device)
    with torch.no_grad():
        scores = heads(see(tower, np.stack([pixels(p) for p in held]), device)).split(sizes, dim=-1)
    shown = truth[..., 0] > 0
    right = [float((s.argmax(-1) == truth[..., j])[shown].float().mean()) for j, s in enumerate(scores)]
    print("tower: held-out patches right: content {:.4f} color {:.4f} extent {:.4f}".format(*right), flush=True)


def batches(lessons: list[Lesson], size: int, rng: np.random.Generator, bucket: int = 16) -> list[list[int]]:
    """Shuffled batches; within `bucket` of them rows are sorted by length, to waste little on padding."""
    order = rng.permutation(len(lessons))
    found = []
    for k in range(0, len(order), size * bucket):
        part = sorted(order[k : k + size * bucket], key=lambda i: len(lessons[i].ids))
        found += [part[j : j + size] for j in range(0, len(part), size)]
    return [list(map(int, found[k])) for k in rng.permutation(len(found))]


def collate(rows: list[Lesson], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids and labels (-100 where nothing is supervised)."""
    longest = max(len(r.ids) for r in rows)
    ids = np.full((len(rows), longest), PAD)
    labels = np.full((len(rows), longest), -100)
    for k, row in enumerate(rows):
        ids[k, : len(row.ids)] = row.ids
        labels[k, : len(row.ids)] = np.where(row.supervised, row.ids, -100)
    return torch.from_numpy(ids).to(device), torch.from_numpy(labels).to(device)


def logits(model: torch.nn.Module, ids: torch.Tensor, rows: list[Lesson], features: torch.Tensor) -> torch.Tensor:
    """Teacher-forced logits; padding lies to the right of every row, so the causal mask is enough."""
    embedded = model.get_input_embeddings()(ids)
    pictures = torch.tensor([r.picture for r in rows if r.picture >= 0], device=ids.device)
    if len(pictures):
        projected = model.model.multi_modal_projector(features[pictures])
        embedded = embedded.masked_scatter((ids == IMAGE).unsqueeze(-1).expand_as(embedded), projected)
    return model.lm_head(model.model.language_model(inputs_embeds=embedded, use_cache=False).last_hidden_state)


def fit(
    model: torch.nn.Module,
    features: torch.Tensor,
    lessons: list[Lesson],
    *,
    lr: float,
    epochs: int,
    size: int,
    seed: int,
    betas: tuple[float, float] = (0.9, 0.999),
    label: str = "",
    watch: Callable[[], None] = lambda: None,
) -> None:
    """Train projector and language model on the supervised tokens: AdamW, warm-up and cosine."""
    device = features.device
    parameters = [p for n, p in model.named_parameters() if "vision_tower" not in n]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=betas, weight_decay=0.0)
    rng = np.random.default_rng(seed)
    plan = [b for _ in range(epochs) for b in batches(lessons, size, rng, bucket=16 if size > 16 else 1)]
    start = time.time()
    for step, chosen in enumerate(plan):
        rows = [lessons[i] for i in chosen]
        ids, labels = collate(rows, device)
        scores = logits(model, ids, rows, features)
        loss = F.cross_entropy(scores[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        optimizer.param_groups[0]["lr"] = rate(step, len(plan), lr)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if label and (step % max(1, len(plan) // 10) == 0 or step + 1 == len(plan)):
            print(
                f"{label}: step {step + 1}/{len(plan)} loss {loss.item():.4f} {time.time() - start:.0f} s", flush=True
            )
            watch()


def exact(model: torch.nn.Module, features: torch.Tensor, lessons: list[Lesson]) -> np.ndarray:
    """Whether the argmax at every supervised position is the gold token: what greedy decoding would have written."""
    hits = np.zeros(len(lessons), bool)
    order = sorted(range(len(lessons)), key=lambda i: len(lessons[i].ids))
    with torch.no_grad():
        for k in range(0, len(order), 256):
            rows = [lessons[i] for i in order[k : k + 256]]
            ids, labels = collate(rows, features.device)
            guess = logits(model, ids, rows, features)[:, :-1].argmax(-1)
            right = (guess == labels[:, 1:]) | (labels[:, 1:] == -100)
            hits[order[k : k + 256]] = right.all(dim=1).cpu().numpy()
    return hits


class Exam:
    """The benchmarks and fresh questions of every form, as lessons over their own pictures."""

    def __init__(self, tower: torch.nn.Module, device: torch.device) -> None:
        rng = random.Random("exam")
        pictures, self.names, self.lessons = [], [], []
        for name, items in suite_items().items():
            for item in items:
                self.add(name, pictures, item.picture, item.prompt, item.gold)
        for form in (*q.FORMS, "choice:color", "choice:relation", "choice:extreme"):
            for _ in range(100):
                picture, ask = q.draw_ask(rng, form.removeprefix("choice:"), True)
                ask = q.choice(rng, ask) if form.startswith("choice:") else ask
                self.add(form, pictures, picture, ask.question, ask.answer)
        self.features = see(tower, np.stack([pixels(p) for p in pictures]), device)

    def add(self, name: str, pictures: list, picture: object, question: str, answer: str) -> None:
        self.names.append(name)
        self.lessons.append(encode(len(pictures), [(question, answer)]))
        pictures.append(picture)

    def grade(self, model: torch.nn.Module) -> dict[str, float]:
        """Percent right by benchmark, their mean, and by question form."""
        hits = exact(model, self.features, self.lessons)
        names = np.array(self.names)
        table = {name: round(100 * float(hits[names == name].mean()), 1) for name in dict.fromkeys(self.names)}
        return {"mean": round(float(np.mean([table[b] for b in suite_items()])), 2), **table}


def probe(model: torch.nn.Module, exam: Exam, device: torch.device, say: str) -> dict[str, float]:
    """Fine-tune copies on random rows and on the whole pool of world 0 with the recipe's settings."""
    import copy

    from curation_env.mini.pool import world_rows
    from curation_env.mini.world import WorldSpec

    rows = world_rows(WorldSpec.draw(0))
    images = [r.pixels() for r in rows]
    shown = [k for k, image in enumerate(images) if image is not None]
    features = see(model.model.vision_tower, np.stack([images[k] for k in shown]), device)
    number = {k: j for j, k in enumerate(shown)}
    lessons = [encode(number.get(k, -1), [(a.question, a.answer) for a in r.turns]) for k, r in enumerate(rows)]
    clean = [k for k, r in enumerate(rows) if not r.fault and not r.original and r.skill not in ("chat", "leak")]
    sources: dict[str, list[int]] = {}
    for k, r in enumerate(rows):
        sources.setdefault(r.source, []).append(k)
    plans = {f"random {s}": random.Random(s).sample(range(len(rows)), 1000) for s in range(2)}
    for s in range(1):
        rng = random.Random(s)
        plans[f"balanced {s}"] = [k for held in sources.values() for k in rng.sample(held, min(72, len(held)))]
    plans["clean"] = random.Random(0).sample(clean, 1000)
    plans["full"] = list(range(len(rows)))
    scores = {}
    for name, chosen in plans.items():
        student = copy.deepcopy(model)
        fit(student, features, [lessons[k] for k in chosen], lr=3e-4, epochs=3, size=16, seed=1)
        graded = exam.grade(student)
        scores[name] = graded["mean"]
        print(f"{say}: fine-tuned on {name}: {json.dumps(graded)}", flush=True)
    return scores


def start_from_matching(model: torch.nn.Module) -> None:
    """Start every attention layer where equal words attend to each other and are copied.

    Keys equal queries, output is the transpose of values: a question then finds the patch that shows its word in
    hundreds of steps, not in tens of thousands.
    """
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            attention = layer.self_attn
            attention.k_proj.weight.copy_(attention.q_proj.weight)
            attention.o_proj.weight.copy_(attention.v_proj.weight.t())


def align(model: torch.nn.Module, features: torch.Tensor, labels: np.ndarray, steps: int = 1500) -> None:
    """Start the projector where a patch is said by the sum of its words' embeddings."""
    first = model.model.multi_modal_projector.linear_1
    mean, spread = features.mean((0, 1)), features.std((0, 1))
    with torch.no_grad():  # the tower's features are large and far from centred: fold their whitening in
        first.weight.div_(spread)
        first.bias.sub_(first.weight @ mean)
    named = torch.from_numpy(spoken(labels)).to(features.device).view(-1, 5)
    flat, words = features.flatten(0, 1), model.get_input_embeddings().weight.detach()
    optimizer = torch.optim.AdamW(model.model.multi_modal_projector.parameters(), lr=3e-3, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        chosen = torch.randint(len(flat), (1024,), generator=generator).to(features.device)
        said = named[chosen]
        target = (words[said.clamp(min=0)] * (said >= 0).unsqueeze(-1)).sum(1)
        loss = F.mse_loss(model.model.multi_modal_projector(flat[chosen]), target) / target.var()
        optimizer.param_groups[0]["lr"] = rate(step, steps, 3e-3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"projector: {100 * loss.item():.1f}% of the words' variance is left", flush=True)


def variant(name: str, args: argparse.Namespace) -> None:
    """Steps 2 and 3 for one variant, from the tower that step 1 left."""
    width, last, lr, layers = (int(part) for part in name.split("x"))
    device = torch.device(args.device)
    data = np.load(args.out / "lessons.npz")
    model = build_model(width=width, layers=layers).to(device)
    model.model.vision_tower.load_state_dict(torch.load(args.out / f"tower{width}.pt", map_location=device))
    model.model.vision_tower.requires_grad_(False)
    lessons = draw_lessons(args.pictures, args.procs).lessons
    features = see(model.model.vision_tower, data["images"], device)
    exam = Exam(model.model.vision_tower, device)
    start_from_matching(model)
    align(model, features, data["labels"])

    def watch() -> None:
        graded = exam.grade(model)
        print(f"{name}: known { ({f: graded[f] for f in q.KNOWN}) } mean {graded['mean']}", flush=True)

    peak, betas = lr * 1e-4, (0.9, 0.98)
    fit(
        model, features, lessons,
        lr=peak, epochs=args.epochs, size=args.batch, seed=0, betas=betas, label=name, watch=watch,
    )  # fmt: skip
    print(f"{name}: before the last tunes {json.dumps(exam.grade(model))}", flush=True)
    torch.save(model.state_dict(), args.out / f"{name}.before.pt")  # other last tunes can start here
    for part in ("last", "last2"):
        pictures, tune = last_tune(random.Random(part), last)
        seen = see(model.model.vision_tower, np.stack([pixels(p) for p in pictures]), device)
        fit(model, seen, tune, lr=1e-4, epochs=2, size=16, seed=0)
    graded = exam.grade(model)
    print(f"{name}: init {json.dumps(graded)}", flush=True)
    save_student(model.cpu(), args.out / name)
    if args.probe:
        graded["probe"] = probe(model.to(device), exam, device, name)
    (args.out / f"{name}.json").write_text(json.dumps(graded, indent=1))


def examine(device: torch.device) -> None:
    """Print the shipped init's grades by question form, and the mean over the known and over the other ones."""
    from transformers import LlavaForConditionalGeneration

    from curation_env.mini.student import init_dir

    model = LlavaForConditionalGeneration.from_pretrained(init_dir()).to(device)
    graded = Exam(model.model.vision_tower, device).grade(model)
    forms = {name: value for name, value in graded.items() if name in q.FORMS or name.startswith("choice:")}
    for name, value in forms.items():
        print(f"{name:18} {value:6.1f}{'  known' if name in q.KNOWN else ''}")
    for say, known in (("known", True), ("others", False)):
        print(f"{say}: mean {np.mean([v for k, v in forms.items() if (k in q.KNOWN) == known]):.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--examine", action="store_true", help="only print what the shipped init knows")
    parser.add_argument("--variants", default="96x190x10x3")
    parser.add_argument("--procs", type=int, default=1, help="processes that render")
    parser.add_argument("--pictures", type=int, default=60_000, help="two rows are made of each")
    parser.add_argument("--epochs", type=int, default=4, help="of the language model")
    parser.add_argument("--batch", type=int, default=128, help="rows of a step of the language model")
    parser.add_argument("--tower-epochs", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--probe", action="store_true")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # the child process of one variant
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    if args.device == "cpu":
        torch.set_num_threads(1)
    if args.examine:
        return examine(torch.device(args.device))
    if args.out is None:
        parser.error("say where to with --out")
    if args.only:
        return variant(args.only, args)
    args.out.mkdir(parents=True, exist_ok=True)
    names = args.variants.split(",")
    device, start = torch.device(args.device), time.time()
    shard = draw_lessons(args.pictures, args.procs)
    np.savez(args.out / "lessons.npz", images=shard.images, labels=shard.labels)
    print(f"rendered {len(shard.images)} pictures in {time.time() - start:.0f} s", flush=True)
    for width in sorted({int(name.split("x")[0]) for name in names}):
        if not (args.out / f"tower{width}.pt").exists():
            tower = build_model(width=width).model.vision_tower.to(device)
            train_tower(tower, shard.images, shard.labels, device, args.tower_epochs)
            torch.save(tower.state_dict(), args.out / f"tower{width}.pt")
    children = [subprocess.Popen([sys.executable, *sys.argv, "--only", name]) for name in names]
    if any(child.wait() for child in children):
        sys.exit("a variant failed: see above")
    (args.out / "lessons.npz").unlink()
    print(f"done in {time.time() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
