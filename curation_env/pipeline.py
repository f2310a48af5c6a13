"""The one path from a submission to scores: validate, audit, train, evaluate, record. Everything runs on the host."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import io
import json
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from curation_env.assets import Assets
from curation_env.cache import Cache
from curation_env.errors import CurationError, RejectedSubmission, StageFailed
from curation_env.group import ALONE, Group
from curation_env.pool import Pool, canonical_json
from curation_env.scratch import Scratch
from curation_env.students import card_of, identity, student_hash
from curation_env.submission import Submission, Validated, validate
from curation_env.task import Task

if TYPE_CHECKING:
    from curation_env.audit.gate import Certificate
    from curation_env.audit.index import AuditIndex
    from curation_env.executor import Executor, Resources
    from curation_env.judge import Judge
    from curation_env.training.tokens import TokenCounter

Progress = Callable[[dict[str, Any]], None]
#: Parts of a suite's items: what the agent sees, what only the host's ledger gets, and both.
PARTS = ("feedback", "sealed", "all")
#: Rises when equal submissions would get other scores, errors or files from then on: earlier results are then made
#: again. What a task's hash covers (recipe, suite, student) has its own versions.
SCORING_VERSION = 3
#: Libraries whose versions may move the last bits of a score.
_LIBRARIES = ("torch", "transformers", "tokenizers", "numpy", "pillow")

# What a stage may take. These limits end one that hangs or eats the machine, never one that is slow: the miniature's
# stages need under a hundredth of the time on one idle core.
STAGE_SECONDS = 600.0  # whatever its size: files, models, a judge that is asked to wait
SECONDS_PER_ROW = {
    "train": 0.5,  # of a row in an epoch
    "evaluate": 1.0,  # of an item (its `cost` in the suite)
    "answer": 1.0,  # of an item, with no judge
    "grade": 1.0,  # of an item, by the judge alone
    "signal": 0.1,  # of a row of the pool
    "device": 0.0,
}
#: Private memory on top of the warm worker's, on a CPU. None on a GPU, whose driver maps far more than it uses.
MEMORY_MB = 4096


@dataclass(frozen=True)
class Scores:
    """Scores of one checkpoint, or the mean over training seeds.

    Attributes:
        parts: Percent of each benchmark, for each part of the items ("feedback", "sealed", "all").
        stderr: Standard error, in points, of each part's mean. Of one run: the jackknife over groups of items
            (`evaluation.run`), items being what is drawn. Of several training seeds: see `mean_scores`.
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

    No time, host or path is in the files: equal submissions leave equal commits. `memory` says, by training seed, which
    way each run on a GPU took (`training.plan`); what is cached or trained on a CPU took none.
    """

    scores: Scores
    per_seed: dict[int, Scores]
    rows: int
    supervised_tokens: int
    audit: dict[str, int]
    files: dict[str, bytes]
    seconds: dict[str, float]
    cached: bool
    memory: dict[str, Any] = field(default_factory=dict)


class Pipeline:
    """Scores submissions of one task. Not thread-safe: one submission at a time.

    Args:
        task: What is scored; its hash keys the cache.
        assets: Prepared folders of the task.
        executor: Runs the stages; shared between pipelines, closed by its owner.
        judge: The endpoint that grades open answers, where the suite needs one; closed by its owner.
        data_root: Where results and signals are cached.
        device: "cpu", "cuda" or "auto".
        gpu_memory_gib: What stages may take of a GPU; None: all that is free.
        group: The processes that train and evaluate together.
        cache: Whether earlier results of equal submissions are taken.
        limits: What a stage may take, by its name, where it is not what its size gives.
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
        gpu_memory_gib: float | None = None,
        group: Group = ALONE,
        cache: bool = True,
        limits: Mapping[str, Resources] | None = None,
    ) -> None:
        self.task = task
        self.assets = assets
        self.executor = executor
        self.judge = judge
        self.device = device
        self.group = group._replace(gpu_memory_gib=gpu_memory_gib)
        self.data_root = data_root
        self._results = Cache(data_root / "results") if cache else None
        self._signals = Cache(data_root / "signals")
        self._limits = limits or {}
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

    @functools.cached_property
    def _count_tokens(self) -> TokenCounter:
        from curation_env.training.recipe import Recipe
        from curation_env.training.tokens import TokenCounter

        return TokenCounter(self.assets.student, Recipe.model_validate(self.task.recipe_config))

    @functools.cached_property
    def _suite_digest(self) -> str:
        """Which items are evaluated: the audit must have been made against these."""
        from curation_env.audit.items import suite_digest, suite_files

        return suite_digest(suite_files(self.task.suite_config, self.assets.suite))

    def base(self, on_progress: Progress | None = None) -> Outcome:
        """Score the init itself: iteration 0."""
        started = time.monotonic()
        seconds: dict[str, float] = {}
        result = self._cached_or("base", 0, lambda out: self._evaluate(self.assets.student, out, on_progress, seconds))
        seconds = seconds or {"evaluate": time.monotonic() - started}  # read from the cache
        return Outcome(result.scores, {}, 0, 0, {}, result.files, seconds, result.cached)

    def check(self, submission: Submission) -> tuple[Validated, Certificate]:
        """Validate and audit, without training.

        Raises:
            InvalidSubmission: It is not within the task's rules.
        """
        from curation_env.audit.gate import audit

        valid = validate(submission, self.view, self.task.budget, self._count_tokens)
        return valid, audit(submission, self.index, self.pool, suite=self._suite_digest)

    def score(self, submission: Submission, on_progress: Progress | None = None) -> Outcome:
        """Take a submission through the whole path.

        Raises:
            InvalidSubmission: It is not within the task's rules.
            RejectedSubmission: The audit found leakage; the message names the agent's rows and the kinds.
            InfrastructureError: Training or evaluation failed twice.
        """
        seconds: dict[str, float] = {}
        with _timed(seconds, "validate"):
            valid = validate(submission, self.view, self.task.budget, self._count_tokens)
        with _timed(seconds, "audit"):
            from curation_env.audit.gate import audit

            certificate = audit(submission, self.index, self.pool, suite=self._suite_digest)
        if not certificate.passed:
            raise RejectedSubmission(certificate.reason)
        files = {"certificate.json": (certificate.canonical() + "\n").encode()}
        memory: dict[str, Any] = {}
        results = {
            seed: self._trained(submission, seed, seconds, memory, on_progress) for seed in self.task.training_seeds
        }
        for seed, result in results.items():
            files.update({f"seed-{seed}/{name}": data for name, data in result.files.items()})
        per_seed = {seed: result.scores for seed, result in results.items()}
        cached = all(result.cached for result in results.values())
        scores = mean_scores(list(per_seed.values()))
        return Outcome(
            scores, per_seed, valid.rows, valid.supervised_tokens, certificate.totals, files, seconds, cached, memory
        )

    def train_scores(
        self, submission: Submission, seeds: list[int], on_progress: Progress | None = None
    ) -> dict[int, Scores]:
        """Train and evaluate with chosen seeds and without the task's budget: for calibration and references."""
        return {seed: self._trained(submission, seed, {}, {}, on_progress).scores for seed in seeds}

    def _trained(
        self,
        submission: Submission,
        seed: int,
        seconds: dict[str, float],
        memory: dict[str, Any],
        on_progress: Progress | None,
    ) -> _Result:
        def make(out: Path) -> None:
            plan = self._train(submission, seed, out, on_progress, seconds)
            if plan is not None:
                memory[str(seed)] = plan
            self._evaluate(out / "checkpoint", out, on_progress, seconds)
            shutil.rmtree(out / "checkpoint")

        return self._cached_or(submission.digest, seed, make)

    def signal(self, name: str, on_progress: Progress | None = None) -> tuple[np.ndarray, float]:
        """A signal of the init for every row of the agent's view, and its recorded price.

        Args:
            name: One of the task's `signals`.

        Returns:
            float32 of shape (rows of the view,), and seconds: the price is the same when the values were cached.
        """
        key = f"{self.assets.pool.name}--{Path(self.task.student).name}-{self._signal_key}/{name}"
        found = _read_signal(files := self._signals.read(key), len(self.pool))
        if found is None:
            if files:
                self._signals.discard(key)
            with Scratch() as scratch:
                out = scratch.path / "values.npy"
                payload = {
                    "name": name,
                    "init": str(self.assets.student),
                    "recipe": self.task.recipe_config,
                    "pool": str(self.assets.pool),
                    "device": self.device,
                    "out": str(out),
                }
                result = self._run("signal", lambda: payload, len(self.pool), on_progress)
                record = canonical_json({"price": round(float(result["price"]), 1)}).encode()
                files = {"values.npy": out.read_bytes(), "record.json": record}
            self._signals.write(key, files)
            # Where another process stored its own meanwhile, that one's price is the price from now on.
            found = _read_signal(self._signals.read(key), len(self.pool)) or _read_signal(files, len(self.pool))
            if found is None:
                raise StageFailed(f"signal {name} does not have one value for each of the pool's rows")
        values, price = found
        return values[self._view_positions()], price

    @functools.cached_property
    def device_class(self) -> str:
        """What kind of processor scores are comparable on: the processor's model, or that of the GPU that is used."""
        place = {"type": "cpu", "name": ""}
        # Whether a GPU is used, only the worker can tell: this process never imports torch. Without a driver's file
        # there is none, and nobody has to wait for the worker.
        if self.device != "cpu" and (self.device != "auto" or _drivers()):
            place = self._run("device", lambda: {"device": self.device}, 0, None)
        digest = hashlib.blake2b((place["name"] or _processor()).encode(), digest_size=4)
        return f"{place['type']}-{digest.hexdigest()}"

    @functools.cached_property
    def init(self) -> str | None:
        """sha256 over the files of a public student; None where the task's hash covers the files themselves.

        Raises:
            TaskMismatch: They are not those that were prepared.
        """
        return identity(self.assets.student) if card_of(self.task.student) else None

    @functools.cached_property
    def _engine(self) -> dict[str, Any]:
        """What moves scores and signals beside the task: code, libraries, processor, the files themselves."""
        return {
            "version": SCORING_VERSION,
            "libraries": {name: importlib.metadata.version(name) for name in _LIBRARIES},
            "device": self.device_class,
            "pool": self.pool.hash,
            **({"student": self.init} if self.init else {}),
        }

    @functools.cached_property
    def _result_key(self) -> str:
        # Several processes add the same numbers up in another order: scores differ by rounding alone, as between two
        # models of GPU, and are kept apart like those, so that a result read is the one that would be made.
        group = {"group": [self.group.processes, self.group.zero_stage]} if self.group.processes > 1 else {}
        engine = _short({**self._engine, "suite": self._suite_digest, **group})
        return f"v{SCORING_VERSION}-{engine}/{self.task.hash[:32]}"

    @functools.cached_property
    def _signal_key(self) -> str:
        made_by = {"student": student_hash(self.task.student), "recipe": self.task.recipe_config}
        return _short({**self._engine, **made_by})

    def _view_positions(self) -> np.ndarray:
        if self._kept is None:
            position = self.pool.position
            self._kept = np.fromiter((position[id_] for id_ in self.view.ids), dtype=np.int64)
        return self._kept

    def _train(
        self, submission: Submission, seed: int, out: Path, on_progress: Progress | None, seconds: dict[str, float]
    ) -> dict[str, Any] | None:
        """Train into `out`; return the way that it took on a GPU, None on a CPU."""
        payload = {
            "init": str(self.assets.student),
            "recipe": self.task.recipe_config,
            "pool": str(self.assets.pool),
            "ids": list(submission.ids),
            "rewrites": dict(submission.rewrites),
            "seed": seed,
            "device": self.device,
            "out": str(out),
            **self._sharing,
        }
        rows = len(submission.ids) * self.task.recipe_config["epochs"]
        with _timed(seconds, "train"):
            result = self._run("train", lambda: payload, rows, on_progress)
        _note_parts(seconds, "train", result)
        trained = Path(result["checkpoint"])
        if trained != out / "checkpoint":
            trained.rename(out / "checkpoint")
        return result.get("memory")

    @property
    def _sharing(self) -> dict[str, Any]:
        """What a stage that several processes share is told of them."""
        return {"group": list(self.group)} if self.group.shared else {}

    def _evaluate(self, checkpoint: Path, out: Path, on_progress: Progress | None, seconds: dict[str, float]) -> None:
        """Score a checkpoint; a judge of the user's gets a stage of its own, after the student has left the GPU."""
        suite, judge = self.task.suite_config, self.judge
        common = {"suite": suite, "suite_dir": str(self.assets.suite), "out": str(out)}
        student = {"checkpoint": str(checkpoint), "recipe": self.task.recipe_config, "device": self.device}
        student |= self._sharing
        items = sum(benchmark["cost"] for benchmark in suite["benchmarks"].values())

        def asking() -> dict[str, Any]:
            return {**common, "judge": judge.endpoint(suite) if judge is not None else None}

        if judge is None or (suite.get("judge") or {}).get("kind") != "endpoint":
            with _timed(seconds, "evaluate"):
                result = self._run("evaluate", lambda: {**asking(), **student}, items, on_progress)
            _note_parts(seconds, "evaluate", result)
        else:
            # One that is there already is probed before anything is generated.
            there = (lambda: {**common, **student}) if judge.is_local else (lambda: {**asking(), **student})
            with _timed(seconds, "evaluate"):
                answered = self._run("answer", there, items, on_progress)
            _note_parts(seconds, "evaluate", answered)
            with _timed(seconds, "judge"), judge.serving():
                result = self._run("grade", asking, items, on_progress)
        scores = _checked_scores(result, self.task)
        (out / "scores.json").write_bytes((canonical_json(scores.to_json()) + "\n").encode())

    def _run(
        self, stage: str, payload: Callable[[], dict[str, Any]], rows: int, on_progress: Progress | None
    ) -> dict[str, Any]:
        """Run a stage; an infrastructure failure is tried once more, then raised with its cause.

        Args:
            payload: Called at each attempt: a judge that died has another address when it is asked for again.
            rows: How much there is to do, as `SECONDS_PER_ROW` counts it.
        """
        from curation_env.executor import Stage

        for attempt in (1, 2):
            try:
                future: Future[dict[str, Any]] = self.executor.submit(
                    Stage(stage, payload()), self._limits.get(stage) or self._allowed(stage, rows), on_progress
                )
                return future.result()
            except CurationError as error:
                if not error.retry or attempt == 2:
                    raise
        raise AssertionError("unreachable")

    def _allowed(self, stage: str, rows: int) -> Resources:
        """The limits of a stage of this size."""
        from curation_env.executor import Resources

        bounded = stage != "device" and self.device_class.startswith("cpu")
        seconds = STAGE_SECONDS + SECONDS_PER_ROW[stage] * rows
        return Resources(seconds, MEMORY_MB if bounded else None, self.group.gpu_memory_gib)

    def _cached_or(self, digest: str, seed: int, make: Callable[[Path], None]) -> _Result:
        """The result of one (submission, seed), from the cache or by running `make(folder)`."""
        key = ""
        if self._results is not None:
            key = f"{self._result_key}/{digest}/{seed}"
            if files := self._results.read(key):
                try:
                    return _as_result(files, cached=True)
                except (KeyError, TypeError, ValueError, AttributeError):
                    self._results.discard(key)
        # The machines of a hostfile see the data root alone.
        with Scratch(self.data_root / "scratch" if self.group.hostfile else None) as scratch:
            make(scratch.path)
            present = (scratch.path / name for name in _RESULT_FILES)
            files = {path.name: path.read_bytes() for path in present if path.is_file()}
        result = _as_result(files, cached=False)
        if self._results is not None:
            self._results.write(key, files)
        return result


#: What is kept of a run; `judge.jsonl` is the record of what the judge was asked and said, `judge.json` its version.
_RESULT_FILES = ("scores.json", "predictions.jsonl", "judge.jsonl", "judge.json", "training.jsonl")


class _Result(NamedTuple):
    scores: Scores
    files: dict[str, bytes]
    cached: bool


def _as_result(files: Mapping[str, bytes], *, cached: bool) -> _Result:
    """Take the files of a run for a result.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: They are not one: a file is missing, empty or something else.
    """
    scores = Scores.from_json(json.loads(files["scores.json"]))
    if not files["predictions.jsonl"]:
        raise ValueError("no predictions")
    for part in PARTS:
        scores.mean(part)
    return _Result(scores, {name: files[name] for name in _RESULT_FILES if name in files}, cached)


def _read_signal(files: Mapping[str, bytes], rows: int) -> tuple[np.ndarray, float] | None:
    """Values and price of a signal; None where the files are not those of one."""
    try:
        values = np.load(io.BytesIO(files["values.npy"]))
        price = float(json.loads(files["record.json"])["price"])
    except (KeyError, TypeError, ValueError, EOFError):
        return None
    return (values, price) if values.shape == (rows,) else None


def _checked_scores(result: dict[str, Any], task: Task) -> Scores:
    """All benchmarks or an error: a benchmark that is missing or not a number is never averaged away."""
    parts = result["scores"]
    for name in task.benchmarks:
        value = parts["all"].get(name)
        if value is None or not np.isfinite(value):
            raise StageFailed(f"evaluation gave no score for {name}: all benchmarks or none")
    stderr = {part: float(result["stderr"].get(part, 0.0)) for part in PARTS}  # 0: a part without items
    return Scores(parts, stderr, result["categories"], result["n"])


def mean_scores(runs: list[Scores]) -> Scores:
    """Mean over training seeds of one submission.

    The items are the same in every run, so their part of the error does not shrink with more seeds: the variance of a
    part's mean is the mean of the runs' item variances plus the variance of the runs' means over the number of runs.
    """
    if len(runs) == 1:
        return runs[0]

    def mean(tables: list[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
        return {
            outer: {inner: float(np.mean([t[outer][inner] for t in tables])) for inner in tables[0][outer]}
            for outer in tables[0]
        }

    return Scores(
        mean([run.parts for run in runs]),
        {part: _joint_error(runs, part) for part in runs[0].stderr},
        mean([run.categories for run in runs]),
        runs[0].n_items,
    )


def _joint_error(runs: list[Scores], part: str) -> float:
    items = np.mean([run.stderr[part] ** 2 for run in runs])
    seeds = np.var([run.mean(part) for run in runs], ddof=1) / len(runs) if runs[0].parts[part] else 0.0
    return float(np.sqrt(items + seeds))


def _drivers() -> bool:
    """Whether a GPU's driver is there (NVIDIA, AMD, or a GPU of a Windows host)."""
    places = ("/dev/nvidiactl", "/dev/nvidia0", "/proc/driver/nvidia/version", "/dev/kfd", "/dev/dxg")
    return any(Path(place).exists() for place in places)


def _short(value: Any) -> str:
    return hashlib.blake2b(canonical_json(value).encode(), digest_size=8).hexdigest()


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    import platform

    return platform.processor() or platform.machine()


def _note_parts(seconds: dict[str, float], stage: str, result: dict[str, Any]) -> None:
    """Add what the parts of a stage took, as its worker measured them, to `seconds["<stage>: <part>"]`."""
    for part, value in result["seconds"].items():
        name = f"{stage}: {part}"
        seconds[name] = seconds.get(name, 0.0) + value


class _timed:
    """Add the seconds of a block to `seconds[name]`."""

    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self.seconds, self.name = seconds, name

    def __enter__(self) -> None:
        self.started = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.seconds[self.name] = self.seconds.get(self.name, 0.0) + time.monotonic() - self.started
