"""What the init is taught, as rows of text over pictures: statements, captions, known questions, facts, some chat."""

from __future__ import annotations

import random
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import numpy as np

from curation_env.mini import language as say
from curation_env.mini import questions as q
from curation_env.mini.render import COLORS, LETTERS, LEVELS, SHAPES, SIZES, Picture, patches, pixels
from curation_env.mini.student import vocabulary, words

IMAGE_TOKENS = 16
KINDS = ("scene", "scene", "scene", "sign", "digits", "chart")


class Lesson(NamedTuple):
    """One row: the picture's number (-1 for none), token ids, and which of them are supervised."""

    picture: int
    ids: list[int]
    supervised: list[bool]


class Shard(NamedTuple):
    images: np.ndarray  # uint8 (n, 32, 32, 3)
    labels: np.ndarray  # int8 (n, 16, 3)
    lessons: list[Lesson]


_INDEX = {w: k for k, w in enumerate(vocabulary())}


def encode(picture: int, turns: list[tuple[str, str]]) -> Lesson:
    """Write a conversation as the recipe's chat does: "USER: <image> q ASSISTANT: a </s>"."""
    ids: list[int] = []
    supervised: list[bool] = []
    for k, (user, assistant) in enumerate(turns):
        head = ["USER:", *(["<image>"] * IMAGE_TOKENS if picture >= 0 and k == 0 else []), *words(user), "ASSISTANT:"]
        tail = [*words(assistant), "</s>"]
        ids += [_INDEX[w] for w in head + tail]
        supervised += [False] * len(head) + [True] * len(tail)
    return Lesson(picture, ids, supervised)


def known_turns(rng: random.Random, picture: Picture, n: int) -> list[tuple[str, str]]:
    """Up to `n` different questions of the known forms about a scene."""
    turns: dict[str, str] = {}
    for form in rng.sample(q.KNOWN * 2, n):
        found = q.ask(rng, form, picture)
        if found is not None:
            turns.setdefault(found.question, found.answer)
    return list(turns.items())


def binding(rng: random.Random) -> tuple[str, str]:
    """Lettered options restated: what a letter stands for is known, answering with one is not."""
    pools = (
        list(say.CATEGORY),
        list(say.FACTS),
        list(q.COLORS),
        list(q.SHAPES),
        list(q.NUMBERS),
        list(q.PLACES),
        list(q.LETTERS),
    )
    texts = rng.sample(rng.choice(pools), 4)
    table = dict(zip("ABCD", texts, strict=True))
    order = rng.sample("ABCD", 2)
    user = " ".join(f"{k}. {v}" for k, v in table.items())
    return user, " , ".join(f"{k} is {table[k]}" for k in order) + " ."


def lesson(rng: random.Random, number: int, picture: Picture) -> Lesson:
    """One row about a picture, or about none: the shares of the mixture are here.

    Many questions on one picture, and lists of statements: where little is supervised, binding is not learned.
    """
    draw = rng.random()
    if draw < 0.03:
        return encode(-1, [say.chat_turn(rng)])
    if draw < 0.06:
        said = [say.fact(rng.choice(list(say.CATEGORY))) for _ in range(4)]
        return encode(-1, [("", " ".join(said))])
    if draw < 0.10:
        return encode(-1, [binding(rng)])
    if draw < 0.65 and isinstance(picture, say.Scene):
        return encode(number, known_turns(rng, picture, 6))
    if rng.random() < 0.15:
        return encode(number, [("", say.caption(picture))])
    said = say.statements(picture)
    return encode(number, [("", " ".join(rng.sample(said, min(len(said), 4))))])


def spoken(labels: np.ndarray) -> np.ndarray:
    """Word ids that say what each patch shows and where it lies, -1 for none: int of shape (n, 16, 5)."""
    contents = [-1, *(_INDEX[w] for w in (*SHAPES, *LETTERS, *map(str, range(10)), "bar"))]
    colors = [-1, *(_INDEX[w] for w in COLORS)]
    extents = [-1, *(_INDEX[w] for w in (*SIZES, *map(str, range(1, LEVELS + 1))))]
    place = np.array(
        [[_INDEX["top" if k < 8 else "bottom"], _INDEX["left" if k % 4 < 2 else "right"]] for k in range(16)]
    )
    shown = [np.array(table)[labels[..., j]] for j, table in enumerate((contents, colors, extents))]
    return np.concatenate([np.stack(shown, axis=-1), np.broadcast_to(place, (len(labels), 16, 2))], axis=-1)


def _shard(job: tuple[int, int, int]) -> Shard:
    seed, start, n = job
    rng = random.Random(f"lessons {seed} {start}")
    images, labels, lessons = [], [], []
    for number in range(start, start + n):
        picture = q.DRAW[rng.choice(KINDS)](rng, False)
        images.append(pixels(picture))
        labels.append(patches(picture))
        lessons += [lesson(rng, number, picture) for _ in range(2)]
    return Shard(np.stack(images), np.stack(labels), lessons)


def draw_lessons(pictures: int, procs: int, seed: int = 0) -> Shard:
    """Draw pictures and two rows for each, over several processes; the result does not depend on how many."""
    size = 1000
    jobs = [(seed, start, min(size, pictures - start)) for start in range(0, pictures, size)]
    if procs == 1:
        shards = [_shard(job) for job in jobs]
    else:
        with ProcessPoolExecutor(procs) as pool:
            shards = list(pool.map(_shard, jobs))
    return Shard(
        np.concatenate([s.images for s in shards]),
        np.concatenate([s.labels for s in shards]),
        [lesson for s in shards for lesson in s.lessons],
    )


def last_tune(rng: random.Random, rows: int) -> tuple[list[Picture], list[Lesson]]:
    """Mixed rows of every form, so that unseen formats have a moderate loss."""
    forms = [*q.FORMS, "choice:color", "choice:relation", "choice:extreme", "choice:fact", "fact", "chat"]
    pictures: list[Picture] = []
    lessons = []
    for k in range(rows):
        form = forms[k % len(forms)]
        base = form.removeprefix("choice:")
        if form == "chat":
            lessons.append(encode(-1, [say.chat_turn(rng)]))
            continue
        if base == "fact":
            ask = q.choice(rng, q.fact_ask(rng)) if form != base else q.fact_open(rng)
            lessons.append(encode(-1, [(ask.question, ask.answer)]))
            continue
        picture, ask = q.draw_ask(rng, base, False)
        ask = q.choice(rng, ask) if form != base else ask
        lessons.append(encode(len(pictures), [(ask.question, ask.answer)]))
        pictures.append(picture)
    return pictures, lessons
