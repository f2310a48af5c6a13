"""What the init is taught, as rows of text over pictures: captions and statements, known questions, facts, some chat."""

from __future__ import annotations

import random
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import numpy as np

from curation_env.mini import language as say
from curation_env.mini import questions as q
from curation_env.mini.render import Picture, patches, pixels
from curation_env.mini.student import count_supervised, vocabulary, words

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


def known_turns(rng: random.Random, picture: Picture) -> list[tuple[str, str]]:
    """Two questions of the known forms about a scene."""
    asks = [q.ask(rng, form, picture) for form in rng.sample(q.KNOWN, 2)]
    return [(a.question, a.answer) for a in asks if a is not None]


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


def lesson(rng: random.Random, number: int, picture: Picture, known: float) -> Lesson:
    """One row about a picture, or about none: the shares of the mixture are here."""
    draw = rng.random()
    if draw < 0.04:
        return encode(-1, [say.chat_turn(rng)])
    if draw < 0.10:
        said = [say.fact(rng.choice(list(say.CATEGORY))) for _ in range(3)]
        return encode(-1, [("", " ".join(said))])
    if draw < 0.15:
        return encode(-1, [binding(rng)])
    if draw < 0.15 + known and isinstance(picture, say.Scene):
        turns = known_turns(rng, picture)
        if turns:
            return encode(number, turns)
    if rng.random() < 0.2:
        return encode(number, [("", say.caption(picture))])
    said = say.statements(picture)
    return encode(number, [("", " ".join(rng.sample(said, min(len(said), rng.choice((2, 3))))))])


def _shard(job: tuple[int, int, int, float]) -> Shard:
    seed, start, n, known = job
    rng = random.Random(f"lessons {seed} {start}")
    images, labels, lessons = [], [], []
    for number in range(start, start + n):
        picture = q.DRAW[rng.choice(KINDS)](rng, False)
        images.append(pixels(picture))
        labels.append(patches(picture))
        lessons += [lesson(rng, number, picture, known) for _ in range(2)]
    return Shard(np.stack(images), np.stack(labels), lessons)


def draw_lessons(pictures: int, known: float, procs: int, seed: int = 0) -> Shard:
    """Draw pictures and two rows for each, over several processes; the result does not depend on how many."""
    size = 1000
    jobs = [(seed, start, min(size, pictures - start), known) for start in range(0, pictures, size)]
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


def supervised_tokens(lessons: list[Lesson]) -> int:
    return sum(sum(lesson.supervised) for lesson in lessons)


__all__ = [
    "IMAGE_TOKENS",
    "Lesson",
    "Shard",
    "count_supervised",
    "draw_lessons",
    "encode",
    "last_tune",
    "supervised_tokens",
]
