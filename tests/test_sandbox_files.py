"""The parts of the sandbox that run on the host alone: bounded captures, and files that a hostile tree can't misuse."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sandbox_support import as_ordinary_user

from curation_env.sandbox import files
from curation_env.sandbox.link import Capture, Pending


@settings(deadline=None)
@given(st.lists(st.binary(max_size=300), max_size=20), st.integers(min_value=0, max_value=1500))
def test_capture_is_bounded_and_keeps_both_ends(pieces: list[bytes], limit: int) -> None:
    capture = Capture(limit)
    for piece in pieces:
        capture.add(piece)
    whole = b"".join(pieces)
    value = capture.value()
    assert len(value) <= limit
    assert capture.truncated == (len(whole) > limit)
    if not capture.truncated:
        assert value == whole
    elif limit >= 200:
        assert value.startswith(whole[:50])
        assert value.endswith(whole[-50:])
        assert b"bytes left out" in value


def test_capture_of_a_long_stream_stays_small() -> None:
    capture = Capture(1000)
    for i in range(10_000):
        capture.add(b"%07d\n" % i * 100)
    assert len(capture._head) + len(capture._tail) < 1_000_000
    assert capture.value().endswith(b"0009999\n")


def test_pending_drops_what_is_beyond_its_limit() -> None:
    pending = Pending(5)
    pending.add(b"abc")
    pending.add(b"defg")
    assert pending.data == b"abcde"


def test_digest_tells_names_modes_bytes_and_links_apart(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()

    def digest() -> str:
        number = len(os.listdir(tmp_path))
        return files.snapshot(root, tmp_path / str(number), max_bytes=1000, max_files=10, skip=("pool",))

    found = [digest()]
    (root / "a").write_text("x")
    found.append(digest())
    (root / "a").write_text("y")
    found.append(digest())
    (root / "a").chmod(0o755)
    found.append(digest())
    (root / "a").rename(root / "b")
    found.append(digest())
    (root / "l").symlink_to("b")
    found.append(digest())
    (root / "d").mkdir()
    found.append(digest())
    assert len(set(found)) == len(found)
    os.utime(root / "b", (0, 0))
    (root / "pool").mkdir()
    (root / "pool/rows").write_text("not copied")
    os.mkfifo(root / "fifo")
    assert digest() == found[-1]


def test_snapshot_bounds_files_and_bytes(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    with open(root / "sparse", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(OSError, match="larger than 1 MB"):
        files.snapshot(root, tmp_path / "a", max_bytes=1_000_000, max_files=10, skip=())
    (root / "sparse").unlink()
    for i in range(11):
        (root / str(i)).touch()
    with pytest.raises(OSError, match="larger than 10 files"):
        files.snapshot(root, tmp_path / "a", max_bytes=1_000_000, max_files=10, skip=())
    assert os.listdir(tmp_path) == ["root"]


def test_hard_links_are_copied_apart(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "a").write_text("x")
    os.link(root / "a", root / "b")
    files.snapshot(root, tmp_path / "copy", max_bytes=100, max_files=10, skip=())
    assert (tmp_path / "copy/a").stat().st_nlink == 1


def test_a_tree_of_any_depth_is_removed(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    folder = os.open(root, os.O_RDONLY)
    for _ in range(400):
        os.mkdir("d", dir_fd=folder)
        inner = os.open("d", os.O_RDONLY, dir_fd=folder)
        os.close(os.open("f", os.O_CREAT, dir_fd=inner))
        os.close(folder)
        folder = inner
    os.close(folder)
    assert files.usage(root, stop_at=10_000)[2]
    files.remove_deep(root)
    assert files.usage(root, stop_at=10_000)[1:] == (2 * (files.MAX_DEPTH - 1), False)
    (tmp_path / "empty").mkdir()
    files.restore(tmp_path / "empty", root, keep=())
    assert os.listdir(root) == []


def test_mount_points_replace_what_was_planted(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    (root / "pool").symlink_to(outside)
    files.make_mount_point(root, ["pool"], folder=True)
    assert stat.S_ISDIR((root / "pool").lstat().st_mode)
    (root / "deep").symlink_to(outside)
    with pytest.raises(PermissionError):
        files.make_mount_point(root, ["deep", "er"], folder=True)
    assert os.listdir(outside) == []
    os.mkfifo(root / "single")
    files.make_mount_point(root, ["single"], folder=False)
    assert (root / "single").read_bytes() == b""


def test_restore_over_folders_without_permissions() -> None:
    """As a user to whom they matter: root's tests do it as `nobody`."""

    def restore(folder: Path) -> None:
        root, source = folder / "root", folder / "source"
        for path in ("closed/a/b", "kept/pool", "kept/a", "none/a"):
            (root / path).mkdir(parents=True)
        (root / "closed/a/b/file").touch()
        for path, mode in (("closed/a/b", 0o500), ("closed/a", 0o400), ("closed", 0o500), ("kept", 0o500), ("none", 0)):
            (root / path).chmod(mode)
        root.chmod(0o500)
        (source / "kept").mkdir(parents=True)
        (source / "kept/file").write_text("x")
        files.restore(source, root, keep=("kept/pool",))
        assert sorted(str(path.relative_to(root)) for path in root.rglob("*")) == ["kept", "kept/file", "kept/pool"]

    as_ordinary_user(restore)


def test_what_is_too_deep_is_removed_without_permissions() -> None:
    def remove(folder: Path) -> None:
        inner = folder.joinpath(*["d"] * (files.MAX_DEPTH + 2))
        inner.mkdir(parents=True)
        inner.parent.chmod(0o500)
        inner.parent.parent.chmod(0o500)
        files.remove_deep(folder)
        assert not inner.parent.exists()

    as_ordinary_user(remove)


def test_restore_keeps_mount_points(tmp_path: Path) -> None:
    root, source = tmp_path / "root", tmp_path / "source"
    (root / "a/mounted").mkdir(parents=True)
    (root / "a/other").mkdir()
    (source / "a").mkdir(parents=True)
    (source / "a/file").write_text("x")
    files.restore(source, root, keep=("a/mounted",))
    assert sorted(str(path.relative_to(root)) for path in root.rglob("*")) == ["a", "a/file", "a/mounted"]
