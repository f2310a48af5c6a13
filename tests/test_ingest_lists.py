"""Published lists on a pool: by the full record, where ids and places would send rows elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ingest_support import make_source, record, words, write_records

from curation_env.errors import InvalidSetting, MissingAssets
from curation_env.ingest.build import ingest
from curation_env.ingest.lists import Match, match
from curation_env.pool import Pool
from curation_env.task import Task

TASK = {**Task.load("nano").model_dump(), "pool": {"kind": "llava"}}


@pytest.fixture(scope="module")
def prepared_pool(tmp_path_factory):
    """(records, data root): ten records an id, as LLaVA's file has ids that stand for several; two images missing."""
    folder = tmp_path_factory.mktemp("lists")
    records = make_source(folder / "source")
    records = [{**entry, "id": f"{number // 10:012d}"} for number, entry in enumerate(records)]
    records.append(records[6])
    (folder / "source" / records[0]["image"]).unlink()
    write_records(folder / "source", records)
    ingest("llava", folder / "source", folder / "root" / "pools", workers=1)
    return records, folder / "root"


def matched(root: Path, folder: Path, listed: list) -> Match:
    path = folder / "list.json"
    path.write_text(json.dumps(listed))
    return match(Task.model_validate(TASK), root, path)


def rows_of(root: Path, found: Match) -> list[dict]:
    pool = Pool.open(root / "pools" / "llava")
    return [pool.row(pool.position[id_]) for id_ in found.ids]


def test_ids_that_stand_for_several_records_send_no_row_elsewhere(prepared_pool, tmp_path):
    """The fault of the ICONS lists: looked up by `id`, all but one in ten rows are others than were meant."""
    records, root = prepared_pool
    listed = [records[k] for k in (19, 3, 25, 41, 55)]
    found = matched(root, tmp_path, listed)
    assert found.lost == []
    assert [row["image"] and row["image"]["path"] for row in rows_of(root, found)] == [r.get("image") for r in listed]
    by_id = {entry["id"]: entry for entry in records}
    assert sum(by_id[entry["id"]] == entry for entry in listed) == 1


def test_places_that_are_off_by_one_do_not_matter(prepared_pool, tmp_path):
    """The fault of the ARDS list: its places count from one, so that as numbers from zero none names its row."""
    records, root = prepared_pool
    listed = [{**records[k], "index": k + 1} for k in range(1, 59)]
    found = matched(root, tmp_path, listed)
    texts = [row["conversation"][0]["user"] for row in rows_of(root, found)]
    assert texts == [words(k)[0] for k in range(1, 59)]
    assert not any(records[entry["index"]]["conversations"] == entry["conversations"] for entry in listed)


def test_the_order_of_keys_and_the_place_of_the_mark_do_not_matter(prepared_pool, tmp_path):
    records, root = prepared_pool
    moved = json.loads(json.dumps(records[1]))
    moved["conversations"][0]["value"] = f"{words(1)[0]}\n<image>"
    assert matched(root, tmp_path, [moved]).ids == matched(root, tmp_path, [records[1]]).ids


def test_what_does_not_match_says_why(prepared_pool, tmp_path):
    records, root = prepared_pool
    listed = [
        records[0],
        record(0, records[1]["image"], "quite another question", "a"),
        record(0, "coco/train2017/999.jpg", "q", "a"),
        record(0, None, "q", "a"),
        *[records[6]] * 3,
        {"id": "1", "conversations": [{"from": "gpt", "value": "alone"}]},
    ]
    found = matched(root, tmp_path, listed)
    assert [entry["reason"] for entry in found.lost] == [
        "left out of the pool: missing",
        "another conversation about an image of the pool",
        "an image of no row",
        "a text of no row",
        "a copy more than the pool has",
        "malformed: nothing is answered in it",
    ]
    assert [entry["record"] for entry in found.lost] == [0, 1, 2, 3, 6, 7]
    assert found.ids[1] == f"{found.ids[0]}-1"
    report = found.write(tmp_path / "ids.txt")
    assert (tmp_path / "ids.txt").read_text().split() == found.ids
    assert json.loads(report.read_text())["lost"]["a copy more than the pool has"] == 1
    assert found.lines()[0] == "2 of 8 records are rows of the pool"
    assert not found.audited
    assert "not prepared" in found.lines()[-1]


@pytest.mark.parametrize("listed", [[3, 17], ["000000000003"], [{"id": "000000000003", "image": "a.jpg"}]])
def test_bare_ids_and_places_are_refused(prepared_pool, tmp_path, listed):
    with pytest.raises(InvalidSetting, match="ids are shared by several records and places depend on how"):
        matched(prepared_pool[1], tmp_path, listed)


def test_a_pool_is_needed(tmp_path):
    with pytest.raises(MissingAssets, match="curation-env prepare"):
        matched(tmp_path, tmp_path, [record(0, None, "q", "a")])
    with pytest.raises(InvalidSetting, match="generated pool"):
        match(Task.load("nano"), tmp_path, tmp_path / "list.json")
