"""The path to scores on the nano task, with real workers that are killed, starved and lied to."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pandas as pd
import pytest

from curation_env.assets import data_root as root_of
from curation_env.assets import locate, prepared
from curation_env.calibrate import calibrate, random_submission
from curation_env.errors import InvalidSubmission, JudgeUnavailable, MissingAssets, RejectedSubmission, WorkerDied
from curation_env.executor import LocalExecutor
from curation_env.judge import Judge
from curation_env.pipeline import PARTS, Pipeline
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


def test_results_are_cached_by_task_submission_and_seed(make, tmp_path, data_root):
    shutil.copytree(data_root / "views", tmp_path / "views", dirs_exist_ok=True)
    pipeline = make(data_root=tmp_path, cache=True)
    submission = random_submission(pipeline, 2)
    fresh, again = pipeline.score(submission), pipeline.score(submission)
    assert (fresh.cached, again.cached) == (False, True)
    assert fresh.files == again.files
    assert not make(Task.load("nano", rows=97), data_root=tmp_path, cache=True).score(submission).cached


def test_nothing_in_a_commit_names_time_host_or_path(make, data_root):
    outcome = make().score(random_submission(make(), 3))
    text = b"\n".join(outcome.files.values()).decode()
    assert str(data_root) not in text
    assert "/tmp/" not in text
    assert set(outcome.files) == {
        "certificate.json",
        *(f"seed-42/{name}" for name in ("scores.json", "predictions.jsonl", "training.jsonl")),
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


def test_a_missing_benchmark_is_never_a_score(make, tmp_path, data_root):
    task = Task.load("nano")
    prepared(task, data_root)
    for name in ("pools", "suites", "views"):
        shutil.copytree(data_root / name, tmp_path / name)
    pipeline = make(task, data_root=tmp_path)
    pipeline.assets = locate(task, tmp_path)
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


def test_the_loss_signal_is_aligned_with_the_view_and_keeps_its_price(make):
    pipeline = make()
    values, price = pipeline.signal("loss")
    again, same = pipeline.signal("loss")
    assert values.shape == (len(pipeline.view),)
    assert values.dtype == np.float32
    assert np.isfinite(values).all()
    np.testing.assert_array_equal(values, again)
    assert price == same >= 0


def test_calibration_measures_every_part(make):
    reference = calibrate(make(), subsets=2, seeds=2)
    assert set(reference) == set(PARTS)
    for part in PARTS:
        row = reference[part]
        assert row["random"]["n"] == 2
        assert row["base"]["mean"] < row["full"]["mean"]
        assert "curation-env calibrate nano" in row["full"]["source"]


def test_missing_assets_are_listed_with_the_command(tmp_path):
    from curation_env.assets import describe_missing

    task = Task.load("nano")
    text = describe_missing(task, locate(task, root_of(tmp_path)))
    assert "curation-env prepare nano" in text
    assert all(str(path) in text for path in (tmp_path / "pools", tmp_path / "suites", tmp_path / "views"))


def test_a_pool_that_is_not_the_pinned_one_is_refused(data_root):
    from curation_env.errors import TaskMismatch

    task = Task.load("nano")
    wrong = task.model_copy(
        update={"pool": task.pool.model_copy(update={"hash": "0" * 64}), "pinned_with": {"Pillow": "1.0"}}
    )
    with pytest.raises(TaskMismatch, match="Pillow"):
        prepared(wrong, data_root)


def test_the_view_is_the_pool_without_its_blocked_rows(make):
    pipeline = make()
    view = Pool.open(pipeline.assets.view)
    kept = [id_ for id_ in pipeline.pool.ids if id_ in view.position]
    assert view.ids == kept
    assert "leak" not in json.dumps(view.meta)
