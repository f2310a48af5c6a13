"""Row ids, the pool's folder, and what opens it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curation_env.errors import MissingAssets
from curation_env.pool import Pool, image_digest, row_id, write_pool

TURNS = [{"user": "what is it?", "assistant": "a cat"}]


def rows() -> list[dict]:
    picture = {"bytes": b"png bytes", "path": "coco/1.png"}
    return [
        {"source": "coco", "image": picture, "conversation": TURNS, "n_tokens": 3},
        {"source": "text", "image": None, "conversation": TURNS, "n_tokens": 3},
        {"source": "text", "image": None, "conversation": TURNS, "n_tokens": 3},
        {"source": "text", "image": None, "conversation": [*TURNS, {"user": "é\n?", "assistant": "ok"}], "n_tokens": 5},
    ]


def test_rows_come_back_as_written(tmp_path):
    digest = write_pool(tmp_path / "pool", rows(), key="tiny", meta={"generator": 7})
    pool = Pool.open(tmp_path / "pool")
    assert (len(pool), pool.key, pool.hash, pool.meta["generator"]) == (4, "tiny", digest, 7)
    assert [{k: v for k, v in pool.row(k).items() if k != "id"} for k in range(4)] == rows()
    assert pool.sources == ["coco", "text", "text", "text"]
    assert pool.n_tokens.tolist() == [3, 3, 3, 5]
    assert pool.image_digests[0].tobytes() == image_digest(b"png bytes")
    assert not pool.image_digests[1:].any()


def test_identical_rows_are_numbered_in_source_order(tmp_path):
    write_pool(tmp_path / "pool", rows(), key="tiny")
    ids = Pool.open(tmp_path / "pool").ids
    assert ids[2] == f"{ids[1]}-1"
    assert len(set(ids)) == 4
    assert Pool.open(tmp_path / "pool").position[ids[2]] == 2


def test_the_id_says_nothing_of_image_bytes_but_of_all_else():
    base = row_id("coco", "coco/1.png", TURNS)
    assert len(base) == 32
    others = [
        row_id("gqa", "coco/1.png", TURNS),
        row_id("coco", "coco/2.png", TURNS),
        row_id("coco", None, TURNS),
        row_id("coco", "coco/1.png", TURNS * 2),
        row_id("coco", "coco/1.png", [{"user": "what is it?", "assistant": "a dog"}]),
    ]
    assert len({base, *others}) == 6
    assert row_id("coco", "coco/1.png", [dict(reversed(TURNS[0].items()))]) == base


@given(st.text(), st.text(), st.text(), st.text())
def test_text_cannot_move_between_fields_without_changing_the_id(user, assistant, other_user, other_assistant):
    one = row_id("s", None, [{"user": user, "assistant": assistant}])
    two = row_id("s", None, [{"user": other_user, "assistant": other_assistant}])
    assert (one == two) == ((user, assistant) == (other_user, other_assistant))


def test_the_hash_moves_with_images_and_order(tmp_path):
    plain = write_pool(tmp_path / "a", rows(), key="a")
    other = rows()
    other[0]["image"] = {"bytes": b"other bytes", "path": "coco/1.png"}
    assert write_pool(tmp_path / "b", other, key="a") != plain
    assert write_pool(tmp_path / "c", rows()[::-1], key="a") != plain
    assert write_pool(tmp_path / "d", rows(), key="other name") == plain


def test_an_interrupted_pool_is_no_pool(tmp_path):
    def broken():
        yield rows()[0]
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError):
        write_pool(tmp_path / "pool", broken(), key="tiny")
    with pytest.raises(MissingAssets, match="curation-env prepare"):
        Pool.open(tmp_path / "pool")


def test_more_rows_than_one_batch(tmp_path):
    many = [{**rows()[1], "conversation": [{"user": str(k), "assistant": "a"}]} for k in range(2500)]
    write_pool(tmp_path / "pool", iter(many), key="many")
    pool = Pool.open(tmp_path / "pool")
    assert len(pool) == 2500
    assert pool.row(2400)["conversation"][0]["user"] == "2400"
    assert isinstance(pool.n_tokens, np.ndarray)
