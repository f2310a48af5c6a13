"""Files of a sandbox, which lie on the host: the part of the contract that needs no running engine."""

from __future__ import annotations

import errno
from pathlib import Path

from curation_env.sandbox import files
from curation_env.sandbox.base import WORKSPACE, Mount, Sandbox

_MB = 1 << 20


def below_workspace(target: str) -> list[str]:
    """Components of an inside path relative to the workspace; empty for a path elsewhere."""
    parts = files.split(target)
    return parts[1:] if parts[:1] == [WORKSPACE[1:]] else []


class HostedFiles(Sandbox):
    """`read`, `write`, `snapshot` and `restore` over the host folder and the mounts."""

    def read(self, path: str, max_bytes: int) -> bytes:
        root, parts, _ = self._locate(path)
        if not parts and root.is_file():
            root, parts = root.parent, [root.name]
        return files.read_file(root, parts, max_bytes)

    def write(self, path: str, data: bytes) -> None:
        root, parts, read_only = self._locate(path)
        if read_only:
            raise PermissionError(f"{path} is on a read-only mount")
        if len(data) > self.config.limits.file_mb * _MB:
            raise OSError(errno.EFBIG, f"larger than {self.config.limits.file_mb} MB", path)
        self.config.workspace.mkdir(parents=True, exist_ok=True)
        files.write_file(root, parts, data)

    def snapshot(self, dest: Path, max_mb: int) -> str:
        return files.snapshot(
            self.config.workspace,
            dest,
            max_bytes=max_mb * 1_000_000,
            max_files=self.config.limits.files,
            skip=self._mount_points(),
        )

    def restore(self, source: Path) -> None:
        self.config.workspace.mkdir(parents=True, exist_ok=True)
        files.restore(source, self.config.workspace, keep=self._mount_points())

    def _mount_points(self) -> set[str]:
        return {"/".join(parts) for mount in self.config.mounts if (parts := below_workspace(mount.target))}

    def _locate(self, path: str) -> tuple[Path, list[str], bool]:
        """Host folder, components below it, and whether it is read-only, of an inside path."""
        parts = files.split(path if path.startswith("/") else f"{WORKSPACE}/{path}")
        best = Mount(self.config.workspace, "/-", read_only=False)
        depth = 0
        if parts[:1] == [WORKSPACE[1:]]:
            depth = 1
        for mount in self.config.mounts:
            target = files.split(mount.target)
            if parts[: len(target)] == target and len(target) > depth:
                best, depth = mount, len(target)
        if depth == 0:
            raise PermissionError(f"{path} is neither under {WORKSPACE} nor under a mount")
        return best.source, parts[depth:], best.read_only
