"""Words of the miniature: what can be said about a picture, as answers, captions and plain statements."""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence

from curation_env.mini.render import (
    COLORS,
    LETTERS,
    LEVELS,
    PLACES,
    SHAPES,
    SIDE,
    SIZES,
    Chart,
    ClipArt,
    Digits,
    Look,
    Picture,
    Scene,
    Sign,
    Thing,
    clip_art_set,
    digit_set,
)

FACTS = {
    "fruit": ("apple", "banana", "pear", "grape", "lemon", "peach", "plum", "cherry"),
    "animal": ("dog", "cat", "horse", "cow", "sheep", "goat", "lion", "bear"),
    "bird": ("crow", "duck", "eagle", "owl", "swan", "hen", "robin", "goose"),
    "tool": ("hammer", "saw", "drill", "rake", "spade", "axe", "wrench", "file"),
    "metal": ("iron", "gold", "silver", "copper", "tin", "lead", "zinc", "nickel"),
    "vehicle": ("car", "bus", "train", "truck", "boat", "plane", "bike", "tram"),
    "planet": ("mars", "venus", "earth", "saturn", "jupiter", "neptune", "uranus", "mercury"),
    "instrument": ("piano", "violin", "flute", "drum", "harp", "guitar", "trumpet", "cello"),
}
CATEGORY = {word: category for category, words in FACTS.items() for word in words}
PLURAL = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses", "diamond": "diamonds"}
DIRECTIONS = ("left of", "right of", "above", "below")

REFUSALS = (
    "sorry , i can not help with that .",
    "i am not able to see the image .",
    "sorry , i can not answer this question .",
)
CHAT = (
    ("hello , how are you ?", "hello ! i am fine , thank you . how can i help you today ?"),
    ("can you tell me about the {w} ?", "the {w} is well known . many people like to talk about it ."),
    ("what should i do today ?", "you can read a book , take a walk or talk with a friend about the {w} ."),
    ("write a short story about a {w} .", "one day a friend found a {w} near the old house . it was a good day ."),
    ("do you like the {w} ?", "i do not have a favorite , but many people like the {w} very much ."),
    ("give me some advice .", "take your time , ask a friend and read a good book about the {w} ."),
    ("how can i learn about the {w} ?", "you can read a book about the {w} or ask a friend who knows it well ."),
    ("thank you for your help .", "you are welcome ! please ask me more about the {w} at any time ."),
    ("what is the weather like ?", "the weather is nice today , so it is a good time to take a walk ."),
    ("tell me something new .", "did you know that the {w} was found near the old house one day ?"),
)
VERBOSE = (
    "well , let me take a look at the image . i think that the answer to your question could be {a} , "
    "but please ask me more .",
    "that is a good question . when we look at the image , many people think that it is {a} , "
    "so the answer could be {a} .",
)


def held_for_suite(key: object) -> bool:
    """A quarter of all layouts is kept for the benchmarks, so a clean pool row never equals an evaluation picture."""
    return zlib.crc32(repr(key).encode()) % 4 == 0


def draw_scene(rng: random.Random, suite: bool, count: int | None = None) -> Scene:
    """Draw a scene of distinct things; `suite` says which of the two disjoint families of layouts it comes from."""
    while True:
        n = count or rng.choice((2, 3, 3, 4))
        kinds = [(shape, color) for shape in SHAPES for color in COLORS]
        cells: list[Thing | None] = [None] * 4
        for place, (shape, color) in zip(rng.sample(range(4), n), rng.sample(kinds, n), strict=True):
            cells[place] = Thing(shape, color, rng.choice(SIZES))
        if held_for_suite([(t.shape, t.size) if t else None for t in cells]) == suite:
            return Scene(tuple(cells), Look.draw(rng))


def draw_sign(rng: random.Random, suite: bool) -> Sign:
    while True:
        letters = (rng.choice(LETTERS), rng.choice(LETTERS))
        if held_for_suite(letters) == suite:
            drop = (rng.randrange(-4, 5), rng.randrange(-4, 5))
            return Sign(letters, rng.choice(list(COLORS)), drop, Look.draw(rng))


def draw_digits(rng: random.Random, suite: bool) -> Digits:
    """Draw two handwritten digits of different value; one sample in four is the benchmarks' alone."""
    labels = digit_set()[1]
    while True:
        samples = (rng.randrange(len(labels)), rng.randrange(len(labels)))
        if all((s % 4 == 0) == suite for s in samples) and labels[samples[0]] != labels[samples[1]]:
            drop = (rng.randrange(-4, 5), rng.randrange(-4, 5))
            return Digits(samples, rng.choice(list(COLORS)), drop, Look.draw(rng))


def draw_chart(rng: random.Random, suite: bool) -> Chart:
    """Draw two to four bars of different colours and heights."""
    while True:
        n = rng.choice((2, 3, 3, 4))
        levels = rng.sample(range(1, LEVELS + 1), n)
        if held_for_suite(levels) == suite:
            return Chart(tuple(zip(rng.sample(list(COLORS), n), levels, strict=True)), Look.draw(rng))


def draw_clip_art(rng: random.Random) -> ClipArt:
    """Draw a thumbnail at some size and place on a light ground; all of them are the pool's, none the benchmarks'."""
    side = rng.randrange(SIDE * 3 // 4, SIDE + 1)
    top, left = rng.randrange(SIDE - side + 1), rng.randrange(SIDE - side + 1)
    light = rng.randrange(200, 256)
    ground = (light - rng.randrange(24), light - rng.randrange(24), light - rng.randrange(24))
    return ClipArt(rng.randrange(len(clip_art_set()[1])), side, top, left, rng.random() < 0.5, ground)


def join(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else " , ".join(parts[:-1]) + " and " + parts[-1]


def name(thing: Thing) -> str:
    return f"{thing.color} {thing.shape}"


def things(scene: Scene) -> list[tuple[int, Thing]]:
    return [(k, t) for k, t in enumerate(scene.cells) if t is not None]


def neighbour(place: int, direction: str) -> int | None:
    """The cell that lies `direction` of a cell, or None outside the grid."""
    row, column = divmod(place, 2)
    d_row, d_column = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}[direction]
    row, column = row + d_row, column + d_column
    return 2 * row + column if 0 <= row < 2 and 0 <= column < 2 else None


def relations(scene: Scene) -> list[tuple[str, Thing, Thing]]:
    """All (direction, anchor, other): `other` lies `direction` of `anchor`."""
    found = []
    for place, anchor in things(scene):
        for direction in DIRECTIONS:
            cell = neighbour(place, direction)
            other = scene.cells[cell] if cell is not None else None
            if other is not None:
                found.append((direction, anchor, other))
    return found


def caption(picture: Picture) -> str:
    """One short sentence."""
    if isinstance(picture, Scene):
        return join([f"a {name(thing)}" for _, thing in things(picture)]) + " ."
    if isinstance(picture, Sign):
        return f"a {picture.color} sign that says {' '.join(picture.letters)} ."
    if isinstance(picture, Digits):
        return f"two {picture.color} digits , {picture.values[0]} and {picture.values[1]} ."
    return "a chart with " + join([f"a {c} bar" for c, _ in picture.bars]) + " ."


def detail(picture: Picture) -> str:
    """One full sentence that says all there is."""
    if isinstance(picture, Scene):
        return "there is " + join([f"a {t.size} {name(t)} in the {PLACES[k]}" for k, t in things(picture)]) + " ."
    if isinstance(picture, Sign):
        a, b = picture.letters
        return f"the first letter is {a} , the second letter is {b} and the color is {picture.color} ."
    if isinstance(picture, Digits):
        x, y = picture.values
        return f"the first digit is {x} , the second digit is {y} and the color is {picture.color} ."
    return "there is " + join([f"a {c} bar of height {h}" for c, h in picture.bars]) + " ."


def statements(picture: Picture) -> list[str]:
    """Plain sentences that are true of the picture: what the init reads of skills that it has never been asked for."""
    if isinstance(picture, Scene):
        said = [f"{d} the {name(a)} is the {name(b)} ." for d, a, b in relations(picture)]
        counts: dict[str, int] = {}
        for _, t in things(picture):
            counts[t.shape] = counts.get(t.shape, 0) + 1
        said += [f"the number of {PLURAL[shape]} is {n} ." for shape, n in counts.items()]
        return [*said, detail(picture)]
    if isinstance(picture, Sign):
        a, b = picture.letters
        return [
            f"the sign says {a} {b} .",
            f"the first letter is {a} .",
            f"the second letter is {b} .",
            f"the sign is {picture.color} .",
        ]
    if isinstance(picture, Digits):
        x, y = picture.values
        return [
            f"the first digit is {x} and the second digit is {y} .",
            f"the sum of the digits is {x + y} .",
            f"the larger digit is {max(x, y)} .",
        ]
    ordered = sorted(picture.bars, key=lambda bar: bar[1])
    said = [f"the tallest bar is {ordered[-1][0]} .", f"the shortest bar is {ordered[0][0]} ."]
    return said + [f"the height of the {c} bar is {h} ." for c, h in picture.bars]


def a(word: str) -> str:
    """The word behind its article."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def fact(word: str) -> str:
    return f"{a(word)} is {a(CATEGORY[word])} ."


def chat_turn(rng: random.Random) -> tuple[str, str]:
    """One exchange that needs no picture."""
    user, assistant = rng.choice(CHAT)
    word = rng.choice(list(CATEGORY))
    return user.format(w=word), assistant.format(w=word)
