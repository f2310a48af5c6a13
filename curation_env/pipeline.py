"""The one path from a submission to scores: validate, audit, train, evaluate, record. Everything runs on the host."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from curation_env.assets import Assets
from curation_env.errors import CurationError, RejectedSubmission, StageFailed
from curation_env.pool import Pool, canonical_json
from curation_env.submission import Submission, Validated, validate
from curation_env.task import Task

if TYPE_CHECKING:
    from curation_env.audit.gate import Certificate
    from curation_env.audit.index import AuditIndex
    from curation_env.executor import Executor
    from curation_env.judge import Judge

Progress = Callable[[dict[str, Any]], None]
#: Parts of a suite's items: what the agent sees, what only the host's ledger gets, and both.
PARTS = ("feedback", "sealed", "all")


@dataclass(frozen=True)
class Scores:
    """Scores of one checkpoint, or the mean over training seeds.

    Attributes:
        parts: Percent of each benchmark, for each part of the items ("feedback", "sealed", "all").
        stderr: Standard error, in points, of each part's mean, from the spread over items.
        categories: Percent by benchmark and category on the feedback items.
        n_items: Items of each benchmark in each part.
    """

    parts: Mapping[str, Mapping[str, float]]
    stderr: Mapping[str, float]
    categories: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    n_items: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    def mean(self, part: str) -> float:
        """Unweighted mean over the benchmarks that have items in `part`; NaN when none has."""
        values = list(self.parts[part].values())
        return float(np.mean(values)) if values else float("nan")

    def to_json(self) -> dict[str, Any]:
        return {
            "parts": {part: dict(self.parts[part]) for part in self.parts},
            "stderr": dict(self.stderr),
            "categories": {name: dict(values) for name, values in self.categories.items()},
            "n_items": {part: dict(self.n_items[part]) for part in self.n_items},
        }

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Scores:
        return cls(record["parts"], record["stderr"], record["categories"], record["n_items"])


@dataclass(frozen=True)
class Outcome:
    """What a scored submission leaves: scores, rows by kind of audit finding, and the files of its commit.

    No time, host or path is in the files: equal submissions leave equal commits.
    """

    scores: Scores
    per_seed: dict[int, Scores]
    rows: int
    supervised_tokens: int
    audit: dict[str, int]
    files: dict[str, bytes]
    seconds: dict[str, float]
    cached: bool


class Pipeline:
    """Scores submissions of one task. Not thread-safe: one submission at a time.

    Args:
        task: What is scored; its hash keys the cache.
        assets: Prepared folders of the task.
        executor: Runs the stages; shared between pipelines, closed by its owner.
        judge: The endpoint that grades open answers, where the suite needs one; closed by its owner.
        data_root: Where results and signals are cached.
        device: "cpu", "cuda" or "auto".
        cache: Whether earlier results of equal submissions are taken.
    """

    def __init__(
        self,
        task: Task,
        assets: Assets,
        executor: Executor,
        judge: Judge | None = None,
        *,
        data_root: Path,
        device: str = "auto",
        cache: bool = True,
    ) -> None:
        self.task = task
        self.assets = assets
        self.executor = executor
        self.judge = judge
        self.device = device
        self.data_root = data_root
        self._cache = data_root / "results" if cache else None
        self._signals = data_root / "signals" / f"{assets.pool.name}--{task.student}"
        self.pool = Pool.open(assets.pool)
        self.view = Pool.open(assets.view)
        self._index: AuditIndex | None = None
        self._kept: np.ndarray | None = None

    @property
    def index(self) -> AuditIndex:
        """The audit's pool side, read when first needed."""
        if self._index is None:
            from curation_env.audit.index import AuditIndex

            self._index = AuditIndex.open(self.assets.index)
        return self._index

    def base(self, on_progress: Progress | None = None) -> Outcome:
        """Score the init itself: iteration 0."""
        started = time.monotonic()
        result = self._cached_or("base", 0, lambda out: self._evaluate(self.assets.student, out, on_progress))
        seconds = {"evaluate": time.monotonic() - started}
        return Outcome(result.scores, {}, 0, 0, {}, result.files, seconds, result.cached)

    def check(self, submission: Submission) -> tuple[Validated, Certificate]:
        """Validate and audit, without training.

        Raises:
            InvalidSubmission: It is not within the task's rules.
        """
        from curation_env.audit.gate import audit

        valid = validate(submission, self.view, self.task.budget)
        return valid, audit(submission, self.index, self.pool)

    def score(self, submission: Submission, on_progress: Progress | None = None) -> Outcome:
        """Take a submission through the whole path.

        Raises:
            InvalidSubmission: It is not within the task's rules.
            RejectedSubmission: The audit found leakage; the message names the agent's rows and the kinds.
            InfrastructureError: Training or evaluation failed twice.
        """
        seconds: dict[str, float] = {}
        with _timed(seconds, "validate"):
            valid = validate(submission, self.view, self.task.budget)
        with _timed(seconds, "audit"):
            from curation_env.audit.gate import audit

            certificate = audit(submission, self.index, self.pool)
        if not certificate.passed:
            raise RejectedSubmission(certificate.reason)
        files = {"certificate.json": (certificate.canonical() + "\n").encode()}
        results = {seed: self._trained(submission, seed, seconds, on_progress) for seed in self.task.training_seeds}
        for seed, result in results.items():
            files.update({f"seed-{seed}/{name}": data for name, data in result.files.items()})
        per_seed = {seed: result.scores for seed, result in results.items()}
        cached = all(result.cached for result in results.values())
        scores = mean_scores(list(per_seed.values()))
        return Outcome(
            scores, per_seed, valid.rows, valid.supervised_tokens, certificate.totals, files, seconds, cached
        )

    def train_scores(
        self, submission: Submission, seeds: list[int], on_progress: Progress | None = None
    ) -> dict[int, Scores]:
        """Train and evaluate with chosen seeds and without the task's budget: for calibration and references."""
        return {seed: self._trained(submission, seed, {}, on_progress).scores for seed in seeds}

    def _trained(
        self, submission: Submission, seed: int, seconds: dict[str, float], on_progress: Progress | None
    ) -> _Result:
        def make(out: Path) -> None:
            self._train(submission, seed, out, on_progress, seconds)
            with _timed(seconds, "evaluate"):
                self._evaluate(out / "checkpoint", out, on_progress)
            shutil.rmtree(out / "checkpoint")

        return self._cached_or(submission.digest, seed, make)

    def signal(self, name: str, on_progress: Progress | None = None) -> tuple[np.ndarray, float]:
        """A signal of the init for every row of the agent's view, and its recorded price.

        Args:
            name: One of the task's `signals`.

        Returns:
            float32 of shape (rows of the view,), and seconds: the price is the same when the values were cached.
        """
        values, record = self._signals / f"{name}.npy", self._signals / f"{name}.json"
        if not record.is_file():
            self._signals.mkdir(parents=True, exist_ok=True)
            scratch = self._signals / f".{name}.{os.getpid()}.npy"
            payload = {
                "name": name,
                "init": str(self.assets.student),
                "recipe": self.task.recipe_config,
                "pool": str(self.assets.pool),
                "device": self.device,
                "out": str(scratch),
            }
            result = self._run("signal", payload, on_progress)
            scratch.rename(values)
            _write_atomic(record, canonical_json({"price": round(float(result["price"]), 1)}).encode())
        price = float(json.loads(record.read_text())["price"])
        return np.load(values)[self._view_positions()], price

    def _view_positions(self) -> np.ndarray:
        if self._kept is None:
            position = self.pool.position
            self._kept = np.fromiter((position[id_] for id_ in self.view.ids), dtype=np.int64)
        return self._kept

    def _train(
        self, submission: Submission, seed: int, out: Path, on_progress: Progress | None, seconds: dict[str, float]
    ) -> None:
        payload = {
            "init": str(self.assets.student),
            "recipe": self.task.recipe_config,
            "pool": str(self.assets.pool),
            "ids": list(submission.ids),
            "rewrites": dict(submission.rewrites),
            "seed": seed,
            "device": self.device,
            "out": str(out),
        }
        with _timed(seconds, "train"):
            result = self._run("train", payload, on_progress)
        trained = Path(result["checkpoint"])
        if trained != out / "checkpoint":
            trained.rename(out / "checkpoint")

    def _evaluate(self, checkpoint: Path, out: Path, on_progress: Progress | None) -> None:
        suite = self.task.suite_config
        payload = {
            "checkpoint": str(checkpoint),
            "recipe": self.task.recipe_config,
            "suite": suite,
            "suite_dir": str(self.assets.suite),
            "judge": self.judge.endpoint(suite) if self.judge is not None else None,
            "device": self.device,
            "out": str(out),
        }
        result = self._run("evaluate", payload, on_progress)
        scores = _checked_scores(result, self.task, read_predictions(out))
        (out / "scores.json").write_bytes((canonical_json(scores.to_json()) + "\n").encode())

    def _run(self, stage: str, payload: dict[str, Any], on_progress: Progress | None) -> dict[str, Any]:
        """Run a stage; an infrastructure failure is tried once more, then raised with its cause."""
        from curation_env.executor import Stage

        for attempt in (1, 2):
            future: Future[dict[str, Any]] = self.executor.submit(Stage(stage, payload), on_progress=on_progress)
            try:
                return future.result()
            except CurationError as error:
                if not error.retry or attempt == 2:
                    raise
        raise AssertionError("unreachable")

    def _cached_or(self, digest: str, seed: int, make: Callable[[Path], None]) -> _Result:
        """The result of one (submission, seed), from the cache or by running `make(folder)`."""
        place = None
        if self._cache is not None:
            place = self._cache / self.task.hash[:32] / digest / f"{seed}-{device_class(self.device)}"
            with suppress(FileNotFoundError):
                return _read_result(place, cached=True)
        scratch = Path(tempfile.mkdtemp(prefix="curation-run-"))
        try:
            make(scratch)
            result = _read_result(scratch, cached=False)
            if place is not None:
                staging = place.with_name(f".{place.name}.{os.getpid()}")
                staging.mkdir(parents=True, exist_ok=True)
                for name, data in result.files.items():
                    (staging / name).write_bytes(data)
                try:
                    staging.rename(place)
                except OSError:  # another process stored the same result first
                    shutil.rmtree(staging, ignore_errors=True)
            return result
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


_RESULT_FILES = ("scores.json", "predictions.jsonl", "training.jsonl")


class _Result(NamedTuple):
    scores: Scores
    files: dict[str, bytes]
    cached: bool


def _read_result(folder: Path, *, cached: bool) -> _Result:
    scores = Scores.from_json(json.loads((folder / "scores.json").read_text()))
    files = {name: (folder / name).read_bytes() for name in _RESULT_FILES if (folder / name).is_file()}
    return _Result(scores, files, cached)


def read_predictions(folder: Path) -> list[dict[str, Any]]:
    """The item predictions that an evaluation left: benchmark, index, category, part, prediction, score."""
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def _checked_scores(result: dict[str, Any], task: Task, predictions: list[dict[str, Any]]) -> Scores:
    """All benchmarks or an error: a benchmark that is missing or not a number is never averaged away."""
    parts = result["scores"]
    for name in task.benchmarks:
        value = parts["all"].get(name)
        if value is None or not np.isfinite(value):
            raise StageFailed(f"evaluation gave no score for {name}: all benchmarks or none")
    return Scores(parts, standard_errors(predictions), result["categories"], result["n"])


def standard_errors(predictions: list[dict[str, Any]]) -> dict[str, float]:
    """Standard error, in points, of each part's mean over benchmarks, from the spread of item scores (0 to 1).

    Items count as independent: where a scorer aggregates over groups this is the error's size, not its exact value.
    """
    items: dict[str, dict[str, list[float]]] = {part: {} for part in PARTS}
    for item in predictions:
        for part in (item["part"], "all"):
            items[part].setdefault(item["benchmark"], []).append(float(item["score"]))
    errors = {}
    for part, benchmarks in items.items():
        variances = [np.var(scores, ddof=1) / len(scores) for scores in benchmarks.values() if len(scores) > 1]
        errors[part] = 100.0 * float(np.sqrt(np.sum(variances))) / max(1, len(benchmarks))
    return errors


def mean_scores(runs: list[Scores]) -> Scores:
    """Mean over training seeds of one submission."""
    if len(runs) == 1:
        return runs[0]

    def mean(tables: list[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
        return {
            outer: {inner: float(np.mean([t[outer][inner] for t in tables])) for inner in tables[0][outer]}
            for outer in tables[0]
        }

    return Scores(
        mean([run.parts for run in runs]),
        {part: float(np.mean([run.stderr[part] for run in runs])) for part in runs[0].stderr},
        mean([run.categories for run in runs]),
        runs[0].n_items,
    )


def device_class(device: str) -> str:
    """What kind of processor scores are comparable on: the processor's model, or the GPU's."""
    if device in ("cpu", "auto"):
        # "auto" asks the driver's device files rather than torch: the environment's process never imports torch.
        gpu = device == "auto" and Path("/proc/driver/nvidia/version").exists()
        if not gpu:
            return "cpu-" + hashlib.blake2b(_processor().encode(), digest_size=4).hexdigest()
    gpus = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    text = gpus[0].read_text().splitlines()[0] if gpus else "cuda"
    return "cuda-" + hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    import platform

    return platform.processor() or platform.machine()


class _timed:
    """Add the seconds of a block to `seconds[name]`."""

    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self.seconds, self.name = seconds, name

    def __enter__(self) -> None:
        self.started = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.seconds[self.name] = self.seconds.get(self.name, 0.0) + time.monotonic() - self.started


def _write_atomic(path: Path, data: bytes) -> None:
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_bytes(data)
    scratch.rename(path)
