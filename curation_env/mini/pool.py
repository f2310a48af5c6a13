"""Make the pool of a world: clean rows, the faults of their sources, near-duplicates and planted evaluation leaks."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from curation_env.mini import language as say
from curation_env.mini import questions as q
from curation_env.mini.fingerprint import libraries
from curation_env.mini.render import ClipArt, Picture, alter, encode_png, pixels
from curation_env.mini.student import count_supervised, vocabulary
from curation_env.mini.suite import Item, suite_items
from curation_env.mini.world import GENERATOR, MINI, Scale, Source, WorldSpec
from curation_env.pool import Pool, publish, write_pool

ALTERATIONS = ("reencoded", "cropped", "recolored")
OPENERS = (
    "well", "please", "hello", "look", "so", "tell", "let", "know", "think", "like", "can", "today", "welcome", "very",
)  # fmt: skip


@dataclass
class Row:
    """A row in the making: `picture` or ready `image` pixels, its exchanges, and the truth about it."""

    source: str
    picture: Picture | ClipArt | None
    turns: list[q.Ask]
    skill: str
    fault: str = ""
    image: np.ndarray | None = None
    leak_of: str = ""
    leak_kind: str = ""
    original: Row | None = None

    def pixels(self) -> np.ndarray | None:
        if self.image is not None:
            return self.image
        return pixels(self.picture) if self.picture is not None else None

    @property
    def conversation(self) -> list[dict[str, str]]:
        return [{"user": ask.question, "assistant": ask.answer} for ask in self.turns]


def _text_row(rng: random.Random, source: str, form: str, turns: int) -> Row:
    if form == "chat":
        pairs = [say.chat_turn(rng) for _ in range(rng.randrange(1, turns + 1))]
        return Row(source, None, [q.Ask(u, a, ()) for u, a in pairs], "chat")
    if form == "trivial":
        picture = say.draw_scene(rng, False, 1)
        return Row(
            source, picture, [q.Ask("is this an image ?", "yes", q.YES_NO)] * rng.randrange(1, turns + 1), "trivial"
        )
    ask = q.fact_open(rng) if form == "fact" else q.choice(rng, q.fact_ask(rng))
    return Row(source, None, [ask], "science")


TEXT_FORMS = ("chat", "trivial", "fact", "choice:fact")


def _clean_row(rng: random.Random, source: Source) -> Row:
    row = _drawn_row(rng, source)
    if source.wordings and row.picture is not None and row.skill != "trivial" and rng.random() < source.wordings:
        opening = " ".join(rng.sample(OPENERS, 2))
        row.turns = [replace(ask, question=f"{opening} , {ask.question}") for ask in row.turns]
    return row


def _drawn_row(rng: random.Random, source: Source) -> Row:
    form = rng.choices(list(source.forms), list(source.forms.values()))[0]
    if form in TEXT_FORMS:
        return _text_row(rng, source.name, form, source.turns)
    base = form.removeprefix("choice:")
    picture, ask = _clip_art(rng, base) if base in q.CLIP_ART_FORMS else q.draw_ask(rng, base, False)
    if form != base:
        return Row(source.name, picture, [q.choice(rng, ask)], "choice")
    asks = [ask]
    kind = q.POOL_FORMS[base][0]
    same = [f for f in source.forms if f in q.POOL_FORMS and q.POOL_FORMS[f][0] == kind]
    for _ in range(rng.randrange(source.turns)):
        more = q.ask(rng, rng.choice(same), picture)
        if more is not None and all(more.question != a.question for a in asks):
            asks.append(more)
    return Row(source.name, picture, asks, q.POOL_FORMS[base][1])


def _clip_art(rng: random.Random, form: str) -> tuple[Picture | ClipArt, q.Ask]:
    picture = say.draw_clip_art(rng)
    ask = q.ask(rng, form, picture)
    assert ask is not None, "every piece of clip art allows every question"
    return picture, ask


def _garbage(rng: random.Random) -> str:
    return " ".join(rng.choice(_WORDS) for _ in range(rng.randrange(3, 9)))


_WORDS = [w for w in vocabulary()[7:] if w.isalpha()]


def _wrong(rng: random.Random, row: Row) -> Row | None:
    if not all(a.answers for a in row.turns):  # a description: take that of another picture
        return _mismatch(rng, row)
    return replace(row, turns=[replace(a, answer=a.wrong(rng)) for a in row.turns])


def _mismatch(rng: random.Random, row: Row) -> Row | None:
    if row.picture is None:
        return None
    if isinstance(row.picture, ClipArt):
        return replace(row, picture=say.draw_clip_art(rng))
    kind = type(row.picture).__name__.lower()
    return replace(row, picture=q.DRAW[kind](rng, False))


def _answers(make: Callable[[random.Random, q.Ask], str]) -> Callable[[random.Random, Row], Row | None]:
    def spoil(rng: random.Random, row: Row) -> Row | None:
        return replace(row, turns=[replace(a, answer=make(rng, a)) for a in row.turns])

    return spoil


def _verbose(rng: random.Random, row: Row) -> Row | None:
    if any(len(a.answer.split()) > 3 for a in row.turns):
        return None
    return replace(row, turns=[replace(a, answer=rng.choice(say.VERBOSE).format(a=a.answer)) for a in row.turns])


FAULTS: dict[str, Callable[[random.Random, Row], Row | None]] = {
    "wrong": _wrong,
    "mismatch": _mismatch,
    "garbage": _answers(lambda rng, ask: _garbage(rng)),
    "refusal": _answers(lambda rng, ask: rng.choice(say.REFUSALS)),
    "verbose": _verbose,
    "offtopic": _answers(lambda rng, ask: say.chat_turn(rng)[1]),
}


def _source_rows(rng: random.Random, source: Source, n: int) -> list[Row]:
    rows: list[Row] = []
    while len(rows) < n:
        if rows and rng.random() < source.duplicates:
            rows.append(_near_duplicate(rng, rng.choice(rows)))
            continue
        row = _clean_row(rng, source)
        draw = rng.random()
        for fault, rate in source.faults.items():
            if draw < rate:
                spoiled = FAULTS[fault](rng, row)
                if spoiled is not None:
                    row = replace(spoiled, fault=fault)
                break
            draw -= rate
        if row.skill == "trivial":
            row.fault = "trivial"
        rows.append(row)
    return rows


def _near_duplicate(rng: random.Random, row: Row) -> Row:
    """The same exchange over an altered copy of the image (over the same words, where there is no image)."""
    image = row.pixels()
    altered = alter(image, rng.choice(ALTERATIONS), rng) if image is not None else None
    return replace(row, image=altered, original=row.original or row)


def _leaks(rng: random.Random, scale: Scale, sources: list[Source]) -> list[Row]:
    """Plant benchmark items, a few of every kind, under the sources' names."""
    items = suite_items(scale)
    # A short answer over another picture is no leak: clean rows give it too.
    long = [i for b in ("MiniLLaVABench", "MiniMMVet") for i in items[b] if len(i.gold.split()) > 8]
    asked = [i for b in items.values() for i in b if i.image_of is None]
    fact = [i for i in items["MiniMMMU"] if i.columns["category"] == "Science"]
    choices = [i for b in ("MiniMMBench", "MiniMMStar") for i in items[b] if i.image_of is None]
    kinds: list[tuple[str, list[Item]]] = [
        ("item", asked), *((f"image+question:{a}", asked) for a in ALTERATIONS),
        ("image+answer:other question", long), ("image+question:open", choices),
        ("question+answer:other image", long), ("question+answer:no image", fact),
    ]  # fmt: skip
    taken: set[tuple[str, str]] = set()
    rows = []
    for k in range(scale.leaks):
        kind, among = kinds[k % len(kinds)]
        item = rng.choice([i for i in among if (i.benchmark, i.index) not in taken])
        taken.add((item.benchmark, item.index))
        rows.append(_leak(rng, kind, item, rng.choice(sources).name))
    return rows


def _leak(rng: random.Random, kind: str, item: Item, source: str) -> Row:
    ask = q.Ask(item.prompt, item.gold, ())
    row = Row(source, item.picture, [ask], "leak", "leak", leak_of=f"{item.benchmark}/{item.index}", leak_kind=kind)
    if kind.startswith("image+question:") and kind.split(":")[1] in ALTERATIONS:
        return replace(row, image=alter(pixels(item.picture), kind.split(":")[1], rng))
    if kind == "image+answer:other question":
        return replace(row, turns=[replace(ask, question="can you tell me about the image ?")])
    if kind == "image+question:open":
        right = str(item.columns[str(item.columns["answer"])])
        return replace(row, turns=[replace(ask, question=str(item.columns["question"]), answer=right)])
    if kind == "question+answer:other image":
        return replace(row, picture=say.draw_scene(rng, False))
    if kind == "question+answer:no image":
        return replace(row, picture=None)
    return row


def world_rows(world: WorldSpec, scale: Scale = MINI) -> list[Row]:
    """Return all rows of a world in pool order."""
    rng = random.Random(f"curation pool {GENERATOR} {scale.name} {world.seed}")
    sources = list(world.sources)
    leaks = _leaks(rng, scale, sources)
    clean = scale.pool_rows - len(leaks)
    edges = np.rint(np.cumsum([0.0] + [s.share for s in sources]) * clean).astype(int)
    rows = [row for k, s in enumerate(sources) for row in _source_rows(rng, s, int(edges[k + 1] - edges[k]))]
    rows += leaks
    rng.shuffle(rows)
    return rows


def pool_key(world: int, scale: Scale = MINI) -> str:
    return f"{scale.name}-v{GENERATOR}-w{world}"


def build_pool(world: int | WorldSpec, path: str | Path, scale: Scale = MINI) -> str:
    """Write the pool of a world and its `truth.parquet`, as a whole or not at all; return the pool's hash.

    `truth.parquet` (id, skill, fault, leak_of, leak_kind, duplicate_of; in pool order) is for tests and calibration
    alone.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    spec = WorldSpec.draw(world) if isinstance(world, int) else world
    rows = world_rows(spec, scale)

    def records() -> Any:
        for k, row in enumerate(rows):
            image = row.pixels()
            stored = {"bytes": encode_png(image), "path": f"{row.source}/{k:06d}.png"} if image is not None else None
            conversation = row.conversation
            yield {
                "source": row.source,
                "image": stored,
                "conversation": conversation,
                "n_tokens": count_supervised(conversation),
            }

    meta = {"generator": GENERATOR, "world": spec.seed, "world_hash": spec.hash, "libraries": libraries()}
    path = Path(path)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.whole.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    digest = write_pool(scratch, records(), key=pool_key(spec.seed, scale), meta=meta)
    ids = Pool.open(scratch).ids
    place = {id(row): k for k, row in enumerate(rows)}
    truth = {
        "id": ids,
        "skill": [r.skill for r in rows],
        "fault": [r.fault for r in rows],
        "leak_of": [r.leak_of for r in rows],
        "leak_kind": [r.leak_kind for r in rows],
        "duplicate_of": [ids[place[id(r.original)]] if r.original is not None else "" for r in rows],
    }
    pq.write_table(pa.table(truth), scratch / "truth.parquet")
    publish(scratch, path)
    return digest
