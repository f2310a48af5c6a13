"""The eight benchmarks of the miniature, as VLMEvalKit TSV files: one suite for all worlds."""

from __future__ import annotations

import base64
import csv
import functools
import hashlib
import io
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from curation_env.mini import language as say
from curation_env.mini import questions as q
from curation_env.mini.fingerprint import libraries
from curation_env.mini.render import Chart, Picture, Scene, Sign, encode_png, pixels
from curation_env.mini.world import MINI, SUITE, Scale

COPY = 1_000_000  # a circular copy's index is the family's plus a multiple of this


@dataclass(frozen=True)
class Item:
    """One row of a benchmark.

    Attributes:
        prompt: What a student is asked, options included.
        gold: What it should say, as the pool would put it.
        columns: The TSV row without its image.
        image_of: Index of the row that holds the image, where that is another one (circular copies).
    """

    benchmark: str
    picture: Picture
    prompt: str
    gold: str
    columns: dict[str, object] = field(hash=False)
    image_of: int | None = None

    @property
    def index(self) -> str:
        return str(self.columns["index"])


def _open(benchmark: str, index: object, picture: Picture, ask: q.Ask, **columns: object) -> Item:
    columns = {"index": index, "question": ask.question, "answer": ask.answer, **columns}
    return Item(benchmark, picture, ask.question, ask.answer, columns)


def _choice(benchmark: str, index: int, picture: Picture, ask: q.Ask, rng: random.Random, **columns: object) -> Item:
    table, right = q.options(rng, ask)
    row = {"index": index, "question": ask.question, **table, "answer": right, **columns}
    return Item(benchmark, picture, q.choice_text(ask.question, table), table[right], row)


def _hallusion(rng: random.Random, n: int) -> list[Item]:
    """Sets of three yes/no questions asked of two figures that differ, grouped as HallusionBench's are."""
    makers: list[tuple[str, Callable[[random.Random], list[tuple[Picture, list[q.Ask]]]]]] = [
        ("exist", _exist_set), ("relation", _relation_set), ("ocr", _sign_set), ("chart", _chart_set),
    ]  # fmt: skip
    items = []
    for number in range(n // 6):
        kind, make = makers[number % 4]
        category = "VD" if kind in ("exist", "relation") else "VS"
        for figure, (picture, asks) in enumerate(make(rng)):
            for k, ask in enumerate(asks):
                index = f"hallusion_{category}_{kind}_{number}_{figure}_{k}"
                columns = {
                    "category": category,
                    "l2-category": kind,
                    "set_id": number,
                    "figure_id": figure,
                    "question_id": k,
                }
                answer = ask.answer.capitalize()
                item = _open("MiniHallusion", index, picture, replace(ask, answer=answer), **columns)
                items.append(replace(item, gold=ask.answer))
    return items


def _yes_no(question: str, truth: bool) -> q.Ask:
    return q.Ask(question, "yes" if truth else "no", q.YES_NO)


def _exist_set(rng: random.Random) -> list[tuple[Picture, list[q.Ask]]]:
    scenes = [say.draw_scene(rng, True, 3), say.draw_scene(rng, True, 3)]
    shown = [[say.name(t) for _, t in say.things(s)] for s in scenes]
    asked = [rng.choice(shown[0]), rng.choice(shown[1])]
    asked.append(rng.choice([n for n in q.NAMES if n not in asked]))
    return [
        (s, [_yes_no(f"is there a {n} ?", n in names) for n in asked]) for s, names in zip(scenes, shown, strict=True)
    ]


def _relation_set(rng: random.Random) -> list[tuple[Picture, list[q.Ask]]]:
    """The second figure holds the same things in other places."""
    while True:
        scene = say.draw_scene(rng, True, 3)
        for _ in range(20):
            cells = rng.sample(scene.cells, 4)
            other = Scene(tuple(cells), replace(scene.look, tint=scene.look.tint[::-1]))
            layout = [(t.shape, t.size) if t else None for t in cells]
            ahead, behind = ({(d, a, b) for d, a, b in say.relations(s)} for s in (scene, other))
            differ = sorted(ahead ^ behind, key=repr)
            if say.held_for_suite(layout) and len(differ) >= 3:
                asked = rng.sample(differ, 3)
                text = [f"is the {say.name(b)} {d} the {say.name(a)} ?" for d, a, b in asked]
                return [
                    (s, [_yes_no(t, r in true) for t, r in zip(text, asked, strict=True)])
                    for s, true in ((scene, ahead), (other, behind))
                ]


def _sign_set(rng: random.Random) -> list[tuple[Picture, list[q.Ask]]]:
    """The second sign differs in one letter."""
    first = say.draw_sign(rng, True)
    while True:
        second = say.draw_sign(rng, True)
        if sum(a != b for a, b in zip(first.letters, second.letters, strict=True)) == 1:
            break
    second = Sign(second.letters, first.color, first.drop, second.look)
    third = say.draw_sign(rng, True).letters
    asked = [first.letters, second.letters, third]
    return [
        (s, [_yes_no(f"does the sign say {a} {b} ?", (a, b) == s.letters) for a, b in asked]) for s in (first, second)
    ]


def _chart_set(rng: random.Random) -> list[tuple[Picture, list[q.Ask]]]:
    """The second chart has the same bars with the heights in another order."""
    while True:
        chart = say.draw_chart(rng, True)
        colors, levels = [c for c, _ in chart.bars], [h for _, h in chart.bars]
        if len(colors) < 3:
            continue
        other = rng.sample(levels, len(levels))
        if other != levels and say.held_for_suite(other):
            break
    pairs = rng.sample([(a, b) for a in colors for b in colors if a != b], 3)
    figures = [chart, Chart(tuple(zip(colors, other, strict=True)), replace(chart.look, tint=chart.look.tint[::-1]))]
    return [
        (c, [_yes_no(f"is the {a} bar taller than the {b} bar ?", dict(c.bars)[a] > dict(c.bars)[b]) for a, b in pairs])
        for c in figures
    ]


def _llavabench(rng: random.Random, n: int) -> list[Item]:
    kinds = (("conv", ("describe", "region", "relation")), ("detail", ("detail",)), ("complex", ("explain",)))
    items = []
    for k in range(n):
        category, forms = kinds[k % 3]
        while True:
            picture = say.draw_scene(rng, True, rng.choice((3, 4)))
            ask = q.ask(rng, rng.choice(forms), picture)
            if ask is not None:
                break
        extra = {"gpt4_ans": ask.answer, "caption": say.detail(picture), "category": category}
        items.append(_open("MiniLLaVABench", k, picture, ask, **extra))
    return items


def _mmbench(rng: random.Random, n: int) -> list[Item]:
    """Families of four rows: every copy turns the options by one place, as MMBench's circular evaluation asks."""
    forms = {
        "color": "attribute_recognition",
        "shape": "attribute_recognition",
        "where": "object_localization",
        "count": "object_localization",
        "relation": "spatial_relationship",
        "letter": "ocr",
        "extreme": "attribute_comparison",
    }
    items = []
    for k in range(n):
        form = list(forms)[k % len(forms)]
        picture, ask = q.draw_ask(rng, form, True)
        table, right = q.options(rng, ask)
        texts = list(table.values())
        gold = table[right]
        for turn in range(4):
            turned = dict(zip("ABCD", texts[turn:] + texts[:turn], strict=True))
            answer = next(key for key, text in turned.items() if text == gold)
            row = {
                "index": k + COPY * turn, "question": ask.question, **turned, "answer": answer,
                "category": forms[form], "l2-category": q.FORMS[form][1], "split": "dev",
            }  # fmt: skip
            prompt, spoken = q.choice_text(ask.question, turned), turned[answer]
            items.append(Item("MiniMMBench", picture, prompt, spoken, row, k if turn else None))
    return items


def _mmmu(rng: random.Random, n: int) -> list[Item]:
    items = []
    for k in range(n):
        subject = ("Science", "Math", "Business", "Science")[k % 4]
        if subject == "Science":
            picture: Picture = say.draw_scene(rng, True)
            ask = q.fact_ask(rng)
        else:
            picture, ask = q.draw_ask(
                rng, rng.choice({"Math": ("total", "larger"), "Business": ("extreme", "height")}[subject]), True
            )
        items.append(
            _choice(
                "MiniMMMU", k, picture, ask, rng, category=subject, **{"l2-category": subject, "split": "validation"}
            )
        )
    return items


def _mmstar(rng: random.Random, n: int) -> list[Item]:
    kinds = {
        "coarse perception": ("count", "bars"),
        "fine-grained perception": ("color", "size"),
        "instance reasoning": ("relation", "region"),
        "logical reasoning": ("extreme", "larger"),
        "science & technology": ("letter", "digit"),
        "math": ("height", "total"),
    }
    items = []
    for k in range(n):
        category = list(kinds)[k % len(kinds)]
        form = rng.choice(kinds[category])
        picture, ask = q.draw_ask(rng, form, True)
        items.append(_choice("MiniMMStar", k, picture, ask, rng, category=category, **{"l2-category": form}))
    return items


def _mmvet(rng: random.Random, n: int) -> list[Item]:
    """Open answers, graded; elements that must all be there are joined by <AND>."""
    kinds = (
        ("rec,spat", "relation"),
        ("rec", "describe"),
        ("ocr", "read"),
        ("ocr,math", "total"),
        ("rec,gen", "detail"),
        ("ocr,spat", "letter"),
    )
    items = []
    for k in range(n):
        category, form = kinds[k % len(kinds)]
        picture, ask = q.draw_ask(rng, form, True)
        answer = ask.answer
        if form == "relation":
            answer = "<AND>".join(ask.answer.split())
        item = _open("MiniMMVet", f"v1_{k}", picture, replace(ask, answer=answer), category=category)
        items.append(replace(item, gold=ask.answer))
    return items


def _mathvista(rng: random.Random, n: int) -> list[Item]:
    kinds = (
        ("total", "math word problem", "arithmetic reasoning"),
        ("larger", "textbook question answering", "numeric commonsense"),
        ("height", "figure question answering", "statistical reasoning"),
        ("digit", "visual question answering", "numeric commonsense"),
        ("count", "visual question answering", "numeric commonsense"),
        ("bars", "figure question answering", "statistical reasoning"),
        ("choice:extreme", "figure question answering", "statistical reasoning"),
        ("choice:height", "figure question answering", "statistical reasoning"),
    )
    items = []
    for k in range(n):
        form, task, skill = kinds[k % len(kinds)]
        picture, ask = q.draw_ask(rng, form.removeprefix("choice:"), True)
        columns: dict[str, object] = {"index": k, "task": task, "category": task, "skills": repr([skill])}
        if form.startswith("choice:"):
            table, right = q.options(rng, ask)
            prompt, gold = q.choice_text(ask.question, table), table[right]
            columns |= {
                "question": prompt,
                "answer": ask.answer,
                "answer_option": right,
                "choices": repr(list(table.values())),
            }
            columns |= {"question_type": "multi_choice", "answer_type": "text"}
        else:
            prompt, gold = ask.question, ask.answer
            columns |= {"question": prompt, "answer": gold, "answer_option": "", "choices": ""}
            columns |= {"question_type": "free_form", "answer_type": "integer"}
        items.append(Item("MiniMathVista", picture, prompt, gold, {**columns, "precision": "", "unit": ""}))
    return items


def _ocr(rng: random.Random, n: int) -> list[Item]:
    kinds = (
        ("Regular Text Recognition", "read"),
        ("Irregular Text Recognition", "read"),
        ("Handwriting Recognition", "digits"),
        ("Scene Text-centric VQA", "letter"),
        ("Key Information Extraction", "height"),
        ("Non-Semantic Text Recognition", "read"),
    )
    items = []
    for k in range(n):
        category, form = kinds[k % len(kinds)]
        picture, ask = q.draw_ask(rng, form, True)
        if category == "Irregular Text Recognition" and isinstance(picture, Sign):
            picture = replace(picture, drop=rng.choice(((-4, 4), (4, -4))))
        item = _open("MiniOCR", k, picture, ask, category=category)
        items.append(replace(item, columns={**item.columns, "answer": repr([ask.answer])}))
    return items


BENCHMARKS: dict[str, Callable[[random.Random, int], list[Item]]] = {
    "MiniHallusion": _hallusion,
    "MiniLLaVABench": _llavabench,
    "MiniMMBench": _mmbench,
    "MiniMMMU": _mmmu,
    "MiniMMStar": _mmstar,
    "MiniMMVet": _mmvet,
    "MiniMathVista": _mathvista,
    "MiniOCR": _ocr,
}


@functools.cache
def _items(scale: Scale) -> dict[str, list[Item]]:
    return {
        name: make(random.Random(f"curation suite {SUITE} {name}"), scale.items[name])
        for name, make in BENCHMARKS.items()
    }


def suite_items(scale: Scale = MINI) -> dict[str, list[Item]]:
    """All items of the suite by benchmark, nothing rendered yet."""
    return _items(scale)


def suite_key(scale: Scale = MINI) -> str:
    return f"{scale.name}-v{SUITE}"


def image_bytes(picture: Picture) -> bytes:
    return encode_png(pixels(picture))


def build_suite(path: str | Path, scale: Scale = MINI) -> str:
    """Write `<Benchmark>.tsv` and `meta.json` into a folder and return the suite's hash (sha256 over the files)."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    hasher = hashlib.sha256()
    for name, items in suite_items(scale).items():
        columns = list(dict.fromkeys(["index", "image", *(c for item in items for c in item.columns)]))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, delimiter="\t", lineterminator="\n")
        writer.writeheader()
        for item in items:
            held = item.image_of  # VLMEvalKit: a short image field is the index of the row that holds the image
            image = str(held) if held is not None else base64.b64encode(image_bytes(item.picture)).decode()
            writer.writerow({**item.columns, "image": image})
        data = text.getvalue().encode()
        (path / f"{name}.tsv").write_bytes(data)
        hasher.update(name.encode() + b"\0" + data)
    meta = {
        "key": suite_key(scale),
        "hash": hasher.hexdigest(),
        "libraries": libraries(),
        "items": {name: len(items) for name, items in suite_items(scale).items()},
    }
    (path / "meta.json").write_text(json.dumps(meta, indent=1, sort_keys=True))
    return hasher.hexdigest()
