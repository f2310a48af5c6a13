"""Whole, cut-off and mislabelled images, told without decoding them."""

from __future__ import annotations

import io

import pytest
from ingest_support import picture
from PIL import Image

from curation_env.ingest.images import check_image, find_image

ENDING = {"JPEG": ".jpg", "PNG": ".png", "GIF": ".gif", "WEBP": ".webp"}


@pytest.mark.parametrize("kind", ENDING)
def test_whole_images_pass_and_cut_ones_do_not(kind):
    for side in (9, 64):
        data = picture(1, kind, side)
        assert check_image(data, f"a{ENDING[kind]}") == ("", "")
        for share in (0.5, 0.9, 0.99):
            assert check_image(data[: int(share * len(data)) - 2], "a.jpg").fault.startswith("truncated")
    assert check_image(data + b"\0" * 500, f"a{ENDING[kind]}") == ("", "")  # cameras and sites pad


def test_what_is_cut_can_not_be_decoded_and_what_passes_can():
    """The check is held against Pillow's own decoder."""
    for kind in ENDING:
        data = picture(2, kind, 40)
        for end in range(1, len(data) + 1, max(1, len(data) // 60)):
            passed = not check_image(data[:end], f"a{ENDING[kind]}").fault
            try:
                Image.open(io.BytesIO(data[:end])).load()
                decoded = True
            except (OSError, SyntaxError, ValueError, IndexError):
                decoded = False
            assert decoded or not passed, (kind, end)


def test_a_thumbnail_in_the_header_is_not_the_end_of_its_image():
    stream = io.BytesIO()
    thumbnail = picture(3, side=16)
    Image.open(io.BytesIO(picture(4, side=120))).save(stream, "JPEG", exif=b"Exif\0\0" + thumbnail, progressive=True)
    data = stream.getvalue()
    assert thumbnail[-2:] in data[: data.index(thumbnail) + len(thumbnail)]
    assert check_image(data, "a.jpg") == ("", "")
    assert check_image(data[: len(data) // 2], "a.jpg").fault.startswith("truncated")


def test_a_camera_s_file_of_several_pictures_is_a_jpeg():
    stream = io.BytesIO()
    pictures = [Image.open(io.BytesIO(picture(k, side=30))) for k in range(2)]
    pictures[0].save(stream, "MPO", save_all=True, append_images=pictures[1:])
    assert check_image(stream.getvalue(), "a.jpg") == ("", "")


def test_an_animation_and_a_colour_table_are_read():
    frames = [Image.open(io.BytesIO(picture(k, side=30))).convert("P") for k in range(3)]
    stream = io.BytesIO()
    frames[0].save(stream, "GIF", save_all=True, append_images=frames[1:], comment=b"a comment", duration=50, loop=0)
    data = stream.getvalue()
    assert check_image(data, "a.gif") == ("", "")
    assert check_image(data[:-1], "a.gif") == ("", "")  # the first frame is what is read


@pytest.mark.parametrize(
    ("data", "path", "fault", "note"),
    [
        (b"", "a.jpg", "empty", ""),
        (b"<!DOCTYPE html><html>not found</html>", "a.jpg", "not an image: it begins with b'<!DOCTYPE ht'", ""),
        (picture(1, "GIF"), "a.jpg", "", "mislabelled: a GIF named .jpg"),
        (picture(1, "PNG"), "a.jpg", "", "mislabelled: a PNG named .jpg"),
        (picture(1, "JPEG"), "a.JPEG", "", ""),
        (picture(1, "BMP"), "a.bmp", "", ""),
        (picture(1, "BMP"), "a.jpg", "", "mislabelled: a BMP named .jpg"),
        (picture(1, "JPEG"), "a", "", "mislabelled: a JPEG named without an ending"),
    ],
)
def test_content_tells_what_an_image_is(data, path, fault, note):
    assert check_image(data, path) == (fault, note)


def test_another_ending_is_found(tmp_path):
    (tmp_path / "a.png").write_bytes(picture(1, "PNG"))
    (tmp_path / "b.gif").write_bytes(picture(1, "GIF")[:40])
    assert find_image(tmp_path, "a.jpg") == (picture(1, "PNG"), ("", "other ending: found as .png"))
    assert find_image(tmp_path, "b.jpg")[1].fault.startswith("truncated")
    assert find_image(tmp_path, "c.jpg") == (None, ("missing", ""))
    (tmp_path / "d.jpg").mkdir()
    assert find_image(tmp_path, "d.jpg") == (None, ("unreadable: Is a directory", ""))
