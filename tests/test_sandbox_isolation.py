"""What must not be seen or reached from inside, tried in every real engine."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from sandbox_support import ENGINES, engine, text

import curation_env
from curation_env.sandbox import Mount, Sandbox, SandboxConfig, SandboxUnavailable
from curation_env.sandbox.interpreter import Interpreter
from curation_env.sandbox.rootfs import contents

REPOSITORY = Path(curation_env.__file__).resolve().parents[1]


@pytest.fixture(scope="module", params=ENGINES)
def sandbox(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    with engine(request.param, tmp_path_factory.mktemp(request.param) / "run-1/workspace") as started:
        yield started


def python(sandbox: Sandbox, code: str) -> str:
    """stdout of a Python program inside."""
    result = sandbox.exec(["python", "-c", code], timeout=60)
    assert result.exit_code == 0, result
    return result.stdout.decode()


@pytest.fixture(scope="module")
def walked(sandbox: Sandbox) -> dict[str, list[str]]:
    """One walk over everything inside: files whose path has our name, and folders that a file can be made in."""
    code = """if True:
        import json, os
        named, writable = [], []
        for folder, folders, names in os.walk('/'):
            if folder == '/':
                folders[:] = [name for name in folders if name not in ('proc', 'sys')]
            for name in names:
                path = os.path.join(folder, name)
                if 'curation' in path and not os.path.islink(path) and os.path.getsize(path):
                    named.append(path)
            try:
                open(os.path.join(folder, '.probe'), 'x').close()
            except OSError:
                continue
            os.unlink(os.path.join(folder, '.probe'))
            writable.append(folder)
        print(json.dumps({'named': named, 'writable': writable}))"""
    found: dict[str, list[str]] = json.loads(python(sandbox, code))
    return found


def test_the_tools_are_there(sandbox: Sandbox) -> None:
    code = "import curation, numpy, pyarrow, datasets, PIL.Image, sys\n"
    code += "print(curation.__file__); print(sys.version_info[:2])"
    assert python(sandbox, code) == f"/opt/curation/lib/curation/__init__.py\n{sys.version_info[:2]}\n"
    assert text(sandbox, "python3 -c 'print(1)'; command -v curation") == "1\n/opt/curation/bin/curation\n"
    assert "submit" in text(sandbox, "curation --help")


def test_the_harness_is_not(sandbox: Sandbox, walked: dict[str, list[str]]) -> None:
    result = sandbox.exec(["python", "-c", "import curation_env"], timeout=20)
    assert b"ModuleNotFoundError" in result.stderr
    code = "import importlib.metadata as m; d = m.distribution('curation-env'); print(d.version, d.files)"
    assert sandbox.exec(["python", "-c", code], timeout=20).stdout in (b"", b"None None\n")
    assert sandbox.exec("curation-env --help", timeout=20).exit_code == 127
    assert [path for path in walked["named"] if not path.startswith("/opt/curation/")] == []
    for name in ("curation_env/pipeline.py", "curation_env/mini", "envs", "tests", "conf", "setup.cfg", ".git"):
        assert sandbox.exec(["test", "-e", str(REPOSITORY / name)], timeout=10).exit_code == 1


def test_no_file_of_the_host(sandbox: Sandbox, tmp_path: Path) -> None:
    workspace = sandbox.config.workspace
    planted = [
        tmp_path / "pools/mini/truth.parquet",
        tmp_path / "suites/mini/MiniOCR.tsv",
        workspace.parent / "sealed.jsonl",
        workspace.parent.parent / "run-2/journal.jsonl",
    ]
    for path in planted:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("planted")
        assert sandbox.exec(["cat", str(path)], timeout=10).exit_code != 0
        assert sandbox.exec(["ls", str(path.parent)], timeout=10).exit_code != 0
    for path in ("/etc/ssl", "/var/run/docker.sock", "/run/docker.sock", str(Path.home() / ".ssh")):
        assert sandbox.exec(["sh", "-c", f"cat {path} || ls {path}/*"], timeout=10).exit_code != 0
    for path in ("/workspace/..", "/proc/1/cwd/..", "/proc/self/cwd/..", f"/proc/1/root{workspace.parent}"):
        assert sandbox.exec(["cat", f"{path}/sealed.jsonl"], timeout=10).exit_code != 0
    result = sandbox.exec("ls -d /home/* /root/.[a-z]* /mnt/* /media/* /srv/*", timeout=10)
    shown = {line for line in result.stdout.decode().split() if not sys.base_prefix.startswith(line)}
    assert shown <= {"/root/.bashrc", "/root/.profile"}


@pytest.mark.parametrize("kind", ENGINES)
def test_hidden_folders_are_empty_inside(kind: str, tmp_path: Path) -> None:
    """Where they lie in the harness's Python, which is shown; what is mounted from them is seen all the same."""
    planted = Path(tempfile.mkdtemp(dir=sys.prefix, prefix="planted-"))
    try:
        data, run = planted / "data", planted / "runs/run-1"
        for folder in (data / "view", data / "suites", run / "workspace", planted / "runs/run-2"):
            folder.mkdir(parents=True)
            (folder / "file").write_text("planted")
        mounts = (Mount(data / "view", "/workspace/pool"),)
        (tmp_path / "link").symlink_to(planted / "runs")
        with engine(kind, run / "workspace", mounts=mounts, hidden=(data, tmp_path / "link")) as sandbox:
            assert text(sandbox, f"ls -A {data} {planted}/runs") == f"{data}:\n\n{planted}/runs:\n"
            assert text(sandbox, "cat file pool/file") == "plantedplanted"
            assert sandbox.exec(f"touch {data}/x", timeout=10).exit_code != 0
            assert python(sandbox, "import numpy, curation; print('on')") == "on\n"
    finally:
        shutil.rmtree(planted)


def test_what_cannot_be_hidden_is_refused(tmp_path: Path) -> None:
    def covered(*hidden: Path, system: Path = tmp_path / "usr", workspace: str = "workspace") -> list[str]:
        config = SandboxConfig(tmp_path / workspace, hidden=hidden)
        (tmp_path / "state").mkdir(exist_ok=True)
        masked = contents(config, tmp_path / "state", interpreter, "python", (system,)).masked
        return [str(path.relative_to(tmp_path)) for path in masked]

    app = tmp_path / "usr/src/app"
    for folder in (app / "venv/bin", app / "data/suites", tmp_path / "workspace/x"):
        folder.mkdir(parents=True)
    interpreter = Interpreter(app / "venv/bin/python", (), (), (app / "venv/lib",), (app / "venv", tmp_path / "usr"))
    assert covered(app / "data", app / "data/suites") == ["usr/src/app/data", "usr/src/app/venv/lib"]
    assert covered(app / "data", tmp_path / "workspace", system=tmp_path / "other", workspace="elsewhere") == [
        "usr/src/app/venv/lib"
    ]
    for hidden, words in (
        (app, "Python lies in it"),
        (app / "venv", "Python lies in it"),
        (tmp_path / "usr", "Python lies in it"),
        (tmp_path / "workspace/x", "lies in .*workspace, which is shown"),
    ):
        with pytest.raises(SandboxUnavailable, match=words):
            covered(hidden)
    with pytest.raises(FileNotFoundError, match="absent"):
        covered(tmp_path / "absent")


def test_no_variable_of_the_host(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANTED_KEY", "planted")
    seen = text(sandbox, "env; cat /proc/[0-9]*/environ 2>/dev/null | tr '\\0' '\\n'")
    assert "planted" not in seen
    names = {line.partition("=")[0] for line in text(sandbox, "env").splitlines()}
    given = {
        "PATH",
        "HOME",
        "USER",
        "LANG",
        "TERM",
        "TMPDIR",
        "PYTHONPATH",
        "PYTHONDONTWRITEBYTECODE",
        "PYTHONUNBUFFERED",
    }
    given |= {"OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "CURATION_WORKSPACE"}
    assert names - {"PWD", "OLDPWD", "SHLVL", "_"} == given


def test_no_process_of_the_host(sandbox: Sandbox) -> None:
    inside = [
        int(name) for name in python(sandbox, "import os; print(*filter(str.isdigit, os.listdir('/proc')))").split()
    ]
    assert len(inside) < 8
    outside = subprocess.Popen(["sleep", "7790"])
    try:
        assert "7790" not in text(sandbox, "cat /proc/[0-9]*/cmdline | tr '\\0' ' '")
        sandbox.exec(f"kill -9 {outside.pid}", timeout=10)
        assert outside.poll() is None
    finally:
        outside.kill()
        outside.wait()


def test_no_network(sandbox: Sandbox) -> None:
    interfaces = text(sandbox, "cat /proc/net/dev").splitlines()[2:]
    assert [line.split(":")[0].strip() for line in interfaces] == ["lo"]
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as abstract:
        abstract.bind(f"\0planted-{os.getpid()}")
        abstract.listen()
        port = server.getsockname()[1]
        code = f"import socket; socket.create_connection(('127.0.0.1', {port}), 2)"
        assert b"refused" in sandbox.exec(["python", "-c", code], timeout=10).stderr
        code = f"import socket; socket.socket(1).connect(chr(0) + 'planted-{os.getpid()}')"
        assert b"refused" in sandbox.exec(["python", "-c", code], timeout=10).stderr
    result = sandbox.exec(["python", "-c", "import socket; socket.create_connection(('192.0.2.1', 80), 2)"], timeout=10)
    assert b"unreachable" in result.stderr
    for family in (17, 38, 40):  # packets, kernel cryptography, the hypervisor's sockets
        code = f"import socket; socket.socket({family}, 3)"
        assert b"PermissionError" in sandbox.exec(["python", "-c", code], timeout=10).stderr


def test_no_privilege(sandbox: Sandbox) -> None:
    status = dict(line.split(":\t") for line in text(sandbox, "cat /proc/self/status").splitlines() if ":\t" in line)
    assert {status[name].strip() for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"
    for command in (
        "unshare -Ur true",
        "mount -t tmpfs x /tmp",
        "chroot / true",
        "mknod /workspace/disk b 254 0",
        "dmesg",
        "chown 12345 /workspace",
        "hostname other",
    ):
        assert sandbox.exec(command, timeout=10).exit_code != 0, command


def test_kernel_settings_and_devices_of_the_host_are_safe(sandbox: Sandbox) -> None:
    """As root without capabilities a process may still own these files: they must be read-only or its own."""
    before = Path("/proc/sys/kernel/core_pattern").read_text()
    modes = {name: os.stat(f"/dev/{name}").st_mode for name in ("null", "zero", "urandom", "tty")}
    for name in (
        "sys/kernel/core_pattern",
        "sys/kernel/hostname",
        "sys/vm/overcommit_memory",
        "sysrq-trigger",
        "self/../1/mem",
    ):
        assert sandbox.exec(f"echo planted > /proc/{name}", timeout=10).exit_code != 0
    assert (
        sandbox.exec(
            "head -c 100 /proc/kcore | grep -q . || head -c 8 /proc/kpagecount | grep -q .", timeout=10
        ).exit_code
        != 0
    )
    sandbox.exec("chmod 644 /dev/null /dev/zero /dev/urandom /dev/tty", timeout=10)
    assert Path("/proc/sys/kernel/core_pattern").read_text() == before
    assert {name: os.stat(f"/dev/{name}").st_mode for name in modes} == modes
    disks = text(
        sandbox, "find /dev -type b; find /dev -name 'mem' -o -name 'kmem' -o -name 'sd*' -o -name 'vd*' -o -name kvm"
    )
    assert disks == ""


def test_nothing_but_workspace_and_memory_is_writable(walked: dict[str, list[str]]) -> None:
    # Docker's /dev is memory of its own, 64 MB at most; bubblewrap's is read-only. Where the interpreter lies below the
    # host's /tmp, the folders above it are part of the sandbox's own /tmp.
    found = {path for path in walked["writable"] if not path.startswith("/tmp/")}
    assert found - {"/dev", "/dev/mqueue"} == {"/workspace", "/tmp", "/dev/shm"}
