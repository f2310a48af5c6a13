"""From a folder of public files to pools: what is in them, what is reported, and what a kill or a repair costs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from ingest_support import make_source, picture, put, record, words, write_records

from curation_env.errors import InvalidSetting, MissingAssets
from curation_env.ingest.build import ingest
from curation_env.ingest.report import coverage, differences, read_faults, read_report
from curation_env.pool import Pool, image_digest, row_id

ROWS = 16  # of a shard


def make(source: Path, pools: Path, **options) -> Pool:
    return Pool.open(ingest("llava", source, pools, workers=1, rows_per_shard=ROWS, **options)[0])


def arrow_of(pool: Path, shard: str) -> Path:
    return pool / "rows" / json.loads((pool / "shards" / "files.json").read_text())[shard]


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """A source with one of every fault, and its pools: (records, folder of the source, folder of pools)."""
    folder = tmp_path_factory.mktemp("damaged")
    source = folder / "source"
    records = make_source(source)
    put(source, records[0]["image"], picture(0)[:200])
    put(source, records[1]["image"], b"")
    put(source, records[3]["image"], b"<html>404</html>")
    put(source, records[4]["image"], picture(4, "GIF"))
    missing = source / records[2]["image"]
    missing.unlink()
    put(source, records[8]["image"].replace(".jpg", ".png"), picture(8, "PNG"))
    (source / records[8]["image"]).unlink()
    records.append(records[6])  # the same row once more
    records.append(record(0, records[7]["image"], "another question", "another answer"))  # an id that others have
    records.append({"id": "x", "image": "coco/train2017/000000.jpg"})
    records.append(record(1, None, "hello", "hi", "and?"))
    write_records(source, records)
    make(source, folder / "pools")
    return records, source, folder / "pools"


def test_rows_are_the_records_those_with_images_first(damaged):
    records, _, pools = damaged
    pool = Pool.open(pools / "llava")
    turns = [dict(zip(("user", "assistant"), words(4), strict=True))]
    image = records[4]["image"]
    assert pool.row(0) == {
        "id": row_id("vg", image, turns),
        "source": "vg",
        "image": {"bytes": picture(4, "GIF"), "path": image},
        "conversation": turns,
    }
    lost = {0, 1, 2, 3, 62}
    kept = [k for k in range(len(records)) if k not in lost]
    expected = [records[k].get("image") for k in kept if "image" in records[k]]
    found = [row["image"]["path"] for row in pool.rows(range(len(expected)))]
    assert found == expected
    assert all(row["image"] is None for row in pool.rows(range(len(expected), len(pool))))
    assert len(pool) == len(kept)
    assert pool.sources[-11:] == ["text"] * 11
    digests = [row["image"]["bytes"] if row["image"] else None for row in pool.rows(range(len(pool)))]
    assert [digest.tobytes() for digest in pool.image_digests] == [image_digest(data) for data in digests]
    assert pool.row(pool.ids.index(f"{pool.ids[expected.index(records[6]['image'])]}-1"))["source"] == "coco"


def test_the_version_without_text_is_the_same_files(damaged):
    _, _, pools = damaged
    whole, images = Pool.open(pools / "llava"), Pool.open(pools / "llava-images")
    assert images.ids == whole.ids[: len(images)]
    assert set(whole.sources[len(images) :]) == {"text"}
    assert images.hash != whole.hash
    shared = [
        os.path.samefile(arrow_of(pools / "llava", s), arrow_of(pools / "llava-images", s)) for s in ("image-00000",)
    ]
    assert shared == [True]
    assert not list(pools.glob(".*"))


def test_every_fault_is_reported(damaged):
    records, _, pools = damaged
    report = read_report(pools / "llava")
    assert report["faults"] == {"empty": 1, "malformed": 1, "missing": 1, "not an image": 1, "truncated": 1}
    assert report["notes"] == {"last turn without an answer left out": 1, "mislabelled": 1, "other ending": 1}
    assert report["sources"]["ocr_vqa"]["faults"] == {"missing": 1}
    assert (report["rows"], report["made_of"]["records"]) == (len(records) - 5, len(records))
    lines = {line["record"]: line for line in read_faults(pools / "llava")}
    assert set(lines) == {0, 1, 2, 3, 4, 8, 62, 63}
    assert (lines[4]["what"], lines[4]["detail"], lines[4]["kept"]) == ("mislabelled", "a GIF named .jpg", True)
    gone = lines[2]
    assert (gone["what"], gone["image"], gone["name"]) == ("missing", records[2]["image"], "000000000002")
    assert gone["id"] == row_id(
        "ocr_vqa", records[2]["image"], [dict(zip(("user", "assistant"), words(2), strict=True))]
    )
    assert gone["id"] not in Pool.open(pools / "llava").position
    assert coverage(report).startswith(f"{len(records) - 5} of 665,298 rows; 1 ")
    assert "1 missing: ocr_vqa 1" in coverage(report)
    assert "text: 11 records, 40,688 as published" in differences(report)
    assert "text" not in read_report(pools / "llava-images")["sources"]


def test_ids_are_the_same_on_every_mirror(damaged, tmp_path):
    """Another copy has other image bytes under other endings, and one of the images less."""
    records, _, pools = damaged
    source = tmp_path / "mirror"
    for number, entry in enumerate(records[:60]):
        if "image" in entry and number not in (4, 5):
            put(source, entry["image"].replace(".jpg", ".png"), picture(number, "PNG"))
    write_records(source, records)
    other = make(source, tmp_path / "pools")
    whole = Pool.open(pools / "llava")
    assert other.hash != whole.hash
    assert set(whole.ids) - set(other.ids) == {whole.ids[0]}  # of record 4
    assert len(set(other.ids) - set(whole.ids)) == 4  # whose images are damaged in the first
    assert [id_ for id_ in other.ids if id_ in whole.position] == [id_ for id_ in whole.ids if id_ in other.position]


def test_what_is_repaired_is_made_again_and_nothing_else(tmp_path):
    source, pools = tmp_path / "source", tmp_path / "pools"
    records = make_source(source)
    (source / records[0]["image"]).rename(tmp_path / "away.jpg")
    first = make(source, pools)
    before = {name: arrow_of(pools / "llava", name).stat().st_ino for name in ("image-00000", "image-00001")}
    assert len(first) == 59
    (tmp_path / "away.jpg").rename(source / records[0]["image"])
    second = make(source, pools)
    assert len(second) == 60
    after = {name: arrow_of(pools / "llava", name).stat().st_ino for name in before}
    assert after["image-00001"] == before["image-00001"]
    assert after["image-00000"] != before["image-00000"]
    assert second.ids[:50] == Pool.open(pools / "llava-images").ids
    assert first.hash != second.hash


KILLED = """
import sys
from pathlib import Path
from curation_env.ingest.build import ingest
if __name__ == "__main__":
    ingest("llava", Path(sys.argv[1]), Path(sys.argv[2]), workers=2, rows_per_shard=16)
"""


def test_a_kill_loses_no_finished_shard_and_leaves_no_process(tmp_path):
    source, pools = tmp_path / "source", tmp_path / "pools"
    records = make_source(source, 120)
    stuck = source / records[0]["image"]
    stuck.unlink()
    os.mkfifo(stuck)  # a worker waits here for ever
    (tmp_path / "run.py").write_text(KILLED)
    process = subprocess.Popen([sys.executable, tmp_path / "run.py", source, pools])
    work = pools / ".llava.ingest"
    wait_for(lambda: len(list(work.glob("image-*.json"))) >= 3)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_for(lambda: not any(worker.is_running() and worker.status() != "zombie" for worker in workers))
    assert not list(pools.glob("llava*"))
    finished = {path.stem: path.with_suffix(".arrow").stat().st_ino for path in work.glob("*.json")}
    assert "image-00000" not in finished
    stuck.unlink()
    put(source, records[0]["image"], picture(0))
    pool = make(source, pools)
    assert len(pool) == 120
    assert {name: arrow_of(pools / "llava", name).stat().st_ino for name in finished} == finished
    assert not work.exists()


def wait_for(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.02)


def test_a_download_that_was_cut_off_goes_on_when_it_is_whole(tmp_path):
    source, pools = tmp_path / "source", tmp_path / "pools"
    make_source(source)
    path = source / "llava_v1_5_mix665k.json"
    text = path.read_text()
    path.write_text(text[: len(text) // 2])
    with pytest.raises(InvalidSetting, match=r"Download it again; finished work is kept"):
        make(source, pools)
    assert [p.name for p in (pools / ".llava.ingest").glob("*.json")] == ["image-00000.json"]
    path.write_text(text)
    events: list[dict] = []
    assert len(make(source, pools, on_progress=events.append)) == 60
    assert events[-1]["rows"] == 60
    assert events[-1]["done"] == events[-1]["total"]


def test_a_worker_that_is_killed_is_named(tmp_path):
    from curation_env.errors import WorkerDied

    source = tmp_path / "source"
    records = make_source(source, 12)
    stuck = source / records[0]["image"]
    stuck.unlink()
    os.mkfifo(stuck)
    (tmp_path / "kill.py").write_text(
        "import os, sys, time, psutil\n"
        "parent = psutil.Process(int(sys.argv[1]))\n"
        "found = []\n"
        "while not found:\n"
        "    time.sleep(0.05)\n"
        "    found = [p for p in parent.children() if 'spawn_main' in ' '.join(p.cmdline())]\n"
        "time.sleep(0.3)\nfound[0].kill()\n"
    )
    killer = subprocess.Popen([sys.executable, tmp_path / "kill.py", str(os.getpid())])
    with pytest.raises(WorkerDied, match="call prepare again"):
        make(source, tmp_path / "pools")
    killer.wait()


def test_a_folder_that_is_not_the_source_says_what_is(tmp_path):
    with pytest.raises(MissingAssets, match=r"has no llava_v1_5_mix665k.json(.|\n)*vg/VG_100K_2 +Visual Genome"):
        ingest("llava", tmp_path, tmp_path / "pools")
    write_records(tmp_path, [record(0, "coco/train2017/1.jpg", "q", "a")])
    with pytest.raises(MissingAssets, match="no coco/train2017"):
        ingest("llava", tmp_path, tmp_path / "pools")
    (tmp_path / "coco" / "train2017").mkdir(parents=True)
    with pytest.raises(InvalidSetting, match=r"no record of .* gave a row: \{'missing': 1\}"):
        make(tmp_path, tmp_path / "pools")
    assert not list((tmp_path / "pools").glob("llava*"))


def test_vision_flan(tmp_path):
    records = [record(k, f"task{k % 2}_{k}.jpg", f"q{k}", "a", task_name=f"task{k % 2}") for k in range(5)]
    for k in range(5):
        put(tmp_path / "images_191task_1k", f"task{k % 2}_{k}.jpg", picture(k))
    write_records(tmp_path, records, "annotation_191-task_1k.json")
    (path,) = ingest("visionflan", tmp_path, tmp_path / "pools", workers=1)
    pool = Pool.open(path)
    assert (path.name, pool.sources) == ("visionflan", ["task0", "task1", "task0", "task1", "task0"])
    assert pool.row(3)["image"]["path"] == "task1_3.jpg"
    assert coverage(read_report(path)) == "5 of 5 rows"
    with pytest.raises(MissingAssets, match="no counts of supervised tokens"):
        _ = pool.n_tokens
