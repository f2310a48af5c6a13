"""The path to scores on the nano task, with real workers that are killed, starved and lied to."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from curation_env.assets import data_root as root_of
from curation_env.assets import locate, prepared, view_fits
from curation_env.calibrate import calibrate, random_submission
from curation_env.errors import (
    InvalidSubmission,
    JudgeUnavailable,
    MissingAssets,
    OutOfMemory,
    RejectedSubmission,
    StageTimeout,
    TaskMismatch,
    WorkerDied,
)
from curation_env.executor import LocalExecutor, Resources
from curation_env.judge import Judge
from curation_env.pipeline import PARTS, Pipeline, Scores, mean_scores
from curation_env.pool import Pool
from curation_env.submission import Submission
from curation_env.task import Task


@pytest.fixture(scope="module")
def executor():
    with LocalExecutor() as made:
        yield made


@pytest.fixture(scope="module")
def judge():
    made = Judge()
    yield made
    made.close()


@pytest.fixture
def make(executor, judge, data_root):
    def pipeline(task: Task | None = None, **options) -> Pipeline:
        task = task or Task.load("nano")
        options = {"cache": False, "device": "cpu", "data_root": data_root, **options}
        return Pipeline(task, prepared(task, data_root), executor, options.pop("judge", judge), **options)

    return pipeline


def test_equal_submissions_get_equal_scores_bit_for_bit(make, executor):
    pipeline = make()
    submission = random_submission(pipeline, 1)
    first = pipeline.score(submission)
    executor.kill()  # a fresh process must say the same as a warm one
    second = pipeline.score(Submission.of(reversed(submission.ids)))
    assert first.files == second.files
    assert (first.rows, first.supervised_tokens) == (second.rows, second.supervised_tokens)
    for part in PARTS:
        assert first.scores.parts[part] == second.scores.parts[part]
    other = make(Task.load("nano", seeds=2)).score(submission)
    assert other.per_seed[42].parts == first.scores.parts
    assert other.per_seed[1337].parts != first.scores.parts


def test_results_are_cached_by_task_submission_and_seed(make, tmp_path):
    pipeline = make(data_root=tmp_path, cache=True)
    submission = random_submission(pipeline, 2)
    fresh, again = pipeline.score(submission), pipeline.score(submission)
    assert (fresh.cached, again.cached) == (False, True)
    assert fresh.files == again.files
    assert not make(Task.load("nano", rows=97), data_root=tmp_path, cache=True).score(submission).cached
    # A folder of the cache that was damaged, or that nothing can be written into, costs time and never a score.
    [damaged] = (path for path in (tmp_path / "results").rglob("42") if pipeline.task.hash[:32] in str(path))
    (damaged / "predictions.jsonl").write_bytes(b"")
    repaired = pipeline.score(submission)
    assert not repaired.cached
    assert repaired.files == fresh.files
    assert pipeline.score(submission).cached
    (tmp_path / "file").write_text("")
    unwritable = make(data_root=tmp_path / "file", cache=True).score(submission)
    assert unwritable.files == fresh.files


def test_results_of_another_engine_or_of_other_files_are_not_taken(make, tmp_path):
    pipeline = make()
    keys = {pipeline._result_key, pipeline._signal_key}
    assert keys == {make()._result_key, make()._signal_key}
    moved = make()
    moved._engine = {**moved._engine, "version": 0}  # shadows the cached property
    assert not keys & {moved._result_key, moved._signal_key}
    retold = make(Task.load("nano").model_copy(update={"recipe": str(_recipe_with_other_length(tmp_path))}))
    assert retold._signal_key not in keys


def _recipe_with_other_length(folder: Path) -> Path:
    from curation_env.task import conf_dir

    text = (conf_dir() / "recipe" / "mini-v1.yaml").read_text().replace("max_length: 128", "max_length: 96")
    (folder / "other.yaml").write_text(text)
    return folder / "other"


def test_the_processor_is_the_one_that_the_worker_uses(make, executor):
    assert make(device="auto").device_class == make(device="cpu").device_class
    assert make().device_class.startswith("cpu-")


def test_the_reported_error_is_the_jackknife_over_groups(make):
    outcome = make().score(random_submission(make(), 5))
    rows = [json.loads(line) for line in outcome.files["seed-42/predictions.jsonl"].splitlines()]
    shown = outcome.scores.stderr
    assert set(shown) == set(PARTS)
    assert all(0 < value < 20 for value in shown.values())
    # Circular families and sets of questions stand or fall together, which a spread over items does not see.
    items = {}
    for row in rows:
        items.setdefault(row["benchmark"], []).append(row["score"])
    naive = math.sqrt(sum(np.var(scores, ddof=1) / len(scores) for scores in items.values())) * 100 / len(items)
    assert shown["all"] > 1.02 * naive


def test_errors_over_training_seeds_keep_the_items_part():
    runs = [Scores({"all": {"a": value}}, {"all": 2.0}) for value in (10.0, 14.0, 12.0)]
    joint = mean_scores(runs)
    assert joint.parts["all"]["a"] == 12.0
    assert joint.stderr["all"] == pytest.approx(math.sqrt(4.0 + 4.0 / 3))


def test_nothing_in_a_commit_names_time_host_or_path(make, data_root):
    outcome = make().score(random_submission(make(), 3))
    text = b"\n".join(outcome.files.values()).decode()
    assert str(data_root) not in text
    assert "/tmp/" not in text
    assert set(outcome.files) == {
        "certificate.json",
        *(f"seed-42/{name}" for name in ("scores.json", "predictions.jsonl", "judge.jsonl", "training.jsonl")),
    }


def test_a_killed_trainer_is_retried_once_and_not_scored_twice(make, executor):
    pipeline = make()
    submission = random_submission(pipeline, 4)
    expected = pipeline.score(submission).scores
    kills = []

    def once(progress):
        if progress["stage"] == "train" and not kills:
            kills.append(progress["done"])
            executor.kill()

    assert pipeline.score(submission, once).scores == expected
    assert kills

    def always(progress):
        if progress["stage"] == "train":
            executor.kill()

    with pytest.raises(WorkerDied):
        pipeline.score(submission, always)
    assert pipeline.score(submission).scores == expected


def test_a_dead_judge_is_never_a_score(make):
    class DeadJudge(Judge):
        """An endpoint on a port where nobody listens."""

        def endpoint(self, suite):
            return {"url": "http://127.0.0.1:9/v1", "model": suite["judge"]["model"], "key": ""}

    with pytest.raises(JudgeUnavailable):
        make(judge=DeadJudge()).base()


def test_a_judge_that_dies_is_replaced_for_the_second_try(make):
    expected = make().base().scores
    kills = []

    def once(progress):
        if progress["stage"] == "evaluate" and not kills:
            kills.append(mortal._process.pid)
            os.kill(mortal._process.pid, signal.SIGKILL)

    mortal = Judge()
    try:
        assert make(judge=mortal).base(once).scores == expected
        assert kills
        assert mortal._process.pid != kills[0]
    finally:
        mortal.close()


def test_a_worker_that_hangs_is_timed_out_tried_again_and_never_scored(make, executor):
    submission = random_submission(make(), 6)
    stopped = []

    def stop(progress):
        if progress["stage"] in ("images", "train") and executor.pid not in stopped:
            stopped.append(executor.pid)
            os.kill(executor.pid, signal.SIGSTOP)

    executor.start()
    hanging = make(limits={"train": Resources(timeout=1.0)})
    started = time.monotonic()
    with pytest.raises(StageTimeout, match="train took longer than 1 s"):
        hanging.score(submission, stop)
    assert time.monotonic() - started < 60
    assert len(stopped) == 2
    assert make().score(submission).scores.parts["all"]


def test_a_stage_without_memory_is_an_error_of_the_machine(make, executor):
    executor.kill()  # a worker that has trained keeps memory that a second run may use
    starved = make(limits={"train": Resources(memory_mb=1)})
    with pytest.raises(OutOfMemory):
        starved.score(random_submission(starved, 7))


def test_every_stage_has_limits(make):
    pipeline = make()
    for stage in ("train", "evaluate", "signal", "device"):
        assert pipeline._allowed(stage, 1000).timeout >= 600
    assert pipeline._allowed("train", 1000).memory_mb
    assert pipeline._allowed("train", 9000).timeout > pipeline._allowed("train", 1000).timeout


def test_a_missing_benchmark_is_never_a_score(make, own_root):
    pipeline = make()
    pipeline.assets = locate(pipeline.task, own_root)
    (pipeline.assets.suite / "MiniOCR.tsv").unlink()
    with pytest.raises(MissingAssets, match="MiniOCR"):
        pipeline.base()


def test_blocked_rows_cannot_be_selected_and_leaks_cannot_be_written(make):
    pipeline = make()
    pool = pipeline.pool
    truth = pd.read_parquet(pool.path / "truth.parquet")
    blocked = [id_ for id_ in pool.ids if id_ not in pipeline.view.position]
    assert set(truth[truth.fault == "leak"].id) <= set(blocked)
    with pytest.raises(InvalidSubmission, match="not in the pool"):
        pipeline.score(Submission.of(blocked[:1]))
    leak = truth[truth.leak_kind.str.startswith("question+answer")].id.iloc[0]
    conversation = pool.row(pool.position[leak])["conversation"]
    rewriting = make(Task.load("nano").model_copy(update={"rewrite": True}))
    target = pipeline.view.ids[5]
    with pytest.raises(RejectedSubmission, match=target) as caught:
        rewriting.score(Submission.of([target], {target: conversation}))
    assert conversation[0]["assistant"] not in str(caught.value)


def test_rewritten_rows_are_counted_as_the_trainer_does(make):
    from curation_env.training.data import Encoder
    from curation_env.training.recipe import Recipe

    pipeline = make(Task.load("nano").model_copy(update={"rewrite": True}))
    encoder = Encoder.load(pipeline.assets.student, Recipe.model_validate(pipeline.task.recipe_config))
    rows = list(pipeline.view.rows(range(0, len(pipeline.view), 5)))
    for row in rows:
        pictured = row["image"] is not None
        assert pipeline._count_tokens(row["conversation"], pictured) == encoder.encode_rows([row])[0].n_supervised
        long = row["conversation"] + [{"user": "what ? " * 30, "assistant": "a red box , ünseen " * 20}] * 3
        cut = encoder.encode_rows([row | {"conversation": long}])[0].n_supervised
        assert pipeline._count_tokens(long, pictured) == cut
    counts = [pipeline._count_tokens(row["conversation"], row["image"] is not None) for row in rows]
    assert counts == pipeline.view.n_tokens[::5].tolist()
    lost = {rows[0]["id"]: [{"user": "what ? " * 100, "assistant": "nothing of this is left"}]}
    with pytest.raises(InvalidSubmission, match="no supervised token"):
        pipeline.score(Submission.of(lost, lost))


def test_the_loss_signal_is_aligned_with_the_view_and_keeps_its_price(make):
    pipeline = make()
    values, price = pipeline.signal("loss")
    again, same = pipeline.signal("loss")
    assert values.shape == (len(pipeline.view),)
    assert values.dtype == np.float32
    assert np.isfinite(values).all()
    np.testing.assert_array_equal(values, again)
    assert price == same >= 0


def test_a_signal_has_one_price_also_when_two_compute_it_at_once(make, tmp_path):
    """Else a run that goes on after a crash would be charged another price than before."""
    pipeline = make(data_root=tmp_path)
    compute = pipeline._run

    def overtaken(*arguments):
        result = compute(*arguments)
        place = (
            tmp_path / "signals" / f"{pipeline.assets.pool.name}--{pipeline.task.student}-{pipeline._signal_key}/loss"
        )
        place.mkdir(parents=True)  # by another process, which was quicker
        np.save(place / "values.npy", np.zeros(len(pipeline.pool), np.float32))
        (place / "record.json").write_text('{"price":1234.5}')
        return result

    pipeline._run = overtaken
    assert pipeline.signal("loss")[1] == make(data_root=tmp_path).signal("loss")[1] == 1234.5


def test_calibration_measures_every_part(make):
    reference = calibrate(make(), subsets=2, seeds=2)
    assert set(reference) == set(PARTS)
    for part in PARTS:
        row = reference[part]
        assert row["random"]["n"] == 2
        assert row["base"]["mean"] < row["full"]["mean"]
        free = [row[name]["judge_free"] for name in ("base", "random", "full")]
        assert all(0 <= one["mean"] <= 100 for one in free)
        assert (free[0]["sd"], free[1]["sd"] is not None) == (None, True)
        assert row["judge_free_seed_sd"] >= 0
        assert free[1]["mean"] != row["random"]["mean"]
        assert "curation-env calibrate nano" in row["full"]["source"]


def test_missing_assets_are_listed_with_the_command(tmp_path):
    from curation_env.assets import describe_missing

    task = Task.load("nano")
    text = describe_missing(task, locate(task, root_of(tmp_path)))
    assert "curation-env prepare nano" in text
    assert all(str(path) in text for path in (tmp_path / "pools", tmp_path / "suites", tmp_path / "views"))


def test_a_pool_that_is_not_the_pinned_one_is_refused(data_root):
    task = Task.load("nano")
    wrong = task.model_copy(
        update={"pool": task.pool.model_copy(update={"hash": "0" * 64}), "pinned_with": {"Pillow": "1.0"}}
    )
    with pytest.raises(TaskMismatch, match="Pillow"):
        prepared(wrong, data_root)


@pytest.fixture
def own_root(data_root, tmp_path):
    """A data root of the test's own, with what the session has prepared."""
    prepared(Task.load("nano"), data_root)
    for name in ("pools", "suites", "views"):
        shutil.copytree(data_root / name, tmp_path / "root" / name)
    return tmp_path / "root"


def _edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("what", ["world", "truth", "suite", "rules", "view of another pool", "cut off", "file"])
def test_what_is_outdated_is_made_again(own_root, what):
    task = Task.load("nano")
    assets = locate(task, own_root)
    good = (assets.view / "meta.json").read_text()
    if what == "world":  # what an older generator left under the same name
        _edit(assets.pool / "meta.json", world_hash="0" * 64, hash="1" * 64)
    elif what == "truth":
        (assets.pool / "truth.parquet").unlink()
    elif what == "view of another pool":
        _edit(assets.view / "meta.json", hash="1" * 64)
    elif what == "file":
        (assets.suite / "MiniOCR.tsv").unlink()
    elif what == "cut off":
        (assets.view / "meta.json").write_text(good[:40])
    else:
        _edit(assets.index / "meta.json", **{what: {} if what == "rules" else "0" * 32})
    (assets.pool.parent / ".left.partial").mkdir()  # by a process that was killed
    (assets.view / ".rows.1.partial").mkdir()
    assert prepared(task, own_root) == assets
    assert (assets.view / "meta.json").read_text() == good
    assert (assets.pool / "truth.parquet").is_file()
    assert assets.state()["view"][1]
    assert not [path for path in own_root.rglob(".*") if path.name != ".prepare.lock"]
    assert view_fits(task, assets)


def test_the_audit_is_of_the_suite_that_is_evaluated(make, own_root):
    pipeline = make()
    pipeline.assets = locate(pipeline.task, own_root)
    with (pipeline.assets.suite / "MiniOCR.tsv").open("a") as stream:
        stream.write("\n")
    with pytest.raises(TaskMismatch, match="another suite"):
        pipeline.check(random_submission(pipeline, 1))


def test_the_view_is_the_pool_without_its_blocked_rows(make):
    pipeline = make()
    view = Pool.open(pipeline.assets.view)
    kept = [id_ for id_ in pipeline.pool.ids if id_ in view.position]
    assert view.ids == kept
    assert "leak" not in json.dumps(view.meta)
