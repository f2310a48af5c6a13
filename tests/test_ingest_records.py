"""What becomes of a public record, and how a large file of them is read."""

from __future__ import annotations

import json

import pytest
from ingest_support import record

from curation_env.errors import InvalidSetting
from curation_env.ingest.records import JsonArray, parse
from curation_env.pool import row_id


def turns(*texts):
    return [{"user": user, "assistant": answer} for user, answer in zip(texts[::2], texts[1::2], strict=True)]


def test_a_record_becomes_source_image_and_turns():
    raw = record(7, "coco/train2017/000000000007.jpg", "What is it?", "A cat.", "Sure?", "Yes.")
    found = parse(raw, 3, "llava")
    assert (found.number, found.name, found.source) == (3, "000000000007", "coco")
    assert found.image == "coco/train2017/000000000007.jpg"
    assert found.conversation == turns("What is it?", "A cat.", "Sure?", "Yes.")
    assert found.base_id == row_id("coco", found.image, found.conversation)
    assert (found.notes, found.fault) == ((), "")
    assert parse(record(7, None, " Hello \n", "Hi"), 0, "llava").source == "text"
    assert parse(record(7, None, " Hello \n", "Hi"), 0, "llava").conversation == turns(" Hello \n", "Hi")


@pytest.mark.parametrize("text", ["<image>\nWhat is it?", "What is it?\n<image>", "What is it?<image>", "What is it?"])
def test_the_mark_goes_wherever_it_stands(text):
    raw = {"image": "gqa/images/1.jpg", "conversations": record(0, None, text, "A cat.")["conversations"]}
    assert parse(raw, 0, "llava").conversation == turns("What is it?", "A cat.")


@pytest.mark.parametrize("path", ["./coco/train2017/1.jpg", "coco//train2017/1.jpg", "coco/train2017/1.jpg"])
def test_one_image_has_one_path(path):
    assert parse(record(0, path, "q", "a"), 0, "llava").image == "coco/train2017/1.jpg"


def test_a_task_is_the_source_of_vision_flan():
    assert parse(record(0, "a+1.jpg", "q", "a", task_name="a+caption"), 0, "visionflan").source == "a+caption"
    assert parse(record(0, "a+1.jpg", "q", "a"), 0, "visionflan").source == "visionflan"


def test_what_is_left_out_is_noted():
    opened = {"conversations": [{"from": "gpt", "value": "Hi"}, *record(0, None, "q", "a", "more?")["conversations"]]}
    found = parse(opened, 0, "llava")
    assert found.conversation == turns("q", "a")
    assert found.notes == ("opening turn of the model left out", "last turn without an answer left out")
    marked = parse(record(0, None, "Write <image> in HTML", "no"), 0, "llava")
    assert marked.conversation == turns("Write  in HTML", "no")
    assert marked.notes == ("mark of an image without an image",)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (17, "not int"),
        ({"id": "1"}, "no conversations"),
        ({"conversations": [{"from": "human"}]}, "no text"),
        ({"conversations": [{"from": "system", "value": "x"}]}, "neither human nor gpt"),
        ({"conversations": record(0, None, "a")["conversations"] * 2}, "take turns"),
        ({"image": ["a.jpg", "b.jpg"], "conversations": record(0, None, "q", "a")["conversations"]}, "is a list"),
        (record(0, "../../etc/passwd", "q", "a"), "outside"),
        (record(0, "/etc/passwd", "q", "a"), "outside"),
        (record(0, None, "half \ud83d", "a"), "half a character"),
        ({"conversations": [{"from": "gpt", "value": "x"}]}, "take turns|no conversations|nothing is answered"),
    ],
)
def test_what_can_not_be_a_row_says_why(raw, words):
    import re

    found = parse(raw, 0, "llava")
    assert re.search(words, found.fault)
    assert (found.conversation, found.base_id) == ([], "")


def test_a_large_file_is_read_value_by_value(tmp_path):
    path = tmp_path / "records.json"
    path.write_text(json.dumps([record(k, None, "q" * 3000, "é") for k in range(200)]))
    array = JsonArray(path)
    reading = iter(array)
    assert next(reading)["conversations"][1]["value"] == "é"
    assert array.done < array.size / 2
    assert len(list(reading)) == 199
    assert array.done == array.size == path.stat().st_size
    import hashlib

    assert array.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(("cut", "words"), [(0.6, "Download it again"), (0.0, "no JSON array")])
def test_a_file_that_is_cut_off_says_so(tmp_path, cut, words):
    path = tmp_path / "records.json"
    text = json.dumps([record(k, None, "q", "a") for k in range(200)])
    path.write_text(text[: int(cut * len(text))])
    with pytest.raises(InvalidSetting, match=words):
        list(JsonArray(path))
