"""A task of one's own over a pool from public files: prepared by the command, audited, and trained on."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from families_support import make_qwen
from ingest_support import make_source, put, record, write_records

from curation_env.assets import locate, prepared
from curation_env.errors import MissingAssets
from curation_env.executor import LocalExecutor
from curation_env.judge import Judge
from curation_env.mini.render import encode_png, pixels
from curation_env.mini.suite import suite_items
from curation_env.mini.world import MINI
from curation_env.pipeline import Pipeline
from curation_env.pool import Pool, row_files
from curation_env.submission import Submission
from curation_env.task import Task, TaskFileError, UnknownTask
from curation_env.training.data import Encoder
from curation_env.training.recipe import Recipe

OWN = """
name: own
family: mini
pool: {kind: llava, text: true}
student: mini-llava
recipe: mini-v1
suite: mini-v1
audit: mini-v1
iterations: 2
rows: 24
"""


def run(*arguments, expect: int = 0) -> str:
    command = [sys.executable, "-m", "curation_env.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == expect, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """(folder with own.yaml, the task, its assets, what `prepare` printed): an item of the suite is in the pool."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "own.yaml").write_text(OWN)
    task, root = Task.load(str(folder / "own.yaml")), folder / "root"
    records = make_source(folder / "source")
    leaked = suite_items(MINI)["MiniOCR"][0]
    put(folder / "source", "vg/VG_100K_2/1.png", encode_png(pixels(leaked.picture)))
    records.append(record(60, "vg/VG_100K_2/1.png", leaked.prompt, leaked.gold))
    (folder / "source" / records[2]["image"]).unlink()
    write_records(folder / "source", records)
    said = run("prepare", folder / "own.yaml", "--source", folder / "source", "--data-root", root)
    return folder, task, prepared(task, root), said


def test_prepare_says_what_became_of_the_files(own):
    folder, _, assets, said = own
    assert "pool llava: 60 of 665,298 rows; 1 missing: ocr_vqa 1" in said
    assert str(assets.pool / "faults.jsonl") in said
    assert "pool llava: 60 rows" in said
    assert "1 blocked by the audit" in said
    findings = json.loads(run("doctor", folder / "own.yaml", "--data-root", folder / "root", "--json"))["findings"]
    assert findings[0]["ok"]
    assert "60 of 665,298 rows; 1 missing: ocr_vqa 1. Look at ocr_vqa/images (OCR-VQA" in findings[0]["text"]


def test_a_view_has_the_student_s_counts_and_the_pool_s_files(own):
    folder, task, assets, _ = own
    pool, view = Pool.open(assets.pool), Pool.open(assets.view)
    assert len(view) == len(pool) - 1
    assert not any(row["image"] and row["image"]["path"] == "vg/VG_100K_2/1.png" for row in view.rows(range(len(view))))
    assert view.table.column_names == ["id", "source", "image", "conversation", "n_tokens"]
    with LocalExecutor() as executor:
        count = Pipeline(task, assets, executor, data_root=folder / "root")._count_tokens
    rows = list(view.rows(range(len(view))))
    assert view.n_tokens.tolist() == [count(row["conversation"], row["image"] is not None) for row in rows]
    assert view.n_tokens.dtype == np.int32
    assert view.rows([0]).__next__()["n_tokens"] == view.n_tokens[0]
    # The shard of text alone lost no row, so it is the pool's own file; and no student's view is a copy of another's.
    text, shared = row_files(assets.view / "rows")[-1], row_files(assets.index.parent / "rows")[-1]
    assert text.samefile(shared)
    assert text.samefile(row_files(assets.pool / "rows")[-1])


def test_a_row_of_the_pool_is_trained_on_and_scored(own):
    folder, task, assets, _ = own
    judge = Judge()
    with LocalExecutor() as executor:
        pipeline = Pipeline(task, assets, executor, judge, data_root=folder / "root", device="cpu")
        outcome = pipeline.score(Submission.of(pipeline.view.ids[-24:]))
    judge.close()
    assert outcome.rows == 24
    assert outcome.supervised_tokens == pipeline.view.n_tokens[-24:].sum()
    assert len(outcome.scores.parts["feedback"]) == 8


def test_a_list_leaves_out_what_the_audit_blocks(own):
    folder, *_ = own
    out = folder / "ids.txt"
    source = folder / "source" / "llava_v1_5_mix665k.json"
    found = json.loads(
        run("match", folder / "own.yaml", source, "--out", out, "--data-root", folder / "root", "--json")
    )
    lost = {"blocked by the audit": 1, "left out of the pool: missing": 1}
    assert found == {"records": 61, "matched": 59, "lost": lost, "audited": True}
    out.write_text("".join(out.read_text().splitlines(True)[:20]))
    assert "passed" in run("audit", folder / "own.yaml", out, "--data-root", folder / "root")


def test_another_student_or_version_needs_no_second_pool(own):
    folder, task, assets, _ = own
    images = Task.model_validate({**task.model_dump(), "pool": {"kind": "llava", "text": False}})
    with pytest.raises(MissingAssets, match=r"lacks:\n  view: .*prepare with: curation-env prepare TASK.yaml, once .*"):
        prepared(images, folder / "root")  # an audit takes long, so a reset does not begin one
    made = prepared(images, folder / "root", make=True)
    assert made.pool.name == "llava-images"
    assert set(Pool.open(made.view).sources) == {"coco", "gqa", "ocr_vqa", "textvqa", "vg"}
    assert images.hash != task.hash
    assert prepared(task, folder / "root") == assets


def test_a_student_whose_images_keep_their_size_has_counts_of_its_own(own, tmp_path):
    folder, task, assets, _ = own
    student = make_qwen(tmp_path)
    other = Task.model_validate({**task.model_dump(), "student": str(student), "recipe": "qwen2.5-vl-3b-v1"})
    made = prepared(other, folder / "root", make=True)
    assert made.index == assets.index
    view = Pool.open(made.view)
    encoder = Encoder.load(student, Recipe.load("qwen2.5-vl-3b-v1"))
    rows = encoder.encode_rows(list(view.rows(range(len(view)))))
    assert view.n_tokens.tolist() == [row.n_supervised for row in rows]
    assert view.n_tokens.tolist() != Pool.open(assets.view).n_tokens.tolist()


def test_a_task_file_of_one_s_own(tmp_path):
    assert Task.load("nano").hash == Task.load(str(_conf("nano"))).hash
    with pytest.raises(UnknownTask, match="no task file"):
        Task.load(str(tmp_path / "none.yaml"))
    for text, words in (
        ("- a", "holds no fields"),
        ("a: [", "can't be read"),
        (OWN.replace("llava", "moon"), "pool: .*moon"),
    ):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(TaskFileError, match=words):
            Task.load(str(tmp_path / "bad.yaml"))
    assert "no pool at" in run("prepare", _own(tmp_path), "--data-root", tmp_path, expect=2)
    assert "leave --suite out" in run("prepare", "nano", "--suite", tmp_path, expect=2)
    assert "leave --source out" in run("prepare", "nano", "--source", tmp_path, expect=2)


def test_a_suite_file_of_one_s_own_has_a_folder_of_its_name(tmp_path):
    own = tmp_path / "fewer.yaml"
    own.write_text(_conf("vlm5-v1", "suite").read_text().replace("name: vlm5-v1", "name: fewer"))
    llava = Task.load("llava")
    task = Task.model_validate({**llava.model_dump(), "suite": str(own)})
    assert task.suite_config["name"] == "fewer"
    assert set(task.suite_config["benchmarks"]) < set(llava.suite_config["benchmarks"])
    assert locate(task, tmp_path).suite == tmp_path / "suites" / "fewer"
    assert task.hash != llava.hash
    own.unlink()
    with pytest.raises(TaskFileError, match="no suite file"):
        _ = task.suite_config


def _conf(name: str, group: str = "task"):
    from curation_env.task import conf_dir

    return conf_dir() / group / f"{name}.yaml"


def _own(folder):
    (folder / "own.yaml").write_text(OWN)
    return folder / "own.yaml"
