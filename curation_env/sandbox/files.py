"""Files of a sandbox, touched from the host's side without ever following what the agent may have planted there.

Every path is walked one component at a time with descriptors and `O_NOFOLLOW`, so a symbolic link, or a folder that is
swapped for one while we look, is refused and not followed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from pathlib import Path

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_PIECE = 1 << 20
_DELETED_MAPPING = re.compile(
    rb"^([0-9a-f]+)-([0-9a-f]+) \S+ ([0-9a-f]+) ([0-9a-f]+):([0-9a-f]+) (\d+) [^\n]* \(deleted\)$", re.MULTILINE
)
MAX_DEPTH = 100


def split(path: str) -> list[str]:
    """The components of an absolute path; `..` is refused."""
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if ".." in parts or "\0" in path:
        raise PermissionError(errno.EACCES, "a path inside a sandbox may not contain '..'", path)
    return parts


@contextlib.contextmanager
def open_folder(root: Path, parts: list[str], *, make: bool = False) -> Iterator[int]:
    """A descriptor of `root/parts...`. Raises FileNotFoundError, NotADirectoryError, PermissionError (a link)."""
    fd = os.open(root, _FOLDER & ~os.O_NOFOLLOW)
    try:
        for i, part in enumerate(parts):
            if make:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(part, 0o755, dir_fd=fd)
            try:
                inner = os.open(part, _FOLDER, dir_fd=fd)
            except NotADirectoryError:
                if stat.S_ISLNK(os.lstat(part, dir_fd=fd).st_mode):
                    shown = "/".join(parts[: i + 1])
                    raise PermissionError(errno.EACCES, "a symbolic link is not followed", shown) from None
                raise
            os.close(fd)
            fd = inner
        yield fd
    finally:
        os.close(fd)


def read_file(root: Path, parts: list[str], max_bytes: int) -> bytes:
    """A regular file of at most `max_bytes`; errors as in `Sandbox.read`."""
    if not parts:
        raise IsADirectoryError(errno.EISDIR, "a folder", str(root))
    shown = "/".join(parts)
    with open_folder(root, parts[:-1]) as folder:
        try:
            fd = os.open(parts[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise PermissionError(errno.EACCES, "a symbolic link is not followed", shown) from None
            if error.errno == errno.ENXIO:
                raise PermissionError(errno.EACCES, "not a regular file", shown) from None
            raise
        try:
            info = os.fstat(fd)
            if stat.S_ISDIR(info.st_mode):
                raise IsADirectoryError(errno.EISDIR, "a folder", shown)
            if not stat.S_ISREG(info.st_mode):
                raise PermissionError(errno.EACCES, "not a regular file", shown)
            data = bytearray()
            while len(data) <= max_bytes:
                piece = os.read(fd, min(_PIECE, max_bytes + 1 - len(data)))
                if not piece:
                    return bytes(data)
                data += piece
            raise OSError(errno.EFBIG, f"larger than {max_bytes} bytes", shown)
        finally:
            os.close(fd)


def write_file(root: Path, parts: list[str], data: bytes) -> None:
    """Write beside it and rename: a link or file that is there is replaced, never written through."""
    if not parts:
        raise IsADirectoryError(errno.EISDIR, "a folder", str(root))
    with open_folder(root, parts[:-1], make=True) as folder:
        temporary = f".{secrets.token_hex(8)}.tmp"
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644, dir_fd=folder)
        try:
            with open(fd, "wb") as file:
                file.write(data)
            os.rename(temporary, parts[-1], src_dir_fd=folder, dst_dir_fd=folder)
        except OSError as error:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=folder)
            if error.errno in (errno.EISDIR, errno.ENOTEMPTY, errno.EEXIST):
                raise IsADirectoryError(errno.EISDIR, "a folder is in the place of the file", "/".join(parts)) from None
            raise


def make_mount_point(root: Path, parts: list[str], *, folder: bool) -> None:
    """A real folder (or empty file) at `root/parts` for an engine to mount on; what else is there is removed."""
    with open_folder(root, parts[:-1], make=True) as parent:
        name = parts[-1]
        try:
            mode = os.lstat(name, dir_fd=parent).st_mode
        except FileNotFoundError:
            mode = 0
        if mode and (stat.S_ISDIR(mode) if folder else stat.S_ISREG(mode)):
            return
        if mode:
            _remove(parent, parent, name)
        if folder:
            os.mkdir(name, 0o755, dir_fd=parent)
        else:
            os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644, dir_fd=parent))


def snapshot(root: Path, dest: Path, *, max_bytes: int, max_files: int, skip: Collection[str]) -> str:
    """Copy the tree at `root` without the relative paths in `skip`; errors and digest as in `Sandbox.snapshot`."""
    dest.mkdir(parents=True)
    digest = hashlib.blake2b(digest_size=16)
    left = [max_bytes, max_files]

    def spend(name: str, size: int) -> None:
        left[0] -= size
        left[1] -= 1
        if min(left) < 0:
            what = f"{max_bytes / 1e6:g} MB" if left[0] < 0 else f"{max_files} files"
            raise OSError(errno.EFBIG, f"the workspace is larger than {what}", name)

    def copy(folder: int, target: Path, prefix: str, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise OSError(errno.EFBIG, f"folders are nested more than {MAX_DEPTH} deep", prefix)
        for name in sorted(os.listdir(folder)):
            path = prefix + name
            if path in skip:
                continue
            info = os.lstat(name, dir_fd=folder)
            mode = stat.S_IMODE(info.st_mode) & 0o777
            if stat.S_ISLNK(info.st_mode):
                spend(path, 0)
                link = os.readlink(name, dir_fd=folder)
                os.symlink(link, target / name)
                _note(digest, "link", path, 0, os.fsencode(link))
            elif stat.S_ISDIR(info.st_mode):
                spend(path, 0)
                _note(digest, "folder", path, mode, b"")
                (target / name).mkdir()
                inner = _open_own(folder, name, _FOLDER, 0o700)
                try:
                    copy(inner, target / name, path + "/", depth + 1)
                finally:
                    os.close(inner)
                (target / name).chmod(mode | 0o700)
            elif stat.S_ISREG(info.st_mode):
                spend(path, info.st_size)
                file_digest = _copy_file(folder, name, target / name, info.st_size, partial(spend, path))
                (target / name).chmod(mode | 0o600)
                _note(digest, "file", path, mode, file_digest)

    try:
        with open_folder(root, []) as top:
            copy(top, dest, "", 1)
    except BaseException:
        shutil.rmtree(dest, ignore_errors=True)
        raise
    return digest.hexdigest()


def restore(source: Path, root: Path, *, keep: Collection[str]) -> None:
    """Make `root` equal to the tree `source`; the relative paths in `keep` (mount points) stay."""
    keep_own(root)
    with open_folder(root, []) as top:
        _clear(top, top, "", keep)
    for folder, folders, names in os.walk(source):
        here = root / os.path.relpath(folder, source)
        for name in folders:
            if os.path.islink(os.path.join(folder, name)):
                names.append(name)
            else:
                (here / name).mkdir(exist_ok=True)
                shutil.copymode(os.path.join(folder, name), here / name)
        for name in names:
            shutil.copy2(os.path.join(folder, name), here / name, follow_symlinks=False)


def usage(root: Path, *, stop_at: int) -> tuple[int, int, bool]:
    """Bytes of disk blocks and number of entries below `root`, and whether folders are nested deeper than `MAX_DEPTH`
    (those are not looked into). Counting ends at `stop_at` entries."""
    size = count = 0
    deep = False

    def add(folder: int, depth: int) -> None:
        nonlocal size, count, deep
        inner = []
        with os.scandir(folder) as entries:
            for entry in entries:
                count += 1
                with contextlib.suppress(OSError):
                    size += entry.stat(follow_symlinks=False).st_blocks * 512
                    if entry.is_dir(follow_symlinks=False):
                        inner.append(entry.name)
        if inner and depth == MAX_DEPTH:
            deep = True
            return
        for name in inner:
            if count > stop_at:
                return
            with contextlib.suppress(OSError):  # gone, or swapped for something else, meanwhile
                fd = _open_own(folder, name, _FOLDER, 0o700)
                try:
                    add(fd, depth + 1)
                finally:
                    os.close(fd)

    with contextlib.suppress(OSError), open_folder(root, []) as top:
        add(top, 1)
    return size, count, deep


def keep_own(root: Path) -> None:
    """Give the workspace itself back the permission bits that a command may have taken away."""
    with contextlib.suppress(OSError):
        mode = stat.S_IMODE(root.stat().st_mode)
        if mode & 0o700 != 0o700:
            root.chmod(mode | 0o700)


def deleted_bytes(pids: Iterable[int], root: Path) -> int:
    """Blocks of deleted files on the file system of `root` that `pids` keep, by a descriptor or by a mapping.

    What is mapped can be looked at as root only; for other users its mapped part counts.
    """
    found: dict[int, int] = {}
    with contextlib.suppress(OSError):
        device = os.stat(root).st_dev
        for pid in pids:
            with contextlib.suppress(OSError):
                mapped = False
                # Not only the first thread: each can have descriptors of its own, and the first can have ended.
                for task in os.listdir(f"/proc/{pid}/task"):
                    with contextlib.suppress(OSError):
                        _add_open(found, f"/proc/{pid}/task/{task}/fd", device)
                        mapped = mapped or _add_mapped(found, pid, task, device)
    return sum(found.values())


def _add_open(found: dict[int, int], folder: str, device: int) -> None:
    for name in os.listdir(folder):
        with contextlib.suppress(OSError):
            info = os.stat(f"{folder}/{name}")
            if info.st_nlink == 0 and info.st_dev == device:
                found[info.st_ino] = info.st_blocks * 512


def _add_mapped(found: dict[int, int], pid: int, task: str, device: int) -> bool:
    """False for a thread that has ended, whose memory is seen through the others."""
    with open(f"/proc/{pid}/task/{task}/maps", "rb") as file:
        maps = file.read()
    for start, end, offset, major, minor, inode in _DELETED_MAPPING.findall(maps):
        low, high = int(start, 16), int(end, 16)
        try:
            info = os.stat(f"/proc/{pid}/map_files/{low:x}-{high:x}")
        except OSError:
            if os.makedev(int(major, 16), int(minor, 16)) == device:
                number = int(inode)
                found[number] = max(found.get(number, 0), int(offset, 16) + high - low)
        else:
            if info.st_nlink == 0 and info.st_dev == device:
                found[info.st_ino] = info.st_blocks * 512
    return bool(maps)


def written_bytes(pids: Iterable[int]) -> int:
    """What `pids` and their dead children have written to disks so far, as far as it is told.

    Those that were waited for are in their parents' numbers; the others no control group lists.
    """
    found = set(pids)
    for pid in list(found):
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{pid}/task"):
                found.update(map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split()))
    total = 0
    for pid in found:
        with contextlib.suppress(OSError, ValueError), open(f"/proc/{pid}/io", "rb") as file:
            total += int(file.read().partition(b"\nwrite_bytes: ")[2].partition(b"\n")[0])
    return total


def free_bytes(root: Path) -> int:
    """What is free on the file system of `root`; 0 where that isn't told."""
    try:
        told = os.statvfs(root)
    except OSError:
        return 0
    return told.f_bfree * told.f_frsize


def remove_deep(root: Path) -> None:
    """Remove what is nested deeper than `MAX_DEPTH`. Nothing may be running inside."""

    def cut(folder: int, depth: int) -> None:
        if depth == MAX_DEPTH:
            _make_own(folder)
        for name in os.listdir(folder):
            if not stat.S_ISDIR(os.lstat(name, dir_fd=folder).st_mode):
                continue
            if depth == MAX_DEPTH:
                _remove(top, folder, name)
                continue
            with contextlib.suppress(OSError):
                fd = _open_own(folder, name, _FOLDER, 0o700)
                try:
                    cut(fd, depth + 1)
                finally:
                    os.close(fd)

    with open_folder(root, []) as top:
        cut(top, 1)


def _note(digest: hashlib.blake2b, kind: str, path: str, mode: int, content: bytes) -> None:
    for part in (kind.encode(), os.fsencode(path), b"%o" % mode, content):
        digest.update(len(part).to_bytes(8, "big") + part)


def _open_own(folder: int, name: str, flags: int, bits: int) -> int:
    """Open an entry that belongs to us even where the agent took its own permission bits away."""
    try:
        return os.open(name, flags, dir_fd=folder)
    except PermissionError:
        handle = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
        try:
            os.chmod(f"/proc/self/fd/{handle}", stat.S_IMODE(os.fstat(handle).st_mode) | bits)
        finally:
            os.close(handle)
        return os.open(name, flags, dir_fd=folder)


def _make_own(folder: int) -> None:
    """Let us change what is in a folder that belongs to us."""
    mode = stat.S_IMODE(os.fstat(folder).st_mode)
    if mode & 0o700 != 0o700:
        os.fchmod(folder, mode | 0o700)


def _make_own_entry(folder: int, name: str) -> None:
    """The same for a folder by name, which moving it takes too: its `..` changes."""
    inner = _open_own(folder, name, _FOLDER, 0o700)
    try:
        _make_own(inner)
    finally:
        os.close(inner)


def _copy_file(folder: int, name: str, target: Path, size: int, spend_more: Callable[[int], None]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    fd = _open_own(folder, name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o400)
    with open(fd, "rb", buffering=0) as source, open(target, "xb") as out:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return b""
        copied = 0
        while piece := source.read(_PIECE):
            copied += len(piece)
            if copied > size:  # it grows while we copy
                spend_more(copied - size)
                size = copied
            digest.update(piece)
            out.write(piece)
    return digest.digest()


def _remove(top: int, folder: int, name: str) -> None:
    """Delete an entry, whatever it is and however deep: every folder below is first moved up to one beside `top`'s
    entries, so that no path grows long."""
    if not stat.S_ISDIR(os.lstat(name, dir_fd=folder).st_mode):
        os.unlink(name, dir_fd=folder)
        return
    heap = f".{secrets.token_hex(8)}.removed"
    os.mkdir(heap, 0o700, dir_fd=top)
    beside = os.open(heap, _FOLDER, dir_fd=top)
    try:
        _make_own_entry(folder, name)
        os.rename(name, "0", src_dir_fd=folder, dst_dir_fd=beside)
        todo = [0]
        number = 0
        while todo:
            item = str(todo.pop())
            inner = _open_own(beside, item, _FOLDER, 0o700)
            try:
                for child in os.listdir(inner):
                    if stat.S_ISDIR(os.lstat(child, dir_fd=inner).st_mode):
                        number += 1
                        _make_own_entry(inner, child)
                        os.rename(child, str(number), src_dir_fd=inner, dst_dir_fd=beside)
                        todo.append(number)
                    else:
                        os.unlink(child, dir_fd=inner)
            finally:
                os.close(inner)
            os.rmdir(item, dir_fd=beside)
    finally:
        os.close(beside)
    os.rmdir(heap, dir_fd=top)


def _clear(top: int, folder: int, prefix: str, keep: Collection[str]) -> None:
    for name in os.listdir(folder):
        path = prefix + name
        if path in keep:
            continue
        if any(kept.startswith(path + "/") for kept in keep) and stat.S_ISDIR(os.lstat(name, dir_fd=folder).st_mode):
            inner = _open_own(folder, name, _FOLDER, 0o700)
            try:
                _make_own(inner)
                _clear(top, inner, path + "/", keep)
            finally:
                os.close(inner)
        else:
            _remove(top, folder, name)
