"""Worlds: which source carries which skills, how large it is, and what is wrong with it.

A world is drawn from its seed. World 0 is written down: it mirrors the shares of LLaVA-665K. Train worlds are the seeds
1 to 999,999, held-out test worlds start at 1,000,000. Worlds differ in what they ask for: scarce skills may have
sources of their own or hide inside large ones, questions may be worded alike or not, there may be many useless sources
or none, and the harm may have a high or a moderate loss.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.resources import files

GENERATOR = 2  # rises when any world or pool changes
SUITE = 1  # rises when any benchmark changes
TRAIN_WORLDS = range(1, 1_000_000)
TEST_WORLDS = range(1_000_000, 2_000_000)  # held out; tables use the first five
N_SOURCES = 14


@dataclass(frozen=True)
class Scale:
    """How much of a world is made; the sizes of the benchmarks count items (MiniMMBench: families of four)."""

    name: str
    pool_rows: int
    leaks: int
    items: Mapping[str, int] = field(hash=False)


MINI = Scale(
    "mini", 10_000, 36,
    {"MiniHallusion": 300, "MiniLLaVABench": 60, "MiniMMBench": 110, "MiniMMMU": 200, "MiniMMStar": 240,
     "MiniMMVet": 120, "MiniMathVista": 240, "MiniOCR": 240},
)  # fmt: skip
NANO = Scale(
    "nano", 1_000, 12,
    {"MiniHallusion": 36, "MiniLLaVABench": 16, "MiniMMBench": 9, "MiniMMMU": 32, "MiniMMStar": 32,
     "MiniMMVet": 24, "MiniMathVista": 32, "MiniOCR": 32},
)  # fmt: skip
SCALES = {scale.name: scale for scale in (MINI, NANO)}


@dataclass(frozen=True)
class Source:
    """One source of a pool.

    Attributes:
        name: What the pool shows; it tells nothing.
        share: Part of the pool's rows.
        forms: Question forms (see `questions.FORMS`, and the text forms of `pool`) with their weights.
        faults: Fault kind -> part of the source's rows.
        duplicates: Part of the rows that are near-duplicates of another row of the source.
        turns: Most questions that a row asks about its picture.
        wordings: Part of the rows about pictures that open with words of their own, as people do.
    """

    name: str
    share: float
    forms: Mapping[str, float]
    faults: Mapping[str, float] = field(default_factory=dict)
    duplicates: float = 0.0
    turns: int = 1
    wordings: float = 0.0


@dataclass(frozen=True)
class WorldSpec:
    """A world: its seed and its sources, in the order of their names."""

    seed: int
    sources: tuple[Source, ...]

    @classmethod
    def draw(cls, seed: int) -> WorldSpec:
        """Return world `seed`; the same seed gives the same world on every machine."""
        if seed < 0:
            raise ValueError(f"a world's seed is 0 or more, not {seed}")
        rng = random.Random(f"curation world {seed}")
        wordings = 0.0 if seed == 0 else random.Random(f"curation wordings {seed}").choice((0.0, 0.25))
        return _with_clip_art(_named(seed, _world_zero() if seed == 0 else _drawn(rng), rng, wordings))

    @property
    def hash(self) -> str:
        text = json.dumps([GENERATOR, asdict(self)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


@functools.cache
def generator_hash() -> str:
    """sha256 over the version, the clip art and the first ten train and test worlds: what tasks that draw worlds pin.

    What else a pool is made of (digits, fonts) its suite pins.
    """
    clip_art = (files("curation_env.mini") / "assets" / "clip_art.npz").read_bytes()
    drawn = [WorldSpec.draw(k).hash for k in (0, *TRAIN_WORLDS[:10], *TEST_WORLDS[:10])]
    text = json.dumps([GENERATOR, hashlib.sha256(clip_art).hexdigest(), drawn])
    return hashlib.sha256(text.encode()).hexdigest()


Parts = tuple[float, Mapping[str, float], Mapping[str, float], float, int]  # share, forms, faults, duplicates, turns
Group = tuple[float, Mapping[str, float], int]  # share, forms, turns

BUNDLES: dict[str, dict[str, float]] = {
    "attribute": {"color": 3, "shape": 3, "size": 2, "count": 2},
    "region": {"region": 1},
    "location": {"where": 1},
    "existence": {"exists": 1},
    "instruct": {"describe": 3, "detail": 4, "explain": 2, "color": 1, "exists": 1},
    "text-caption": {"sign-describe": 2, "sign-detail": 1},
    "relation": {"relation": 3, "relation-yes-no": 1},
    "reading": {"read": 4, "letter": 2, "sign-color": 1, "read-yes-no": 2},
    "chart": {"extreme": 3, "height": 3, "bars": 1, "taller-yes-no": 2},
    "digit": {"digits": 2, "digit": 2, "larger": 2, "total": 4},
    "science": {"fact": 1, "choice:fact": 3},
    "choice": {"choice:color": 2, "choice:shape": 1, "choice:where": 1, "choice:count": 1, "choice:relation": 1,
               "choice:extreme": 1, "choice:letter": 1},
}  # fmt: skip
CLIP_ART = {"thing": 0.5, "kind": 0.25, "thing-yes-no": 0.25}
KNOWN_BUNDLES = ("attribute", "region", "location", "existence")
SCARCE_BUNDLES = ("text-caption", "relation", "reading", "chart", "digit", "science", "choice")


def _world_zero() -> list[Parts]:
    mild = {"wrong": 0.01, "mismatch": 0.004, "garbage": 0.01, "refusal": 0.008, "verbose": 0.01}
    return [
        (0.23, BUNDLES["instruct"], {**mild, "verbose": 0.0}, 0.25, 3),
        (0.15, BUNDLES["attribute"], {**mild, "verbose": 0.04}, 0.10, 2),
        (0.13, BUNDLES["region"], mild, 0.20, 1),
        (0.10, {"chat": 1}, {"garbage": 0.02}, 0.20, 3),
        (0.09, BUNDLES["location"], {**mild, "refusal": 0.03}, 0.0, 1),
        (0.05, {"exists": 3, "choice:shape": 1}, mild, 0.0, 1),
        (0.07, BUNDLES["text-caption"], mild, 0.0, 1),
        (0.05, BUNDLES["relation"], {**mild, "wrong": 0.05}, 0.0, 1),
        (0.035, BUNDLES["reading"], {**mild, "mismatch": 0.03}, 0.0, 1),
        (0.02, BUNDLES["science"], mild, 0.0, 1),
        (0.02, BUNDLES["chart"], {**mild, "wrong": 0.05}, 0.0, 1),
        (0.02, BUNDLES["digit"], mild, 0.0, 1),
        (0.015, BUNDLES["choice"], mild, 0.0, 1),
        (0.02, {"color": 1, "region": 1, "relation": 1}, {"garbage": 0.7, "offtopic": 0.2}, 0.0, 1),
    ]


def _drawn(rng: random.Random) -> list[Parts]:
    """Draw the parts of a world; every knob on its own."""
    harmful = [kind for kind in sorted(_HARMFUL) if rng.random() < 0.35][:3]
    useless = [rng.choice(sorted(_USELESS)) for _ in range(rng.choice((0, 1, 2, 4, 5)))]
    noise = rng.choice((0.004, 0.015, 0.03, 0.04))  # garbage everywhere: where a cut on the loss has to lie
    apart = rng.random() < 0.5  # scarce skills in sources of their own, or hidden inside the large ones
    scarce = 0.15 + 0.10 * rng.random()
    left = N_SOURCES - len(harmful) - len(useless)
    parts: list[Parts] = []
    for kind in harmful:
        share = rng.choice((0.02, 0.04, 0.07))
        forms, faults, turns = _HARMFUL[kind]
        parts.append((share, forms, faults, 0.0, turns))
    small = rng.random() < 0.7
    for kind in useless:
        share = 0.008 + 0.02 * rng.random() if small else 0.04 + 0.05 * rng.random()
        parts.append((share, *_USELESS[kind], rng.choice((0.0, 0.5)), rng.choice((1, 2))))
    rest = 1.0 - math.fsum(p[0] for p in parts)
    groups = _apart(rng, left, scarce) if apart else _mixed(rng, left, scarce)
    whole = math.fsum(share for share, _, _ in groups)
    for share, mixture, turns in groups:
        rates = {
            "wrong": rng.choice((0.0, 0.01, 0.03)), "mismatch": rng.choice((0.0, 0.01, 0.02)),
            "refusal": rng.choice((0.0, 0.01, 0.02)), "verbose": rng.choice((0.0, 0.01, 0.04)),
            "garbage": noise * rng.choice((0.5, 1.0, 1.5)),
        }  # fmt: skip
        copies = rng.choice((0.0, 0.0, 0.15, 0.4))
        parts.append((rest * share / whole, mixture, rates, copies, turns))
    return parts


_HARMFUL: dict[str, tuple[dict[str, float], dict[str, float], int]] = {
    "wrong answers to known skills": ({"color": 2, "shape": 1, "where": 2, "exists": 2, "count": 1}, {"wrong": 0.8}, 1),
    "wrong letters": (
        {"choice:color": 1, "choice:relation": 1, "choice:extreme": 1, "choice:fact": 1},
        {"wrong": 0.8},
        1,
    ),
    "verbose": ({"color": 1, "where": 1, "relation": 1, "extreme": 1, "read": 1, "digit": 1}, {"verbose": 0.85}, 1),
    "refusals": ({"color": 1, "relation": 1, "height": 1, "read": 1, "total": 1}, {"refusal": 0.8}, 1),
    "other pictures": ({"relation": 1, "read": 1, "extreme": 1, "digit": 1, "region": 1}, {"mismatch": 0.9}, 1),
}
_USELESS: dict[str, tuple[dict[str, float], dict[str, float]]] = {
    "chat": ({"chat": 1}, {}),
    "off topic": ({"color": 1, "describe": 1}, {"offtopic": 1.0}),
    "trivial": ({"trivial": 1}, {}),
    "garbage": ({"color": 1, "read": 1}, {"garbage": 0.9}),
}


def _apart(rng: random.Random, n: int, scarce: float) -> list[Group]:
    """Each scarce skill in a small source of its own, as far as `n` sources allow; the known ones share the rest."""
    small = [[b] for b in SCARCE_BUNDLES]
    large = [["instruct"], *([b] for b in KNOWN_BUNDLES)]
    while len(small) + len(large) > n:
        group = large if len(large) > 2 else small
        rng.shuffle(group)
        group[-2:] = [group[-2] + group[-1]]
    while len(small) + len(large) < n:
        large.append([rng.choice(KNOWN_BUNDLES)])
    weights = [0.5 + rng.random() for _ in small]
    whole = math.fsum(weights)
    groups: list[Group] = [(scarce * w / whole, _merge(g), 1) for w, g in zip(weights, small, strict=True)]
    weights = [0.4 + 1.6 * rng.random() for _ in large]
    return groups + [
        ((1 - scarce) * w / math.fsum(weights), _merge(g), rng.choice((1, 2)))
        for w, g in zip(weights, large, strict=True)
    ]


def _mixed(rng: random.Random, n: int, scarce: float) -> list[Group]:
    """Every source is mostly of known skills and hides a few scarce ones, so its name is no handle on them."""
    hosts = [["instruct"], *([b] for b in KNOWN_BUNDLES)]
    while len(hosts) < n:
        hosts.append([rng.choice((*KNOWN_BUNDLES, "instruct"))])
    hosts = hosts[:n]
    placed: list[dict[str, float]] = [dict(_merge(h)) for h in hosts]
    for bundle in SCARCE_BUNDLES:
        for k in rng.sample(range(n), min(3, n)):
            for form, weight in _merge([bundle]).items():
                part = scarce * weight * n / (3 * len(SCARCE_BUNDLES) * (1 - scarce))
                placed[k][form] = placed[k].get(form, 0.0) + part
    return [(0.4 + 1.6 * rng.random(), forms, 1) for forms in placed]


def _merge(bundles: list[str]) -> dict[str, float]:
    """Equal weight for every bundle; the weights add up to the number of bundles."""
    forms: dict[str, float] = {}
    for bundle in bundles:
        whole = math.fsum(BUNDLES[bundle].values())
        for form, weight in BUNDLES[bundle].items():
            forms[form] = forms.get(form, 0.0) + weight / whole
    return forms


def _named(seed: int, parts: list[Parts], rng: random.Random, wordings: float) -> WorldSpec:
    """Give the sources meaningless names in a meaningless order, and make the shares add up to one."""
    assert len(parts) == N_SOURCES
    rng.shuffle(parts)
    names: set[str] = set()
    while len(names) < N_SOURCES:
        names.add("".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(3)))
    whole = math.fsum(p[0] for p in parts)
    sources = tuple(
        Source(name, share / whole, dict(forms), dict(faults), duplicates, turns, wordings)
        for name, (share, forms, faults, duplicates, turns) in zip(sorted(names), parts, strict=True)
    )
    return WorldSpec(seed, sources)


def _with_clip_art(world: WorldSpec) -> WorldSpec:
    """Let two of the five largest sources that show pictures show clip art as well: in all, 2 to 3% of the pool.

    Drawn apart, so that whatever else the seed draws is as it would be without.
    """
    rng = random.Random(f"curation clip art {world.seed}")
    part = 0.02 + 0.01 * rng.random()
    showing = [s for s in world.sources if not s.forms.keys() <= {"chat", "trivial", "fact", "choice:fact"}]
    hosts = rng.sample(sorted(showing, key=lambda s: s.share, reverse=True)[:5], 2)
    within = part / math.fsum(s.share for s in hosts)  # the part of each host's rows
    added = {
        s.name: {form: math.fsum(s.forms.values()) * within / (1 - within) * w for form, w in CLIP_ART.items()}
        for s in hosts
    }
    return replace(world, sources=tuple(replace(s, forms={**s.forms, **added.get(s.name, {})}) for s in world.sources))
