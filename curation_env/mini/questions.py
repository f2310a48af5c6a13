"""Question forms: every way in which the miniature asks about a picture, and what a right answer is.

A form takes a picture of its kind and returns an `Ask`, or None where the picture does not allow the question. The pool
and the benchmarks use the same forms over disjoint families of pictures; only the pool asks about clip art.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from curation_env.mini import language as say
from curation_env.mini.render import (
    COLORS,
    LETTERS,
    PLACES,
    SHAPES,
    SIZES,
    Chart,
    ClipArt,
    Digits,
    Picture,
    Scene,
    Sign,
    clip_art_set,
)

LETTER_HINT = "Answer with the option's letter from the given choices directly."
NUMBERS = tuple(str(k) for k in range(1, 8))


@dataclass(frozen=True)
class Ask:
    """A question, its answer, and every answer that could have been given (the wrong ones are drawn from these)."""

    question: str
    answer: str
    answers: tuple[str, ...]

    def wrong(self, rng: random.Random) -> str:
        return rng.choice([a for a in self.answers if a != self.answer])


Form = Callable[[random.Random, Any], "Ask | None"]  # each form takes its own kind of picture
YES_NO = ("yes", "no")
NAMES = tuple(f"{color} {shape}" for color in COLORS for shape in SHAPES)


def _unique(scene: Scene) -> list[tuple[int, say.Thing]]:
    shapes = [t.shape for _, t in say.things(scene)]
    return [(k, t) for k, t in say.things(scene) if shapes.count(t.shape) == 1]


def color_of(rng: random.Random, scene: Scene) -> Ask | None:
    if not (found := _unique(scene)):
        return None
    thing = rng.choice(found)[1]
    return Ask(f"what color is the {thing.shape} ?", thing.color, tuple(COLORS))


def shape_in(rng: random.Random, scene: Scene) -> Ask | None:
    place, thing = rng.choice(say.things(scene))
    return Ask(f"what shape is in the {PLACES[place]} ?", thing.shape, SHAPES)


def size_of(rng: random.Random, scene: Scene) -> Ask | None:
    thing = rng.choice(say.things(scene))[1]
    return Ask(f"what size is the {say.name(thing)} ?", thing.size, SIZES)


def exists(rng: random.Random, scene: Scene) -> Ask | None:
    present = [say.name(t) for _, t in say.things(scene)]
    if rng.random() < 0.5:
        return Ask(f"is there a {rng.choice(present)} ?", "yes", YES_NO)
    thing = rng.choice(say.things(scene))[1]  # a near miss: one of its two words is changed
    near = [f"{c} {thing.shape}" for c in COLORS] + [f"{thing.color} {s}" for s in SHAPES]
    return Ask(f"is there a {rng.choice([n for n in near if n not in present])} ?", "no", YES_NO)


def count(rng: random.Random, scene: Scene) -> Ask | None:
    return Ask("how many objects are there ?", str(len(say.things(scene))), ("1", "2", "3", "4"))


def where(rng: random.Random, scene: Scene) -> Ask | None:
    place, thing = rng.choice(say.things(scene))
    return Ask(f"where is the {say.name(thing)} ?", PLACES[place], PLACES)


def region(rng: random.Random, scene: Scene) -> Ask | None:
    place, thing = rng.choice(say.things(scene))
    answers = tuple(f"a {size} {n}" for size in SIZES for n in NAMES)
    return Ask(f"what is in the {PLACES[place]} ?", f"a {thing.size} {say.name(thing)}", answers)


def relation(rng: random.Random, scene: Scene) -> Ask | None:
    if not (found := say.relations(scene)):
        return None
    direction, anchor, other = rng.choice(found)
    return Ask(f"which object is {direction} the {say.name(anchor)} ?", say.name(other), NAMES)


def relation_yes_no(rng: random.Random, scene: Scene) -> Ask | None:
    if not (found := say.relations(scene)):
        return None
    direction, anchor, other = rng.choice(found)
    if rng.random() < 0.5:
        return Ask(f"is the {say.name(other)} {direction} the {say.name(anchor)} ?", "yes", YES_NO)
    return Ask(f"is the {say.name(anchor)} {direction} the {say.name(other)} ?", "no", YES_NO)


def describe(rng: random.Random, picture: Picture) -> Ask | None:
    question = rng.choice(("describe the image .", "what do you see ?"))
    return Ask(question, say.caption(picture), ())


def describe_detail(rng: random.Random, picture: Picture) -> Ask | None:
    return Ask("describe the image in detail .", say.detail(picture), ())


def explain(rng: random.Random, scene: Scene) -> Ask | None:
    """How the things lie to each other, in full sentences."""
    found = [r for r in say.relations(scene) if r[0] in ("left of", "above")]
    if not found:
        return None
    said = say.join([f"the {say.name(b)} is {d} the {say.name(a)}" for d, a, b in found[:2]])
    return Ask("how are the objects placed ?", said + " .", ())


def read(rng: random.Random, sign: Sign) -> Ask | None:
    answers = tuple(f"{a} {b}" for a in LETTERS for b in LETTERS)
    return Ask(rng.choice(("what does the sign say ?", "read the text .")), " ".join(sign.letters), answers)


def letter(rng: random.Random, sign: Sign) -> Ask | None:
    k = rng.randrange(2)
    return Ask(f"what is the {('first', 'second')[k]} letter ?", sign.letters[k], LETTERS)


def sign_color(rng: random.Random, sign: Sign) -> Ask | None:
    return Ask("what color is the sign ?", sign.color, tuple(COLORS))


def read_yes_no(rng: random.Random, sign: Sign) -> Ask | None:
    shown = list(sign.letters)
    if rng.random() < 0.5:
        return Ask(f"does the sign say {shown[0]} {shown[1]} ?", "yes", YES_NO)
    k = rng.randrange(2)
    shown[k] = rng.choice([c for c in LETTERS if c != shown[k]])
    return Ask(f"does the sign say {shown[0]} {shown[1]} ?", "no", YES_NO)


def digits(rng: random.Random, picture: Digits) -> Ask | None:
    a, b = picture.values
    return Ask("what digits are shown ?", f"{a} {b}", tuple(f"{x} {y}" for x in range(10) for y in range(10)))


def digit(rng: random.Random, picture: Digits) -> Ask | None:
    k = rng.randrange(2)
    return Ask(
        f"what is the {('first', 'second')[k]} digit ?", str(picture.values[k]), tuple(str(d) for d in range(10))
    )


def larger(rng: random.Random, picture: Digits) -> Ask | None:
    return Ask("which digit is larger ?", str(max(picture.values)), tuple(str(d) for d in range(10)))


def total(rng: random.Random, picture: Digits) -> Ask | None:
    return Ask("what is the sum of the digits ?", str(sum(picture.values)), tuple(str(d) for d in range(1, 18)))


def extreme(rng: random.Random, chart: Chart) -> Ask | None:
    ordered = sorted(chart.bars, key=lambda bar: bar[1])
    word, bar = rng.choice((("tallest", ordered[-1]), ("shortest", ordered[0])))
    return Ask(f"which bar is the {word} ?", bar[0], tuple(COLORS))


def height(rng: random.Random, chart: Chart) -> Ask | None:
    color, level = rng.choice(chart.bars)
    return Ask(f"how tall is the {color} bar ?", str(level), NUMBERS)


def bars(rng: random.Random, chart: Chart) -> Ask | None:
    return Ask("how many bars are there ?", str(len(chart.bars)), ("2", "3", "4"))


def taller_yes_no(rng: random.Random, chart: Chart) -> Ask | None:
    (a, high), (b, low) = rng.sample(chart.bars, 2)
    return Ask(f"is the {a} bar taller than the {b} bar ?", YES_NO[high < low], YES_NO)


@functools.cache
def _clip_art_names() -> dict[str, str]:
    """What each word of the clip art is called in a sentence; planets go by their bare names."""
    return {w: w if say.CATEGORY[w] == "planet" else say.a(w) for w in sorted(set(clip_art_set()[1]))}


def thing(rng: random.Random, picture: ClipArt) -> Ask:
    names = _clip_art_names()
    return Ask("what is this ?", names[picture.word], tuple(names.values()))


def kind(rng: random.Random, picture: ClipArt) -> Ask:
    return Ask("which kind of thing is this ?", say.CATEGORY[picture.word], tuple(say.FACTS))


def thing_yes_no(rng: random.Random, picture: ClipArt) -> Ask:
    names = _clip_art_names()
    if rng.random() < 0.5:
        return Ask(f"is this {names[picture.word]} ?", "yes", YES_NO)
    other = rng.choice([word for word in names if word != picture.word])
    return Ask(f"is this {names[other]} ?", "no", YES_NO)


FORMS: dict[str, tuple[str, str, Form]] = {  # form -> kind of picture, skill, function
    "color": ("scene", "attribute", color_of),
    "shape": ("scene", "attribute", shape_in),
    "size": ("scene", "attribute", size_of),
    "exists": ("scene", "existence", exists),
    "count": ("scene", "counting", count),
    "where": ("scene", "location", where),
    "region": ("scene", "region", region),
    "relation": ("scene", "relation", relation),
    "relation-yes-no": ("scene", "yes-no", relation_yes_no),
    "describe": ("scene", "caption", describe),
    "detail": ("scene", "detail", describe_detail),
    "explain": ("scene", "detail", explain),
    "read": ("sign", "reading", read),
    "letter": ("sign", "reading", letter),
    "sign-color": ("sign", "reading", sign_color),
    "sign-describe": ("sign", "text-caption", describe),
    "sign-detail": ("sign", "text-caption", describe_detail),
    "read-yes-no": ("sign", "yes-no", read_yes_no),
    "digits": ("digits", "digit", digits),
    "digit": ("digits", "digit", digit),
    "larger": ("digits", "digit", larger),
    "total": ("digits", "arithmetic", total),
    "extreme": ("chart", "chart", extreme),
    "height": ("chart", "chart", height),
    "bars": ("chart", "chart", bars),
    "taller-yes-no": ("chart", "yes-no", taller_yes_no),
}
CLIP_ART_FORMS: dict[str, tuple[str, str, Form]] = {  # of the pool alone: no benchmark asks, no lesson teaches them
    "thing": ("clip art", "clip art", thing),
    "kind": ("clip art", "clip art", kind),
    "thing-yes-no": ("clip art", "clip art", thing_yes_no),
}
POOL_FORMS = FORMS | CLIP_ART_FORMS
DRAW: dict[str, Callable[[random.Random, bool], Picture]] = {
    "scene": say.draw_scene,
    "sign": say.draw_sign,
    "digits": say.draw_digits,
    "chart": say.draw_chart,
}
KNOWN = ("color", "shape", "size", "exists", "count", "where", "region")  # what the init is pre-trained to answer


def draw_picture(rng: random.Random, form: str, suite: bool) -> Picture:
    return DRAW[FORMS[form][0]](rng, suite)


def ask(rng: random.Random, form: str, picture: Picture | ClipArt) -> Ask | None:
    return POOL_FORMS[form][2](rng, picture)


def draw_ask(rng: random.Random, form: str, suite: bool) -> tuple[Picture, Ask]:
    """Draw pictures until one allows the question."""
    while True:
        picture = draw_picture(rng, form, suite)
        found = ask(rng, form, picture)
        if found is not None:
            return picture, found


def options(rng: random.Random, found: Ask, n: int = 4) -> tuple[dict[str, str], str]:
    """Return lettered options and the letter of the right one."""
    others = [a for a in found.answers if a != found.answer]
    chosen = [*rng.sample(others, min(n - 1, len(others))), found.answer]
    rng.shuffle(chosen)
    table = dict(zip("ABCD", chosen, strict=False))
    return table, next(key for key, value in table.items() if value == found.answer)


def choice_text(question: str, table: dict[str, str]) -> str:
    """A multiple-choice question as LLaVA's training data and the evaluation prompt both write it."""
    return "\n".join([question, *(f"{key}. {value}" for key, value in table.items()), LETTER_HINT])


def choice(rng: random.Random, found: Ask) -> Ask:
    """The same question with lettered options; the answer is the right one's text.

    Looking up a letter is more than three layers of this width learn (it stayed at chance after 1,000 steps on nothing
    else); VLMEvalKit's rule takes an option's text as well.
    """
    table, right = options(rng, found)
    return Ask(choice_text(found.question, table), table[right], tuple(table.values()))


def fact_ask(rng: random.Random) -> Ask:
    """Which of some words belongs to a category: text alone decides."""
    category = rng.choice(list(say.FACTS))
    right = rng.choice(say.FACTS[category])
    others = tuple(w for w, c in say.CATEGORY.items() if c != category)
    return Ask(f"which of these is {say.a(category)} ?", right, (right, *others))


def fact_open(rng: random.Random) -> Ask:
    word = rng.choice(list(say.CATEGORY))
    return Ask(f"what kind of thing is {say.a(word)} ?", say.CATEGORY[word], tuple(say.FACTS))
