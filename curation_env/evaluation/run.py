"""The evaluation: prompts, greedy answers, grades, scores in percent for each part of the items.

It is one stage, `evaluate`, or two, `answer` and `grade`, between which the student leaves the GPU for a judge.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import math
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from curation_env.errors import JudgeUnavailable, StageFailed
from curation_env.evaluation.generate import Prompt, by_length, generate, suite_features
from curation_env.evaluation.judge import Endpoint, JudgeClient
from curation_env.evaluation.scorers import Grade, JudgeRequest, Scorer, make_scorer
from curation_env.evaluation.spreadsheet import read_back
from curation_env.evaluation.suite import Item, Part, Suite, fingerprint, read_split, read_suite
from curation_env.evaluation.wording import Wording, title
from curation_env.group import Group, run_group
from curation_env.launch import write
from curation_env.training.data import Encoder, image_key
from curation_env.training.engine import rank_and_world
from curation_env.training.images import KeptFeatures, StreamedFeatures
from curation_env.training.model import Student, resolve_device
from curation_env.training.recipe import Recipe

Progress = Callable[[dict[str, Any]], None]
BLOCKS = 20  # of item groups, for the jackknife
PROBE = Item("probe", "0", "What is shown?", "a cat", "", (), {}, {"gpt4_ans": "a cat"})
ANSWERS = "answers.json"  # what `answer` leaves for `grade`
JOURNAL = "judge-journal.jsonl"  # what a `grade` that failed leaves for the next


@dataclass(frozen=True)
class Items:
    """A suite's items with their split, in the order in which answers are kept."""

    rows: dict[str, list[Item]]
    split: dict[str, dict[str, tuple[Part, str]]]


@dataclass(frozen=True)
class Prepared:
    """What evaluating any checkpoint of a student needs again: prompts and images of a suite's items."""

    prompts: list[Prompt]
    images: dict[bytes, bytes | None]


_items: dict[str, Items] = {}  # the last suite's, by what it is made of
_prepared: dict[str, Prepared] = {}  # the same for the last student
_features: dict[tuple[str, bytes, str], KeptFeatures] = {}  # its features, by suite, tower weights and device


def evaluate(
    *,
    checkpoint: str | Path,
    recipe: Recipe,
    suite: Suite,
    suite_dir: str | Path,
    out: str | Path,
    judge: Endpoint | None = None,
    device: str = "auto",
    group: Group | None = None,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Evaluate a checkpoint on every benchmark of a suite: all of them or an error.

    Args:
        group: Processes that share the questions, where this one does not answer them itself.

    Returns:
        `scores` (percent by part "feedback", "sealed", "all" and benchmark), `stderr` (of each part's mean, in points),
        `categories` (percent by benchmark and category, feedback items), `n` (items by part and benchmark), `seconds`.
        `out/predictions.jsonl` holds every item's prediction and grade, `out/judge.jsonl` what the judge was asked, and
        `out/judge.json` which judge an endpoint of the user's was.

    Raises:
        MissingAssets: Checkpoint, benchmark or split is missing.
        TaskMismatch: A benchmark's file is not the public one.
        JudgeUnavailable: The suite needs a judge and there is none, or it fails.
        StageFailed: An item has no prediction, or a file is malformed.
    """
    report = on_progress or (lambda event: None)
    seconds: dict[str, float] = {}
    with _probed(suite, judge) as client:
        source = _Source(checkpoint, recipe, suite, suite_dir, device)
        items, texts = _answers(source, group, Path(out), report, seconds)
        return _grade(client, judge, suite, items, texts, Path(out), report, seconds)


def answer(
    *,
    checkpoint: str | Path,
    recipe: Recipe,
    suite: Suite,
    suite_dir: str | Path,
    out: str | Path,
    judge: Endpoint | None = None,
    device: str = "auto",
    group: Group | None = None,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """The first half of `evaluate`: write the student's answers to `out` and leave the device to others.

    Args:
        judge: Probed before anything is generated; None where it is started afterwards.
        group: As for `evaluate`.

    Returns:
        `seconds`.

    Raises:
        MissingAssets, TaskMismatch, JudgeUnavailable, StageFailed: As `evaluate`.
    """
    if judge is not None:
        with _probed(suite, judge):
            pass
    seconds: dict[str, float] = {}
    report = on_progress or (lambda event: None)
    _, texts = _answers(_Source(checkpoint, recipe, suite, suite_dir, device), group, Path(out), report, seconds)
    _features.clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    Path(out).mkdir(parents=True, exist_ok=True)
    (Path(out) / ANSWERS).write_text(json.dumps(texts))
    return {"seconds": seconds}


def grade(
    *,
    suite: Suite,
    suite_dir: str | Path,
    out: str | Path,
    judge: Endpoint | None = None,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """The second half of `evaluate`: grade what `answer` left in `out`; needs no student and no GPU.

    One that failed goes on where it was when it is called again: what the judge has answered is not asked again.

    Returns:
        As `evaluate`.

    Raises:
        MissingAssets, TaskMismatch, JudgeUnavailable, StageFailed: As `evaluate`.
    """
    try:
        texts = json.loads((Path(out) / ANSWERS).read_text())
    except (OSError, ValueError) as error:
        raise StageFailed(f"no answers to grade in {out}: {error}") from error
    with _probed(suite, judge, Path(out) / JOURNAL) as client:
        items = _read(suite, suite_dir)[1]
        return _grade(client, judge, suite, items, texts, Path(out), on_progress or (lambda event: None), {})


def answer_share(
    *,
    checkpoint: str | Path,
    recipe: Recipe,
    suite: Suite,
    suite_dir: str | Path,
    out: str | Path,
    device: str = "auto",
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """What each of several processes does for `answer`: write its own part of the answers into `out`.

    Returns:
        `seconds`.
    """
    rank, world = rank_and_world()
    seconds: dict[str, float] = {}
    source = _Source(checkpoint, recipe, suite, suite_dir, device)
    own = _generated(source, on_progress or (lambda event: None), seconds, rank, world)[1]
    write(Path(out) / f"{rank}.json", own)
    return {"seconds": seconds}


class _Source(NamedTuple):
    """What answers, and what it is asked."""

    checkpoint: str | Path
    recipe: Recipe
    suite: Suite
    suite_dir: str | Path
    device: str

    def payload(self) -> dict[str, Any]:
        return {
            "checkpoint": str(self.checkpoint),
            "recipe": self.recipe.payload(),
            "suite": self.suite.model_dump(mode="json"),
            "suite_dir": str(self.suite_dir),
            "device": self.device,
        }


def _answers(
    source: _Source, group: Group | None, out: Path, report: Progress, seconds: dict[str, float]
) -> tuple[Items, list[str]]:
    """Generate the student's answers, here or in the processes of a group, in the order of the items."""
    if group is None:
        items, texts = _generated(source, report, seconds)
    else:
        items, texts = _read(source.suite, source.suite_dir)[1], {}
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".answers-", dir=out) as folder:
            result = run_group(group, "answer_share", source.payload() | {"out": folder}, report)
            for rank in range(group.processes):
                texts |= {int(k): text for k, text in json.loads((Path(folder) / f"{rank}.json").read_text()).items()}
        seconds |= result["seconds"]
    return items, [texts[k] for k in sorted(texts)]


def _generated(
    source: _Source, report: Progress, seconds: dict[str, float], rank: int = 0, world: int = 1
) -> tuple[Items, dict[int, str]]:
    """Load the student and generate one process's part of its answers, by place of the item.

    Processes take turns at the questions from short to long, so that their parts take about equally long.
    """
    mark = time.perf_counter()
    encoder = Encoder.load(source.checkpoint, source.recipe)
    place = resolve_device(source.device, int(os.environ.get("LOCAL_RANK", 0)))
    student = Student.load(source.checkpoint, source.recipe, place, attention="sdpa")
    key, items, prepared = _prepare(encoder, source.suite, source.suite_dir, source.checkpoint)
    own = sorted(by_length(prepared.prompts)[rank::world])
    prompts = [prepared.prompts[k] for k in own]
    of = (key, student.tower_digest(), str(student.device))
    features: KeptFeatures | StreamedFeatures | None = _features.get(of)
    if features is None:
        _features.clear()
        told = _progress(report, "images", "images")
        images = {image: prepared.images[image] for prompt in prompts for image in prompt.images}
        features = suite_features(student, encoder, prompts, images, told)
        if isinstance(features, KeptFeatures):
            _features[of] = features
    seconds["load"], mark = round(time.perf_counter() - mark, 4), time.perf_counter()
    told, total = _progress(report, "evaluate", "questions"), len(prepared.prompts)
    with features:
        answers = generate(
            student,
            prompts,
            features,
            end_token=encoder.end_token,
            stop_tokens=encoder.stop_tokens,
            on_progress=lambda done, n: told(total if done == n else done * world, total),
        )
    texts = encoder.tokenizer.batch_decode(answers, skip_special_tokens=True) if answers else []
    seconds["generate"] = round(time.perf_counter() - mark, 4)
    return items, {k: text.strip() for k, text in zip(own, texts, strict=True)}


def _grade(
    client: JudgeClient | None,
    judge: Endpoint | None,
    suite: Suite,
    items: Items,
    texts: list[str],
    out: Path,
    report: Progress,
    seconds: dict[str, float],
) -> dict[str, Any]:
    """Ask the judge, grade and score; write what is kept."""
    mark = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    predictions = _by_item(items.rows, texts)
    heard = {name: read_back(said) for name, said in predictions.items()} if suite.spreadsheets else predictions
    scorers = _scorers(suite, judge)
    requests = _requests(suite, scorers, items.rows, heard)
    verdicts: dict[str, list[str | None]] = {name: [None] * len(rows) for name, rows in items.rows.items()}
    if requests:
        if client is None:
            raise StageFailed(f"{next(iter(requests))[0]} needs a judge, but its suite entry says `judge: false`")
        said = client.ask(list(requests.values()), _progress(report, "judge", "answers"))
        for (name, k), verdict in zip(requests, read_back(said) if suite.spreadsheets else said, strict=True):
            verdicts[name][k] = verdict
    seconds["judge"], mark = round(time.perf_counter() - mark, 4), time.perf_counter()
    result = _score(suite, scorers, items, predictions, heard, verdicts, out)
    if client is not None:
        systems = {request.message: request.system for request in requests.values() if request.system}
        kept = [
            {**({"system": systems[k]} if k in systems else {}), "request": k, "answer": client.log[k]}
            for k in sorted(client.log)
        ]
        (out / "judge.jsonl").write_text("".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in kept))
        if suite.judge is not None and suite.judge.kind == "endpoint":
            record = {"suite": title(suite.model_dump()), **client.version, "fingerprints": client.fingerprints}
            (out / "judge.json").write_text(json.dumps(record, indent=1, sort_keys=True))
    seconds["score"] = round(time.perf_counter() - mark, 4)
    return result | {"seconds": seconds}


def _progress(report: Progress, stage: str, unit: str) -> Callable[[int, int], None]:
    since = time.perf_counter()

    def tell(done: int, total: int) -> None:
        left = (time.perf_counter() - since) / max(1, done) * (total - done)
        report({"stage": stage, "done": done, "total": total, "unit": unit, "seconds_left": round(left, 2)})

    return tell


def _scorers(suite: Suite, judge: Endpoint | None) -> dict[str, Scorer]:
    """The rule of every benchmark, by its name."""
    prompts = suite.judge.prompts if suite.judge is not None else None
    wording = None
    if prompts is not None and prompts.source == "vlmevalkit":
        wording = Wording(judge.vlmevalkit if judge is not None else "", prompts.commit, prompts.files)
    return {name: make_scorer(benchmark.scorer, wording) for name, benchmark in suite.benchmarks.items()}


@contextlib.contextmanager
def _probed(suite: Suite, endpoint: Endpoint | None, journal: Path | None = None) -> Iterator[JudgeClient | None]:
    """A probed client where the suite needs a judge: a dead one is found before anything is generated."""
    if not any(benchmark.judge for benchmark in suite.benchmarks.values()):
        yield None
        return
    if endpoint is None:
        raise JudgeUnavailable(f"suite {suite.name} has open answers to grade and no judge endpoint was given")
    request = make_scorer("mmvet").ask(PROBE, "a cat")
    assert request is not None
    with JudgeClient(endpoint, journal=journal) as client:
        client.probe(request)
        yield client


def _read(suite: Suite, suite_dir: str | Path) -> tuple[str, Items]:
    """Read a suite, or take it from the last evaluation when no file has changed."""
    split_file = Path(suite_dir) / "split.json"
    split_time = str(split_file.stat().st_mtime_ns) if split_file.is_file() else ""
    key = hashlib.sha256(json.dumps([fingerprint(suite_dir, suite), split_time]).encode()).hexdigest()
    if key not in _items:
        rows = read_suite(suite_dir, suite)
        items = Items(rows, read_split(suite_dir, rows))
        _items.clear()
        _items[key] = items
    return key, _items[key]


def _prepare(
    encoder: Encoder, suite: Suite, suite_dir: str | Path, checkpoint: str | Path
) -> tuple[str, Items, Prepared]:
    """Read and tokenize a suite, or take it from the last evaluation when nothing that it depends on has changed."""
    tokenizer = b"".join(p.read_bytes() for p in sorted(Path(checkpoint).glob("*.json")) if p.name != "config.json")
    made_of, items = _read(suite, suite_dir)
    identity = [made_of, encoder.recipe.hash, hashlib.sha256(tokenizer).hexdigest()]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    if key not in _prepared:
        prompts: list[Prompt] = []
        images: dict[bytes, bytes | None] = {}
        for name, rows in items.rows.items():
            benchmark = suite.benchmarks[name]
            for item in rows:
                keys = tuple(image_key(data) for data in item.images)
                images.update(zip(keys, item.images, strict=True))
                tokens, positions = encoder.prompt(item.prompt(benchmark.prompt), item.images)
                prompts.append(Prompt(tokens, keys, benchmark.max_new_tokens, positions))
        _prepared.clear()
        _prepared[key] = Prepared(prompts, images)
    return key, items, _prepared[key]


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


def _requests(
    suite: Suite, scorers: dict[str, Scorer], items: dict[str, list[Item]], heard: dict[str, list[str]]
) -> dict[tuple[str, int], JudgeRequest]:
    """What the judge is asked, by benchmark and place of the item."""
    requests = {}
    for name, rows in items.items():
        for k, item in enumerate(rows):
            request = scorers[name].ask(item, heard[name][k])
            if request is not None:
                requests[name, k] = request
    return requests


def _score(
    suite: Suite,
    scorers: dict[str, Scorer],
    items: Items,
    predictions: dict[str, list[str]],
    heard: dict[str, list[str]],
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
    for name, rows in items.rows.items():
        scorer = scorers[name]
        judged = zip(rows, heard[name], verdicts[name], strict=True)
        grades = [scorer.grade(item, text, verdict) for item, text, verdict in judged]
        places = items.split[name]
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
