"""The choice of an engine, the scripted dummy, the engine without isolation, orphans, and users without privileges."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path

import docker
import pytest
from sandbox_support import LIMITS, engine, host_processes, new_nap, text, until

import curation_env
from curation_env.errors import SandboxError
from curation_env.sandbox import (
    ExecResult,
    Mount,
    Sandbox,
    SandboxConfig,
    SandboxDied,
    SandboxUnavailable,
    choose_kind,
    make_sandbox,
)
from curation_env.sandbox.docker import DockerSandbox, docker_problem
from curation_env.sandbox.dummy import DummySandbox
from curation_env.sandbox.image import RECIPE_LABEL, build_image, connect, recipe


@pytest.fixture
def nap() -> str:
    return new_nap()


# -- the choice


def test_auto_prefers_docker(tmp_path: Path) -> None:
    engine("docker", tmp_path)  # fails with the instruction where it isn't there
    assert choose_kind() == "docker"
    assert make_sandbox("auto", SandboxConfig(workspace=tmp_path)).kind == "docker"


def test_auto_without_docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/absent.sock")
    assert choose_kind() == "bubblewrap"
    with pytest.raises(SandboxUnavailable, match="Docker daemon does not answer"):
        make_sandbox("docker", SandboxConfig(workspace=tmp_path)).start()


def test_nothing_at_all_says_how_to_get_one(tmp_path: Path) -> None:
    code = "import curation_env.sandbox as s; print(s.choose_kind())"
    env = {"PATH": str(tmp_path), "DOCKER_HOST": f"unix://{tmp_path}/absent.sock", "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert "SandboxUnavailable" in done.stderr
    for words in ("Docker daemon does not answer", "apt-get install bubblewrap", "CURATION_ENV_NO_ISOLATION=1"):
        assert words in done.stderr
    env["CURATION_ENV_NO_ISOLATION"] = "1"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.stdout == "none\n"


def test_unknown_kind_and_bad_mounts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown sandbox 'podman'"):
        make_sandbox("podman", SandboxConfig(workspace=tmp_path))  # type: ignore[arg-type]
    for target in ("relative", "/", "/workspace", "/workspace/", "/a/../b"):
        with pytest.raises(ValueError, match="mount target"):
            Mount(tmp_path, target)


def test_importing_the_package_of_engines_is_light() -> None:
    code = "import sys, curation_env.sandbox; print(sorted({'docker', 'torch', 'datasets'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# -- the dummy


def test_dummy_answers_its_script(tmp_path: Path) -> None:
    def write(sandbox: Sandbox, command: str, stdin: bytes) -> str:
        sandbox.write("out.txt", stdin)
        return f"wrote by {command}"

    script = {
        "echo .*": "hello\n",
        "slow": ExecResult(0, b"", b"", False, False, seconds=60),
        "fail": ExecResult(3, b"", b"why", False, False, seconds=0.1),
        "long": b"x" * 200_000,
        "python policy.py": write,
        "die": SandboxDied("gone"),
    }
    config = SandboxConfig(workspace=tmp_path / "workspace", limits=LIMITS)
    sandbox = DummySandbox(config, script)  # type: ignore[arg-type]
    with pytest.raises(SandboxDied):
        sandbox.exec("echo a", timeout=1)
    with sandbox:
        assert sandbox.exec("echo a", timeout=1).stdout == b"hello\n"
        assert sandbox.exec("slow", timeout=1).timed_out
        assert sandbox.exec("fail", timeout=1).exit_code == 3
        assert sandbox.exec("other", timeout=1).exit_code == 127
        assert sandbox.exec(["python", "policy.py"], timeout=1, stdin=b"in").stdout == b"wrote by python policy.py"
        assert sandbox.read("out.txt", 10) == b"in"
        cut = sandbox.exec("long", timeout=1)
        assert cut.truncated
        assert len(cut.stdout) <= LIMITS.output_bytes
        digest = sandbox.snapshot(tmp_path / "s", max_mb=1)
        sandbox.write("out.txt", b"changed")
        sandbox.restore(tmp_path / "s")
        assert sandbox.read("out.txt", 10) == b"in"
        assert sandbox.snapshot(tmp_path / "t", max_mb=1) == digest
        sandbox.freeze()
        with pytest.raises(SandboxError, match="frozen"):
            sandbox.exec("echo a", timeout=1)
        sandbox.thaw()
        process = sandbox.popen("python policy.py")
        process.write(b"typed")
        assert process.poll() is None
        process.close_stdin()
        assert process.read(1) == b"wrote by python policy.py"
        assert (process.wait(1), process.eof) == (0, True)
        assert sandbox.commands[:2] == ["echo a", "slow"]
        with pytest.raises(SandboxDied):
            sandbox.exec("die", timeout=1)
        assert not sandbox.alive()
        sandbox.start()
        assert sandbox.exec("echo a", timeout=1).exit_code == 0


# -- no isolation


def test_plain_engine_still_bounds_and_kills(tmp_path: Path, nap: str) -> None:
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool/rows").write_text("rows")
    mounts = (Mount(tmp_path / "pool", "/workspace/pool"),)
    config = SandboxConfig(workspace=tmp_path / "workspace", limits=LIMITS, mounts=mounts)
    with make_sandbox("none", config) as sandbox:
        assert text(sandbox, "pwd; cat pool/rows; python -c 'import curation'") == f"{tmp_path}/workspace\nrows"
        assert sandbox.exec("head -c 1000000 /dev/zero", timeout=10).truncated
        result = sandbox.exec(f"(setsid sleep {nap} &); sleep {nap}", timeout=0.5)
        assert result.timed_out
        assert not host_processes(nap)
        text(sandbox, f"(setsid sleep {nap} >/dev/null 2>&1 &)")
        assert until(lambda: len(host_processes(nap)) == 1)
        sandbox.kill_all()
        assert not host_processes(nap)
        assert text(sandbox, f"(setsid sleep {nap} >/dev/null 2>&1 &) ; mkdir -p a; pwd") == f"{tmp_path}/workspace\n"
        assert sandbox.exec("pwd", timeout=5, cwd="/workspace/a").stdout.decode() == f"{tmp_path}/workspace/a\n"
    assert until(lambda: not host_processes(nap))
    assert os.listdir(tmp_path / "workspace") == ["a"]


# -- what a killed harness leaves


@pytest.mark.parametrize("kind", ["bubblewrap", "docker", "none"])
def test_a_killed_harness_leaves_nothing_running(kind: str, tmp_path: Path, nap: str) -> None:
    code = f"""
        import sys, time
        from pathlib import Path
        from curation_env.sandbox import SandboxConfig, make_sandbox
        sandbox = make_sandbox({kind!r}, SandboxConfig(workspace=Path({str(tmp_path / "workspace")!r})))
        sandbox.start()
        sandbox.exec("(setsid sleep {nap} >/dev/null 2>&1 &)", timeout=10)
        process = sandbox.popen("echo begun; sleep {nap}")
        process.read(10)
        time.sleep(0.3)
        sandbox.freeze()
        print(sandbox._state.path, flush=True)
        time.sleep(60)
    """
    (tmp_path / "t").mkdir()
    env = {**os.environ, "TMPDIR": str(tmp_path / "t")}
    harness = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True, env=env
    )
    assert harness.stdout is not None
    state = Path(harness.stdout.readline().strip())
    assert state.is_dir()
    found = len(host_processes(nap))
    harness.kill()
    harness.wait()
    harness.stdout.close()
    assert found == 2
    assert until(lambda: not host_processes(nap), 10)
    if kind == "none":
        return
    clean = "from curation_env.sandbox.docker import reap_orphans; print(reap_orphans())"
    done = subprocess.run([sys.executable, "-c", clean], env=env, capture_output=True, text=True, check=True)
    assert not state.exists(), done
    assert not list(Path("/sys/fs/cgroup").rglob(f"*{state.name}*"))
    if kind == "docker":
        listed = subprocess.run(
            ["docker", "ps", "-aq", "--filter", f"label=curation-env.state={state}"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert listed.stdout == ""


# -- the image


@pytest.fixture
def docker_client() -> Iterator[docker.DockerClient]:
    client = connect()
    yield client
    client.close()


def test_an_image_on_a_given_base(docker_client: docker.DockerClient, tmp_path: Path) -> None:
    bases = docker_client.images.list(name="curation-base")
    assert bases, "bash .ci/docker.sh makes one"
    said: list[str] = []
    tag = build_image(bases[0].tags[0], say=said.append)
    assert said == [f"building {tag} on {bases[0].tags[0]} (Python: the harness's)"]
    assert docker_client.images.get(tag).labels[RECIPE_LABEL] == recipe()
    assert docker_problem() == ""
    with DockerSandbox(SandboxConfig(tmp_path / "workspace"), image=tag) as sandbox:
        assert text(sandbox, "python -c 'import numpy, curation; print(1)'; pwd") == "1\n/workspace\n"


def test_a_base_without_python_is_refused(docker_client: docker.DockerClient) -> None:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("empty"))
    base = f"curation-test:{os.getpid()}"
    said: list[str] = []
    before = {image.id for image in docker_client.images.list(filters={"label": f"{RECIPE_LABEL}={recipe()}"})}
    docker_client.api.import_image_from_data(archive.getvalue(), repository="curation-test", tag=str(os.getpid()))
    try:
        with pytest.raises(SandboxUnavailable, match=f"no Python runs on {base}.*POSIX shell") as caught:
            build_image(base, say=said.append)
        assert caught.value.details
    finally:
        docker_client.images.remove(base, force=True)
    found = docker_client.images.list(filters={"label": f"{RECIPE_LABEL}={recipe()}"})
    assert {image.id for image in found} == before
    tag = said[0].split()[1]
    assert not docker_client.images.list(name=tag)
    assert not docker_client.images.list(name=f"{tag}-untried")


def test_a_base_that_is_not_there_is_named() -> None:
    with pytest.raises(SandboxUnavailable, match=r"no image 127\.0\.0\.1:1/absent, and it can't be pulled"):
        build_image("127.0.0.1:1/absent", say=lambda _: None)


# -- an ordinary user, without control groups


def test_bubblewrap_as_an_ordinary_user() -> None:
    """Run as `nobody` where the tests are root's: the limits must hold by the fallbacks too."""
    code = """
        import os
        from pathlib import Path
        from curation_env.sandbox import SandboxConfig, SandboxLimits, make_sandbox
        limits = SandboxLimits(memory_mb=256, pids=48, disk_mb=16, file_mb=8)
        sandbox = make_sandbox("bubblewrap", SandboxConfig(workspace=Path("workspace").absolute(), limits=limits))
        hoard = (
            "import ctypes, os, time; libc = ctypes.CDLL(None); libc.mmap.restype = ctypes.c_void_p\\n"
            "for _ in range(8):\\n"
            " fd = os.open('f', os.O_RDWR | os.O_CREAT); os.unlink('f'); os.write(fd, bytes(4 << 20))\\n"
            " libc.mmap(None, ctypes.c_size_t(4 << 20), 1, 1, fd, ctypes.c_long(0)); os.close(fd)\\n"
            "time.sleep(15)"
        )
        def run(command, timeout=20):
            result = sandbox.exec(command, timeout=timeout)
            return result.exit_code, result.limit
        with sandbox:
            assert os.getuid() != 0
            print(run("id -u; curation --help; touch file; python -c 'import curation'"))
            print(Path("workspace/file").stat().st_uid == os.getuid())
            hog = "x = bytearray(90 << 20); import time; time.sleep(9)"
            print(run(f"for i in 1 2 3 4; do python -c '{hog}' & done; wait"))
            print(run(["python", "-c", "x = bytearray(1 << 30)"])[0] != 0)
            print(run("bomb() { bomb | bomb & }; bomb; sleep 1; exit 6", timeout=5)[0] in (6, 137), run("echo on")[0])
            print(run(["python", "-c", hoard]))
            print(run("for i in $(seq 2000); do head -c 1000000 /dev/urandom > f$i || exit; done"))
            print(run("rm f*"))
            print(run("echo y > /proc/sys/kernel/core_pattern")[0] != 0)
            print(run("mkdir a && touch a/b && chmod 0 a . && sleep 1 && exit 5"))
            print(run("ls"))
            sandbox.snapshot(Path("snapshot").absolute(), max_mb=10)
            print(Path("snapshot/a/b").exists())
        print(sorted(os.listdir()))
    """
    folder = Path(tempfile.mkdtemp(dir="/tmp", prefix="unprivileged-"))  # not below a folder that only root may enter
    try:
        # The part of the package that is the sandbox stands on the standard library alone.
        package = Path(curation_env.__file__).parent
        (folder / "curation_env").mkdir()
        (folder / "curation_env/__init__.py").touch()
        for name in ("errors.py", "assets.py", "locks.py", "sandbox", "workspace"):
            copy = shutil.copytree if (package / name).is_dir() else shutil.copy
            copy(package / name, folder / "curation_env" / name)  # type: ignore[operator]
        python, become = sys.executable, []
        (folder / "run").mkdir()
        (folder / "run/tmp").mkdir()
        if os.getuid() == 0:
            python, become = "/usr/bin/python3", ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
            folder.chmod(0o755)
            for path in (folder / "run", folder / "run/tmp"):
                os.chown(path, 65534, 65534)
        env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(folder), "HOME": "/", "TMPDIR": str(folder / "run/tmp")}
        done = subprocess.run(
            [*become, python, "-c", textwrap.dedent(code)],
            cwd=folder / "run",
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stdout.splitlines() == [
            "(0, '')",
            "True",
            "(137, 'memory')",
            "True",
            "True 0",
            "(137, 'disk')",
            "(137, 'disk')",
            "(0, '')",
            "True",
            "(5, '')",
            "(0, '')",
            "True",
            "['snapshot', 'tmp', 'workspace']",
        ], done
    finally:
        shutil.rmtree(folder)
