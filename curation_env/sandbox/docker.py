"""The Docker engine: one container per sandbox, no network, read-only root, no capability, hard limits.

The container's first process is the agent, which connects to a socket in a folder that is mounted for it: commands
don't pass through the Docker daemon, so they are quick, and go on when the daemon restarts. When the harness dies the
connection closes, the agent ends and Docker removes the container; `reap_orphans` removes what is left all the same.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curation_env.errors import SandboxError
from curation_env.sandbox import agent, cgroup, seccomp
from curation_env.sandbox.base import WORKSPACE, Mount, SandboxConfig, SandboxUnavailable
from curation_env.sandbox.image import PYTHON_LABEL, connect, find_image
from curation_env.sandbox.interpreter import harness_interpreter
from curation_env.sandbox.link import AgentLink
from curation_env.sandbox.rootfs import AGENT, Contents, StateFolder, contents, make_mount_points, write_etc
from curation_env.sandbox.supervised import SupervisedSandbox

if TYPE_CHECKING:
    import docker
    from docker.models.containers import Container
    from docker.types import CancellableStream

OWNER_LABEL = "curation-env.owner"
RUN_LABEL = "curation-env.run"
STATE_LABEL = "curation-env.state"
_LINK = "/run/link"
_MB = 1 << 20
_START_SECONDS = 60.0


def docker_problem() -> str:
    """Why this engine can't be used now, with what to do; "" when it can."""
    try:
        client = connect()
        try:
            find_image(client)
        finally:
            client.close()
    except SandboxUnavailable as error:
        return str(error)
    return ""


def reap_orphans() -> int:
    """Remove containers, folders and control groups of this user whose owner is dead. Returns how many."""
    client = connect()
    try:
        return _reap(client)
    finally:
        client.close()


def _reap(client: docker.DockerClient) -> int:
    import docker

    count = StateFolder.reap()
    for container in client.containers.list(all=True, filters={"label": f"{OWNER_LABEL}={os.getuid()}"}, sparse=True):
        if not StateFolder.owned(Path(container.attrs["Labels"].get(STATE_LABEL, "/absent"))):
            with contextlib.suppress(docker.errors.APIError):  # it may be on its way out by itself
                container.remove(force=True)
                count += 1
    return count


def _bind(listener: socket.socket, folder: Path, name: str) -> None:
    """Bind below `folder`, however long its path is: the name of a socket has 107 bytes at most."""
    fd = os.open(folder, os.O_PATH | os.O_CLOEXEC)
    try:
        listener.bind(f"/proc/self/fd/{fd}/{name}")
    finally:
        os.close(fd)


class DockerSandbox(SupervisedSandbox):
    """See `Sandbox` for the contract. `image` is a tag or id; by default the newest of the present recipe."""

    kind = "docker"

    def __init__(self, config: SandboxConfig, image: str = "") -> None:
        super().__init__(config)
        self._image = image
        self._client: docker.DockerClient | None = None
        self._container: Container | None = None
        self._state: StateFolder | None = None
        self._counters: cgroup.Cgroup | None = None

    def _launch(self) -> tuple[AgentLink, dict[str, str]]:
        import docker
        import requests

        self._client = connect()
        image = self._client.images.get(self._image) if self._image else find_image(self._client)
        _reap(self._client)
        self._state = StateFolder()
        if image.labels.get(PYTHON_LABEL) == "image":
            interpreter, python = None, "python3"
        else:
            interpreter = harness_interpreter(host_usr=False)
            python = str(interpreter.executable)
        inside = contents(self.config, self._state.path, interpreter, python)
        make_mount_points(self.config.workspace, inside.mounts)
        uid, gid = os.getuid(), os.getgid()
        write_etc(self._state.path / "etc", uid, gid)
        link = self._state.path / "link"
        link.mkdir()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with listener:
            _bind(listener, link, "socket")
            listener.listen(1)
            output: CancellableStream | None = None
            try:
                self._container = self._client.containers.create(
                    image.id,
                    [python, "-I", "-S", AGENT, f"{_LINK}/socket"],
                    labels={
                        OWNER_LABEL: str(uid),
                        RUN_LABEL: self.config.label,
                        STATE_LABEL: str(self._state.path),
                    },
                    mounts=self._mounts(inside, link),
                    user=f"{uid}:{gid}",
                    **self._isolation(),
                    **self._limits(),
                )
                output = self._container.attach(stdout=True, stderr=True, stream=True)
                self._container.start()
                sock = self._accept(listener)
            except (docker.errors.DockerException, requests.exceptions.RequestException, TimeoutError) as error:
                words = self._last_words(output) if isinstance(error, TimeoutError) else str(error)
                raise SandboxError(f"the container did not start: {words[-500:]}", details=words) from error
            finally:
                if output is not None:
                    output.close()
        self._container.reload()
        self._counters = cgroup.of_process(self._container.attrs["State"]["Pid"])
        return AgentLink(sock, start_seconds=20.0), inside.env

    def _accept(self, listener: socket.socket) -> socket.socket:
        """The agent's connection; raises TimeoutError when the container ends (or sleeps) instead."""
        assert self._container is not None
        listener.settimeout(0.5)
        end = time.monotonic() + _START_SECONDS
        while True:
            try:
                return listener.accept()[0]
            except TimeoutError:
                if time.monotonic() > end or not self._exists_running():
                    raise

    def _exists_running(self) -> bool:
        import docker

        assert self._container is not None
        try:
            self._container.reload()
        except docker.errors.NotFound:
            return False
        return self._container.status in ("created", "running")

    def _last_words(self, output: CancellableStream | None) -> str:
        if output is None or self._exists_running():
            return "it did not connect in time"
        return b"".join(output).decode(errors="replace").strip() or "it ended at once"

    def _mounts(self, inside: Contents, link: Path) -> list[Any]:
        from docker.types import Mount as DockerMount

        assert self._state is not None
        empty = self._state.path / "empty"
        empty.touch()
        etc = self._state.path / "etc"
        shown = [
            Mount(self.config.workspace.absolute(), "/-", read_only=False),
            Mount(link, _LINK),
            *(Mount(etc / name, f"/etc/{name}") for name in ("passwd", "group", "nsswitch.conf")),
            *inside.python,
            *(Mount(empty, str(path)) for path in inside.masked if not path.is_dir()),
            *inside.mounts,
        ]
        found = [
            DockerMount(
                WORKSPACE if mount.target == "/-" else mount.target,
                str(mount.source.absolute()),
                type="bind",
                read_only=mount.read_only,
            )
            for mount in shown
        ]
        for path in inside.masked:
            if path.is_dir():
                found.append(DockerMount(str(path), None, type="tmpfs", tmpfs_size=4096, read_only=True))
        return found

    def _isolation(self) -> dict[str, Any]:
        """No network, no capability, nothing to write but the workspace and memory of limited size."""
        shared = self.config.limits.tmp_mb * _MB
        return {
            "entrypoint": [],
            "environment": {agent.FILTER: seccomp.program().hex()},
            "working_dir": WORKSPACE,
            "hostname": "sandbox",
            "network_mode": "none",
            "ipc_mode": "private",
            "read_only": True,
            "tmpfs": {"/tmp": f"rw,exec,nosuid,nodev,mode=1777,size={shared}"},
            "shm_size": shared,
            "cap_drop": ["ALL"],
            "security_opt": ["no-new-privileges"],
            "auto_remove": True,
            "log_config": {"type": "none"},
        }

    def _limits(self) -> dict[str, Any]:
        from docker.types import DeviceRequest

        limits = self.config.limits
        found: dict[str, Any] = {
            "mem_limit": limits.memory_mb * _MB,
            "memswap_limit": limits.memory_mb * _MB,
            "nano_cpus": int(min(limits.cpus, os.cpu_count() or 1) * 1e9),  # Docker refuses more than there are
            "pids_limit": limits.pids,
        }
        if self.config.gpus:
            ids = [str(index) for index in self.config.gpus]
            found["device_requests"] = [DeviceRequest(device_ids=ids, capabilities=[["gpu"]])]
        return found

    def _teardown(self) -> None:
        import docker
        import requests

        gone = (docker.errors.DockerException, requests.exceptions.RequestException)
        if self._container is not None:
            with contextlib.suppress(*gone):  # it may be gone already, and the daemon may be too
                self._container.remove(force=True)
            with contextlib.suppress(*gone):
                for _ in range(200):
                    self._container.reload()
                    time.sleep(0.02)
            self._container = None
        if self._client is not None:
            self._client.close()
            self._client = None
        self._counters = None
        if self._state is not None:
            self._state.remove()
            self._state = None

    def _pids(self) -> list[int]:
        return self._counters.pids() if self._counters else []

    def _memory_kills(self) -> int:
        return self._counters.memory_kills() if self._counters else 0

    def _refused_forks(self) -> int:
        return self._counters.refused_forks() if self._counters else 0
