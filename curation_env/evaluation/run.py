"""The evaluation stage: prompts, greedy answers, grades, scores in percent for each part of the items."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curation_env.errors import JudgeUnavailable, StageFailed
from curation_env.evaluation.generate import Prompt, generate, suite_features
from curation_env.evaluation.judge import Endpoint, JudgeClient
from curation_env.evaluation.scorers import Grade, JudgeRequest, Scorer, make_scorer
from curation_env.evaluation.suite import Item, Part, Suite, fingerprint, read_split, read_suite
from curation_env.training.data import Encoder, image_key
from curation_env.training.model import Features, Student, resolve_device
from curation_env.training.recipe import Recipe

Progress = Callable[[dict[str, Any]], None]
BLOCKS = 20  # of item groups, for the jackknife
PROBE = Item("probe", "0", "What is shown?", "a cat", "", (), {}, {"gpt4_ans": "a cat"})


@dataclass(frozen=True)
class Prepared:
    """What evaluating any checkpoint of a student needs again: items, their split and prompts."""

    items: dict[str, list[Item]]
    split: dict[str, dict[str, tuple[Part, str]]]
    prompts: list[Prompt]
    images: dict[bytes, bytes | None]


_prepared: dict[str, Prepared] = {}  # the last suite, by what it is made of
_features: dict[tuple[str, bytes, str], Features] = {}  # its features, by suite, tower weights and device


def evaluate(
    *,
    checkpoint: str | Path,
    recipe: Recipe,
    suite: Suite,
    suite_dir: str | Path,
    out: str | Path,
    judge: Endpoint | None = None,
    device: str = "auto",
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Evaluate a checkpoint on every benchmark of a suite: all of them or an error.

    Returns:
        `scores` (percent by part "feedback", "sealed", "all" and benchmark), `stderr` (of each part's mean, in points),
        `categories` (percent by benchmark and category, feedback items), `n` (items by part and benchmark), `seconds`.
        `out/predictions.jsonl` holds every item's prediction and grade, `out/judge.jsonl` what the judge was asked.

    Raises:
        MissingAssets: Checkpoint, benchmark or split is missing.
        JudgeUnavailable: The suite needs a judge and there is none, or it fails.
        StageFailed: An item has no prediction, or a file is malformed.
    """
    clock = time.perf_counter
    mark, seconds = clock(), {}
    report = on_progress or (lambda event: None)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)

    def progress(stage: str, unit: str) -> Callable[[int, int], None]:
        since = clock()

        def tell(done: int, total: int) -> None:
            left = (clock() - since) / max(1, done) * (total - done)
            report({"stage": stage, "done": done, "total": total, "unit": unit, "seconds_left": round(left, 2)})

        return tell

    client = _open_judge(suite, judge)
    try:
        encoder = Encoder.load(checkpoint, recipe)
        student = Student.load(checkpoint, recipe, resolve_device(device), attention="sdpa")
        key, prepared = _prepare(encoder, suite, suite_dir, checkpoint)
        place = (key, student.tower_digest(), str(student.device))
        features = _features.get(place)
        if features is None:
            _features.clear()
            features = suite_features(student, encoder, prepared.prompts, prepared.images, progress("images", "images"))
            if isinstance(features, dict):
                _features[place] = features
        seconds["load"], mark = clock() - mark, clock()

        answers = generate(
            student,
            prepared.prompts,
            features,
            end_token=encoder.end_token,
            stop_tokens=encoder.stop_tokens,
            on_progress=progress("evaluate", "questions"),
        )
        texts = [text.strip() for text in encoder.tokenizer.batch_decode(answers, skip_special_tokens=True)]
        seconds["generate"], mark = clock() - mark, clock()

        predictions = _by_item(prepared.items, texts)
        verdicts = _ask(client, suite, prepared.items, predictions, progress("judge", "answers"))
        seconds["judge"], mark = clock() - mark, clock()
    finally:
        if client is not None:
            client.__exit__()
    result = _score(suite, prepared, predictions, verdicts, out)
    if client is not None:
        lines = [json.dumps({"request": k, "answer": client.log[k]}, ensure_ascii=False) for k in sorted(client.log)]
        (out / "judge.jsonl").write_text("".join(f"{line}\n" for line in lines))
    seconds["score"] = clock() - mark
    return result | {"seconds": {name: round(value, 4) for name, value in seconds.items()}}


def _open_judge(suite: Suite, endpoint: Endpoint | None) -> JudgeClient | None:
    """Return a probed client where the suite needs a judge: a dead one is found before anything is generated."""
    judged = [benchmark for benchmark in suite.benchmarks.values() if benchmark.judge]
    if not judged:
        return None
    if endpoint is None:
        raise JudgeUnavailable(f"suite {suite.name} has open answers to grade and no judge endpoint was given")
    client = JudgeClient(endpoint)
    request = make_scorer("mmvet").ask(PROBE, "a cat")
    assert request is not None
    try:
        client.probe(request)
    except BaseException:
        client.__exit__()
        raise
    return client


def _prepare(encoder: Encoder, suite: Suite, suite_dir: str | Path, checkpoint: str | Path) -> tuple[str, Prepared]:
    """Read and tokenize a suite, or take it from the last evaluation when nothing that it depends on has changed."""
    tokenizer = b"".join(p.read_bytes() for p in sorted(Path(checkpoint).glob("*.json")) if p.name != "config.json")
    identity = [fingerprint(suite_dir, suite), encoder.recipe.hash, hashlib.sha256(tokenizer).hexdigest()]
    split_file = Path(suite_dir) / "split.json"
    identity.append(str(split_file.stat().st_mtime_ns) if split_file.is_file() else "")
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    if key not in _prepared:
        items = read_suite(suite_dir, suite)
        prompts: list[Prompt] = []
        images: dict[bytes, bytes | None] = {}
        for name, rows in items.items():
            benchmark = suite.benchmarks[name]
            for item in rows:
                keys = tuple(image_key(data) for data in item.images)
                images.update(zip(keys, item.images, strict=True))
                tokens, positions = encoder.prompt(item.prompt(benchmark.prompt), item.images)
                prompts.append(Prompt(tokens, keys, benchmark.max_new_tokens, positions))
        prepared = Prepared(items, read_split(suite_dir, items), prompts, images)
        _prepared.clear()
        _prepared[key] = prepared
    return key, _prepared[key]


def _by_item(items: dict[str, list[Item]], texts: list[str]) -> dict[str, list[str]]:
    """Share the answers out to the benchmarks; every item must have one."""
    total = sum(len(rows) for rows in items.values())
    if len(texts) != total:
        raise StageFailed(f"{len(texts)} predictions for {total} items")
    shared, start = {}, 0
    for name, rows in items.items():
        shared[name] = texts[start : start + len(rows)]
        start += len(rows)
    return shared


def _ask(
    client: JudgeClient | None,
    suite: Suite,
    items: dict[str, list[Item]],
    predictions: dict[str, list[str]],
    on_progress: Callable[[int, int], None],
) -> dict[str, list[str | None]]:
    """Return the judge's verdict on every item that needs one, all benchmarks in one go."""
    places: list[tuple[str, int]] = []
    requests: list[JudgeRequest] = []
    verdicts: dict[str, list[str | None]] = {name: [None] * len(rows) for name, rows in items.items()}
    for name, rows in items.items():
        scorer = make_scorer(suite.benchmarks[name].scorer)
        for k, item in enumerate(rows):
            request = scorer.ask(item, predictions[name][k])
            if request is not None:
                places.append((name, k))
                requests.append(request)
    if requests:
        if client is None:
            raise StageFailed(f"{places[0][0]} needs a judge, but its suite entry says `judge: false`")
        for (name, k), verdict in zip(places, client.ask(requests, on_progress), strict=True):
            verdicts[name][k] = verdict
    return verdicts


def _score(
    suite: Suite,
    prepared: Prepared,
    predictions: dict[str, list[str]],
    verdicts: dict[str, list[str | None]],
    out: Path,
) -> dict[str, Any]:
    """Grade, score every part and write `predictions.jsonl`."""
    parts = ("feedback", "sealed", "all")
    scores: dict[str, dict[str, float]] = {part: {} for part in parts}
    variance: dict[str, list[float]] = {part: [] for part in parts}
    counts: dict[str, dict[str, int]] = {part: {} for part in parts}
    categories: dict[str, dict[str, float]] = {}
    lines = []
    for name, rows in prepared.items.items():
        scorer = make_scorer(suite.benchmarks[name].scorer)
        judged = zip(rows, predictions[name], verdicts[name], strict=True)
        grades = [scorer.grade(item, text, verdict) for item, text, verdict in judged]
        places = prepared.split[name]
        for part in parts:
            if part == "sealed" and not suite.benchmarks[name].sealed:
                continue
            chosen = [k for k, item in enumerate(rows) if part in ("all", places[item.index][0])]
            if not chosen:
                raise StageFailed(f"{name} has no {part} items")
            of = [(rows[k], grades[k], places[rows[k].index][1]) for k in chosen]
            scores[part][name] = _percent(scorer, of)
            variance[part].append(jackknife_variance(scorer, of))
            counts[part][name] = len(chosen)
        shown: dict[str, list[tuple[Item, Grade, str]]] = defaultdict(list)
        for item, grade in zip(rows, grades, strict=True):
            if places[item.index][0] == "feedback" and item.category:
                shown[item.category].append((item, grade, places[item.index][1]))
        categories[name] = {category: _percent(scorer, shown[category]) for category in sorted(shown)}
        for item, text, verdict, grade in zip(rows, predictions[name], verdicts[name], grades, strict=True):
            line: dict[str, Any] = {
                "benchmark": name,
                "index": item.index,
                "category": item.category,
                "part": places[item.index][0],
                "prediction": text,
                "extracted": grade.extracted,
                "score": grade.score,
            }
            if verdict is not None:
                line["judge"] = verdict
            lines.append(json.dumps(line, ensure_ascii=False))
    (out / "predictions.jsonl").write_text("".join(f"{line}\n" for line in lines))
    stderr = {part: math.sqrt(sum(values)) / len(values) for part, values in variance.items() if values}
    return {"scores": scores, "stderr": stderr, "categories": categories, "n": counts}


def _percent(scorer: Scorer, graded: Sequence[tuple[Item, Grade, str]]) -> float:
    return scorer.score([item for item, _, _ in graded], [grade for _, grade, _ in graded])


def jackknife_variance(scorer: Scorer, graded: Sequence[tuple[Item, Grade, str]]) -> float:
    """Variance of a score by leaving out one of up to twenty blocks of groups at a time, in points squared.

    It serves every rule alike, also those that are no mean over items; items of a group stay together.
    """
    names = sorted({group for _, _, group in graded})
    n = min(BLOCKS, len(names))
    if n < 2:
        return 0.0
    block = {name: k % n for k, name in enumerate(names)}
    left_out = [_percent(scorer, [entry for entry in graded if block[entry[2]] != k]) for k in range(n)]
    mean = sum(left_out) / n
    return (n - 1) / n * sum((value - mean) ** 2 for value in left_out)
