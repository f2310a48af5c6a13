"""Exact and near-duplicate text between a pool and the items of a suite.

What decides is surprise: how many bits the text that a row and an item share is worth under a model of the pool's own
language (word trigrams, so that a template costs only its slots). A match on text alone needs more bits than the pool
has rows, with a margin, so that chance can't make it: "what color is the large circle" is worth ten bits and never
matches by text, a question of twelve telling words is worth seventy. Words that a near-duplicate changed are paid for.
Where the image matches already, a likeness of the texts is enough. A text that occurs with many different images or in
many different dialogues is a stock phrase and matches nothing by itself.

Candidates come from MinHash (rensa) over word shingles of long texts and character n-grams of short ones, so the cost
grows with the rows, not with rows x items.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from curation_env.audit.rules import TextRules

Words = tuple[str, ...]
Role = Literal["user", "assistant"]
Field = Literal["question", "answer"]

PERMUTATIONS, BANDS, SEED = 126, 42, 7  # bands of three rows: a pair of Jaccard 0.5 is a candidate 99.6 times in 100
START, TOTAL = "^", "*"  # no words: punctuation never is one
CACHED = 200_000  # texts whose matches are remembered: pools repeat themselves
BORDER = 2  # texts within so many words of `long_words` are sketched both ways, so that no pair falls between

_WORD = re.compile(r"[^\W_]+")
_OPTION_MARK = re.compile(r"(?:(?<=\s)|^)\(?[A-Ha-h][.):]\)?(?=\s)")
_LINE = re.compile(r"[\n\r]+")
_SENTENCE = re.compile(r"(?<=[.?!])\s+")


def words(text: str) -> Words:
    """Normalise: NFKC, case folded, option marks and punctuation dropped."""
    text = unicodedata.normalize("NFKC", text)
    return tuple(_WORD.findall(_OPTION_MARK.sub(" ", text).casefold()))


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a row that could restate an item."""

    role: Role
    words: Words


def segments(conversation: Sequence[Mapping[str, str]]) -> list[Segment]:
    """Cut a conversation into the pieces that are compared: turns, their lines and sentences, and turns joined.

    A question that is split over two turns is found in their join, one that is buried in a longer turn in a sentence.
    """
    found: dict[tuple[Role, Words], None] = {}

    def add(role: Role, text: Words) -> None:
        if text:
            found.setdefault((role, text))

    sides: tuple[Role, Role] = ("user", "assistant")
    for role in sides:
        turns = [words(turn[role]) for turn in conversation]
        for turn, whole in zip(conversation, turns, strict=True):
            add(role, whole)
            lines = [line for line in _LINE.split(turn[role]) if line.strip()]
            for line in lines if len(lines) > 1 else ():
                add(role, words(line))
            if len(lines) > 2:  # an instruction or a hint stands in the first or the last line
                add(role, words("\n".join(lines[:-1])))
                add(role, words("\n".join(lines[1:])))
            sentences = _SENTENCE.split(turn[role])
            for sentence in sentences if len(sentences) > 1 else ():
                add(role, words(sentence))
        for first, second in itertools.pairwise(turns):
            add(role, first + second)
        if len(turns) > 2:
            add(role, tuple(word for turn in turns for word in turn))
    for turn in conversation:
        add("user", words(turn["user"] + "\n" + turn["assistant"]))
    return [Segment(role, text) for role, text in found]


@dataclass(frozen=True, slots=True)
class ItemText:
    """The texts of one item: its number in the index, its question, question with options, and answer."""

    item: int
    question: Words
    with_options: Words
    answer: Words

    def forms(self) -> Iterator[tuple[Field, Words, bool]]:
        """Each text with its field, and whether it is only a part of what is asked (options left out)."""
        options = self.with_options != self.question
        yield "question", self.question, options
        if options:
            yield "question", self.with_options, False
        yield "answer", self.answer, False


def grams(text: Words) -> Iterator[tuple[str, ...]]:
    """Word n-grams of length 1 to 3, and the contexts of the longer ones, with marks before the first word."""
    padded = (START, START, *text)
    for k in range(2, len(padded)):
        yield (padded[k],)
        yield padded[k - 1 : k + 1]
        yield padded[k - 2 : k + 1]
        yield (TOTAL, padded[k - 1])
        yield (TOTAL, *padded[k - 2 : k])
    yield (TOTAL,)


class Surprise:
    """A trigram model of the pool's language, kept for the n-grams of the items only.

    A word's probability is the best of three estimates (after two words, after one, alone). `discount` occurrences
    count as none: a leaked row must not make its own words look common.
    """

    def __init__(self, texts: Iterable[Words], discount: int) -> None:
        self.counts: dict[tuple[str, ...], int] = {gram: 0 for text in texts for gram in grams(text)}
        self.discount = discount
        self.contexts = 0

    @classmethod
    def restored(cls, counts: Mapping[tuple[str, ...], int], contexts: int, discount: int) -> Surprise:
        model = cls((), discount)
        model.counts, model.contexts = dict(counts), contexts
        return model

    def add(self, turns: Iterable[Words]) -> None:
        """Count the turns of one row."""
        counts = self.counts
        self.contexts += 1
        for text in turns:
            padded = (START, START, *text)
            for k in range(2, len(padded)):
                for gram in (
                    padded[k : k + 1],
                    padded[k - 1 : k + 1],
                    padded[k - 2 : k + 1],
                    (TOTAL, padded[k - 1]),
                    (TOTAL, padded[k - 2], padded[k - 1]),
                ):
                    if gram in counts:
                        counts[gram] += 1
            if (TOTAL,) in counts:
                counts[TOTAL,] += len(text)

    def bits(self, text: Words) -> list[float]:
        """Surprise of each word of a text, at most log2 of the rows."""
        padded = (START, START, *text)
        floor = 1 / (self.contexts + 1)
        found = []
        for k in range(2, len(padded)):
            best = floor
            for order in range(3):
                gram = padded[k - order : k + 1]
                seen = self.counts.get(gram, 0) - self.discount
                if seen > 0:
                    best = max(best, seen / self.counts[(TOTAL, *gram[:-1])])
            found.append(-math.log2(min(1.0, best)))
        return found


@dataclass(frozen=True, slots=True)
class TextMatch:
    item: int
    field: Field
    exact: bool
    similarity: float
    segment: Words


def text_key(text: Words) -> str:
    """A short digest that stands for a text where the text itself shouldn't be stored."""
    return hashlib.blake2b(" ".join(text).encode(), digest_size=12).hexdigest()


def shingles(text: Words, size: int) -> list[str]:
    """Word n-grams of every length up to `size`."""
    return [" ".join(text[k : k + n]) for n in range(1, size + 1) for k in range(len(text) - n + 1)]


def ngrams(text: Words, size: int) -> list[str]:
    """Character n-grams of the text."""
    joined = " ".join(text)
    return [joined[k : k + size] for k in range(max(1, len(joined) - size + 1))]


def pairs(text: Words) -> list[tuple[str, str]]:
    """Each word with the one before it."""
    return list(zip((START, *text), text, strict=False))


class _Form:
    """One text of one or more items, with the surprise of each of its words."""

    __slots__ = ("bits", "field", "items", "pairs", "part", "text", "total")

    def __init__(self, field: Field, text: Words, part: bool, bits: Sequence[float]) -> None:
        self.field, self.text, self.part, self.bits = field, text, part, bits
        self.pairs = pairs(text)
        self.total = sum(bits)
        self.items: list[int] = []

    def shared(self, other: set[tuple[str, str]]) -> tuple[float, float]:
        """(similarity, evidence) against the word pairs of another text.

        Similarity is the share of the bits that the other text has as well; evidence is these bits less the price of
        saying which words were changed.
        """
        bits, changed = 0.0, 0
        for pair, worth in zip(self.pairs, self.bits, strict=True):
            if pair in other:
                bits += worth
            else:
                changed += 1
        price = math.log2(math.comb(len(self.pairs), changed)) if changed else 0.0
        return (bits / self.total if self.total else float(not changed)), bits - price


class TextIndex:
    """The items' texts, ready to be compared with rows.

    Args:
        items: Texts of all items of the suite.
        surprise: The model of the pool's language.
        rules: Thresholds.
        stock: `text_key`s of phrases found to be stock when the pool was indexed.
    """

    def __init__(
        self, items: Sequence[ItemText], surprise: Surprise, rules: TextRules, *, stock: Iterable[str] = ()
    ) -> None:
        from rensa import RMinHashLSH

        self.rules = rules
        self.stock = set(stock)
        self.threshold_bits = math.log2(surprise.contexts + 1) + rules.margin_bits
        self.near_bits = math.log2(surprise.contexts + 1) + rules.near_margin_bits
        forms: dict[tuple[Field, Words, bool], _Form] = {}
        self._by_item: dict[int, list[_Form]] = {}
        for item in items:
            own = self._by_item[item.item] = []
            for key in item.forms():
                field, text, part = key
                if text:
                    if key not in forms:
                        forms[key] = _Form(field, text, part, surprise.bits(text))
                    own.append(forms[key])
                    forms[key].items.append(item.item)
        self._exact: dict[Words, list[_Form]] = defaultdict(list)
        for form in forms.values():
            if self._telling(form):
                self._exact[form.text].append(form)
        self._near = [form for form in forms.values() if self._telling(form) and form.total >= self.near_bits]
        self._worth: dict[tuple[str, str], float] = defaultdict(float)
        for form in self._near:
            for pair, worth in zip(form.pairs, form.bits, strict=True):
                self._worth[pair] = max(self._worth[pair], worth)
        self._sketches: dict[bool, RMinHashLSH] = {}
        for long in (False, True):
            chosen = [
                k
                for k, form in enumerate(self._near)
                if self._long(form.text) is long or abs(len(form.text) - rules.long_words) <= BORDER
            ]
            sketches = self._sketch([self._near[k].text for k in chosen], long)
            lsh = RMinHashLSH(0.5, PERMUTATIONS, BANDS)
            for k, sketch in zip(chosen, sketches, strict=True):
                lsh.insert(k, sketch)
            self._sketches[long] = lsh
        self._cache: dict[Words, list[tuple[_Form, bool, float]]] = {}

    def prepare(self, rows: Iterable[Sequence[Segment]]) -> None:
        """Compare the segments of many rows at once, for `match` to look up: one by one takes far longer."""
        if len(self._cache) >= CACHED:
            self._cache.clear()
        texts = {segment.words for row in rows for segment in row} - self._cache.keys()
        for text in texts:
            stock = text in self._exact and text_key(text) in self.stock
            exact = () if stock else self._exact.get(text, ())
            self._cache[text] = [(form, not form.part, 1.0) for form in exact]
        for long in (False, True):
            chosen = sorted(text for text in texts if self._long(text) is long and self._promising(text))
            found = self._sketches[long].query_all(self._sketch(chosen, long))
            for text, candidates in zip(chosen, found, strict=True):
                self._cache[text] += self._confirm(text, sorted(candidates))

    def match(self, pieces: Iterable[Segment]) -> list[TextMatch]:
        """Return the items that a row's segments restate by text alone, best match of each item and field."""
        pieces = list(pieces)
        if any(segment.words not in self._cache for segment in pieces):
            self.prepare([pieces])
        best: dict[tuple[int, Field], TextMatch] = {}
        for segment in pieces:
            for form, exact, similarity in self._cache[segment.words]:
                if form.field == "answer" and segment.role != "assistant":
                    continue
                for item in form.items:
                    known = best.get((item, form.field))
                    if known is None or similarity > known.similarity:
                        best[item, form.field] = TextMatch(item, form.field, exact, similarity, segment.words)
        return list(best.values())

    def paired(self, item: int, pieces: Sequence[Segment]) -> Field | None:
        """What a row whose image is the item's also shares with it: its question, else its answer, else nothing.

        Here stock phrases count, since the image tells which item is meant.
        """
        found: Field | None = None
        others = [(piece, set(pairs(piece.words))) for piece in pieces]
        for form in self._by_item[item]:
            if form.field == "answer" and form.total < self.rules.paired_bits:
                continue
            for piece, other in others:
                if form.field == "answer" and piece.role != "assistant":
                    continue
                if self._comparable(form, piece.words) and form.shared(other)[0] >= self.rules.paired_similarity:
                    if form.field == "question":
                        return "question"
                    found = "answer"
        return found

    def _telling(self, form: _Form) -> bool:
        """Whether a text carries enough information to be recognised without its image."""
        if form.field == "answer" and len(form.text) < self.rules.answer_words:
            return False
        return form.total >= (self.near_bits if form.part else self.threshold_bits)

    def _promising(self, text: Words) -> bool:
        """Whether what a text shares with all items together could be enough for a near-duplicate of one."""
        return sum(self._worth.get(pair, 0.0) for pair in set(pairs(text))) >= self.near_bits

    def _confirm(self, text: Words, candidates: Iterable[int]) -> Iterator[tuple[_Form, bool, float]]:
        other = set(pairs(text))
        stock: bool | None = None
        for k in candidates:
            form = self._near[k]
            if form.text == text or not self._comparable(form, text):
                continue
            similarity, evidence = form.shared(other)
            if similarity >= self.rules.similarity and evidence >= self.near_bits:
                stock = text_key(text) in self.stock if stock is None else stock
                if not stock:
                    yield form, False, similarity

    @staticmethod
    def _comparable(form: _Form, text: Words) -> bool:
        """A much longer text holds any short one by chance; its lines and sentences are compared on their own."""
        return len(text) <= 2 * len(form.text) + 4

    def _long(self, text: Words) -> bool:
        return len(text) >= self.rules.long_words

    def _sketch(self, texts: Sequence[Words], long: bool) -> list:
        from rensa import RMinHash

        size = self.rules.shingle_words if long else self.rules.ngram
        sets = [(shingles if long else ngrams)(text, size) for text in texts]
        return RMinHash.from_token_sets(sets, PERMUTATIONS, SEED)
