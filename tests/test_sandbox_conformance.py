"""One suite for every real engine: what `Sandbox` promises, tried from inside."""

from __future__ import annotations

import gc
import hashlib
import os
import socket
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sandbox_support import ENGINES, LIMITS, engine, host_processes, new_nap, text, until

from curation_env.errors import SandboxError
from curation_env.sandbox import Mount, Sandbox, SandboxDied
from curation_env.sandbox.docker import STATE_LABEL, docker_problem
from curation_env.sandbox.image import connect


@pytest.fixture(scope="module", params=ENGINES)
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    """One started sandbox per engine for the tests that leave nothing behind."""
    folder = tmp_path_factory.mktemp(request.param)
    with engine(request.param, folder / "workspace") as sandbox:
        yield sandbox


@pytest.fixture
def sandbox(shared: Sandbox) -> Sandbox:
    """The shared one, alive, empty and thawed."""
    shared.start()
    shared.kill_all()
    for path in sorted(shared.config.workspace.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    until(lambda: not shared._watch.full)  # type: ignore[attr-defined]
    return shared


@pytest.fixture(params=ENGINES)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def nap() -> str:
    return new_nap()


# -- commands


def test_exit_codes_and_streams(sandbox: Sandbox) -> None:
    result = sandbox.exec("echo out; echo err >&2; exit 7", timeout=10)
    assert (result.exit_code, result.stdout, result.stderr) == (7, b"out\n", b"err\n")
    assert not result.truncated
    assert not result.timed_out
    assert 0 < result.seconds < 5
    assert sandbox.exec("kill -TERM $$", timeout=10).exit_code == 128 + 15


def test_argument_vector_is_not_a_shell(sandbox: Sandbox) -> None:
    assert sandbox.exec(["printf", "%s|", "$HOME", "a b", ""], timeout=10).stdout == b"$HOME|a b||"


def test_what_cannot_be_run(sandbox: Sandbox) -> None:
    missing = sandbox.exec(["no-such-program"], timeout=10)
    assert missing.exit_code == 127
    assert b"no-such-program" in missing.stderr
    assert sandbox.exec("true", timeout=10, cwd="/nowhere").exit_code == 127
    assert sandbox.exec(["/etc/passwd"], timeout=10).exit_code == 126
    with pytest.raises(ValueError, match="NUL"):
        sandbox.exec(["printf", "a\0b"], timeout=10)
    with pytest.raises(ValueError, match="empty"):
        sandbox.exec([], timeout=10)


def test_utf8_binary_and_long_commands(sandbox: Sandbox) -> None:
    assert text(sandbox, "echo 'naïve 漢字 🦀'") == "naïve 漢字 🦀\n"
    assert sandbox.exec(["cat"], timeout=10, stdin=bytes(range(256))).stdout == bytes(range(256))
    word = "x" * 300_000
    assert text(sandbox, f"word={word}; echo ${{#word}}") == "300000\n"
    assert (
        sandbox.exec(f"read line; echo $line; : {word}", timeout=10, stdin=b"still stdin\n").stdout == b"still stdin\n"
    )


def test_large_stdin_and_unread_stdin(sandbox: Sandbox) -> None:
    data = os.urandom(8 << 20)
    result = sandbox.exec("sha256sum", timeout=30, stdin=data)
    assert result.stdout.split()[0].decode() == hashlib.sha256(data).hexdigest()
    assert sandbox.exec("exit 3", timeout=10, stdin=data).exit_code == 3


def test_stdin_ends(sandbox: Sandbox) -> None:
    assert sandbox.exec("cat; echo end", timeout=10).stdout == b"end\n"


def test_environment_and_working_directory(sandbox: Sandbox) -> None:
    assert text(sandbox, "pwd; echo $HOME") == "/workspace\n/workspace\n"
    result = sandbox.exec("echo $COLOUR; pwd; id -un", timeout=10, env={"COLOUR": "blue green"}, cwd="/tmp")
    assert result.stdout == b"blue green\n/tmp\ncuration\n"


def test_a_command_inherits_nothing_of_its_supervisor(sandbox: Sandbox) -> None:
    """No descriptor but its own, no ignored or blocked signal, in a session of its own."""
    for command, descriptors in (("exec ls /proc/self/fd", 4), (f"exec ls /proc/self/fd #{'x' * 200_000}", 5)):
        assert text(sandbox, command).split() == [str(number) for number in range(descriptors)]
    masks = text(sandbox, "exec grep -E '^Sig(Blk|Ign)' /proc/self/status").split()[1::2]
    assert [int(mask, 16) & 0x7FFFFFFF for mask in masks] == [0, 0]  # above are those that the C library keeps
    number, group, session = text(sandbox, "cut -d ' ' -f 1,5,6 /proc/$$/stat").split()
    assert number == group == session
    assert text(sandbox, "umask") == "0022\n"


def test_output_is_bounded_and_keeps_both_ends(sandbox: Sandbox) -> None:
    begin = time.monotonic()
    result = sandbox.exec("echo first; head -c 100000000 /dev/zero; echo last; echo problem >&2", timeout=60)
    assert time.monotonic() - begin < 60
    assert result.exit_code == 0
    assert result.truncated
    assert len(result.stdout) <= LIMITS.output_bytes
    assert result.stdout.startswith(b"first\n")
    assert result.stdout.endswith(b"last\n")
    assert b"bytes left out" in result.stdout
    assert result.stderr == b"problem\n"


def test_output_at_the_limit_is_whole(sandbox: Sandbox) -> None:
    result = sandbox.exec(f"head -c {LIMITS.output_bytes} /dev/zero", timeout=20)
    assert not result.truncated
    assert result.stdout == bytes(LIMITS.output_bytes)


def test_background_process_does_not_hold_the_command(sandbox: Sandbox, nap: str) -> None:
    result = sandbox.exec(f"sleep {nap} & echo started", timeout=10)
    assert result.stdout == b"started\n"
    assert result.seconds < 5
    assert until(lambda: "sleep" in text(sandbox, "cat /proc/[0-9]*/comm"))


def test_timeout_kills_every_descendant(sandbox: Sandbox, nap: str) -> None:
    script = f"trap '' TERM INT HUP; (setsid sleep {nap} &); (setsid nohup sh -c 'sleep {nap}; true' &) ; sleep {nap}"
    result = sandbox.exec(f"echo begun; {script}", timeout=1.0)
    assert result.timed_out
    assert result.exit_code == 137
    assert result.stdout == b"begun\n"
    assert 1.0 <= result.seconds < 10
    assert until(lambda: not host_processes(nap))


def test_many_threads_at_once(sandbox: Sandbox) -> None:
    outputs: dict[int, bytes] = {}

    def one(i: int) -> None:
        outputs[i] = sandbox.exec(f"echo {i}", timeout=20).stdout

    threads = [threading.Thread(target=one, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outputs == {i: b"%d\n" % i for i in range(8)}


# -- streaming


def test_popen_streams_both_ways(sandbox: Sandbox) -> None:
    process = sandbox.popen('while read line; do echo "got $line"; echo note >&2; done; exit 5')
    for word in (b"one", b"two"):
        process.write(word + b"\n")
        assert process.read(10) == b"got " + word + b"\n"
        assert process.poll() is None
    assert process.read(0.1) == b""
    assert not process.eof
    process.close_stdin()
    process.close_stdin()
    assert process.wait(10) == 5
    assert process.read(1) == b""
    assert process.eof
    assert process.stderr == b"note\nnote\n"
    with pytest.raises(BrokenPipeError):
        process.write(b"late")


def test_popen_wait_keeps_output_and_times_out(sandbox: Sandbox, nap: str) -> None:
    process = sandbox.popen(f"head -c 300000 /dev/zero; sleep {nap}")
    with pytest.raises(TimeoutError):
        process.wait(0.5)
    process.kill()
    process.kill()
    assert process.wait(1) == 137
    kept = b""
    while not process.eof:
        kept += process.read(1)
    assert len(kept) == LIMITS.output_bytes
    assert until(lambda: not host_processes(nap))


def test_popen_of_a_lot_loses_nothing(sandbox: Sandbox) -> None:
    process = sandbox.popen(["head", "-c", "5000000", "/dev/zero"])
    total = 0
    while not process.eof:
        total += len(process.read(10))
    assert total == 5_000_000
    assert process.wait(5) == 0


def test_popen_write_to_one_that_does_not_read(sandbox: Sandbox, nap: str) -> None:
    process = sandbox.popen(f"sleep {nap}")
    with pytest.raises(TimeoutError):
        process.write(bytes(1 << 20), timeout=0.3)
    process.kill()


# -- files


@pytest.mark.parametrize("data", [b"", b"plain", "naïve 漢字".encode(), bytes(range(256)) * 40_000], ids=len)
def test_files_both_ways(sandbox: Sandbox, data: bytes) -> None:
    sandbox.write("deep/er/file.bin", data)
    digest = text(sandbox, "sha256sum < /workspace/deep/er/file.bin").split()[0]
    assert digest == hashlib.sha256(data).hexdigest()
    text(sandbox, "cp deep/er/file.bin copy")
    assert sandbox.read("/workspace/copy", 20_000_000) == data
    owner = (sandbox.config.workspace / "copy").stat()
    assert (owner.st_uid, owner.st_gid) == (os.getuid(), os.getgid())


def test_file_errors(sandbox: Sandbox) -> None:
    with pytest.raises(FileNotFoundError):
        sandbox.read("missing", 10)
    with pytest.raises(FileNotFoundError):
        sandbox.read("no/such/folder", 10)
    text(sandbox, "mkdir folder; echo 12345 > file")
    with pytest.raises(IsADirectoryError):
        sandbox.read("folder", 10)
    with pytest.raises(IsADirectoryError):
        sandbox.read("/workspace", 10)
    with pytest.raises(IsADirectoryError):
        sandbox.write("folder", b"")
    with pytest.raises(NotADirectoryError):
        sandbox.read("file/below", 10)
    with pytest.raises(NotADirectoryError):
        sandbox.write("file/below", b"")
    with pytest.raises(OSError, match="larger than 5 bytes"):
        sandbox.read("file", 5)
    assert sandbox.read("file", 6) == b"12345\n"
    with pytest.raises(OSError, match="larger than 16 MB"):
        sandbox.write("big", bytes((LIMITS.file_mb << 20) + 1))
    for path in ("../x", "/etc/passwd", "/workspace/../etc/passwd", "/"):
        with pytest.raises(PermissionError):
            sandbox.read(path, 10)


def test_links_and_special_files_are_refused(sandbox: Sandbox, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    plants = f"ln -s {secret} link; ln -s {tmp_path} linked; ln -s . loop; mkfifo fifo; ln -s /etc etc"
    text(sandbox, plants + "; python -c 'import socket; socket.socket(1).bind(\"unix\")'")
    for path in ("link", "linked/secret", "loop/link", "fifo", "unix", "etc/passwd"):
        with pytest.raises(PermissionError):
            sandbox.read(path, 100)
    with pytest.raises(PermissionError):
        sandbox.write("linked/new", b"")
    sandbox.write("link", b"mine")  # replaces the link, not what it points to
    assert secret.read_text() == "secret"
    assert sandbox.read("link", 10) == b"mine"
    assert os.listdir(tmp_path) == ["secret"]


def test_read_without_permission_bits_inside(sandbox: Sandbox) -> None:
    assert sandbox.exec("touch /usr/x || touch /x || touch /opt/x || touch /etc/x", timeout=10).exit_code != 0
    assert sandbox.exec("echo y > /opt/curation/bin/python", timeout=10).exit_code != 0


# -- snapshot, restore, freeze, kill


def test_snapshot_and_restore(sandbox: Sandbox, tmp_path: Path, nap: str) -> None:
    text(
        sandbox,
        "mkdir -p a/b; echo one > a/b/f; ln -s /etc/passwd l; ln -s a d; chmod 700 a/b/f; mkfifo p; chmod 0 a/b",
    )
    digest = sandbox.snapshot(tmp_path / "one", max_mb=10)
    assert sandbox.snapshot(tmp_path / "two", max_mb=10) == digest
    assert (tmp_path / "one/l").is_symlink()
    assert not (tmp_path / "one/p").exists()
    with pytest.raises(FileExistsError):
        sandbox.snapshot(tmp_path / "two", max_mb=10)
    text(sandbox, f"chmod 700 a/b; echo two > a/b/f; rm l; mkdir l; touch l/x new; rm d; sleep {nap} & true")
    assert sandbox.snapshot(tmp_path / "three", max_mb=10) != digest
    sandbox.restore(tmp_path / "one")
    assert not host_processes(nap)
    assert text(sandbox, "cat a/b/f; readlink l d; ls; stat -c %a a/b/f") == "one\n/etc/passwd\na\na\nd\nl\n700\n"


def test_snapshot_is_bounded(sandbox: Sandbox, tmp_path: Path) -> None:
    text(sandbox, "truncate -s 15M sparse; truncate -s 15M other")
    with pytest.raises(OSError, match="larger than 20 MB"):
        sandbox.snapshot(tmp_path / "big", max_mb=20)
    assert not (tmp_path / "big").exists()


def test_freeze_and_thaw(sandbox: Sandbox) -> None:
    process = sandbox.popen("i=0; while true; do i=$((i+1)); echo $i > count; sleep 0.01; done")
    assert until(lambda: (sandbox.config.workspace / "count").exists())
    sandbox.freeze()
    before = sandbox.read("count", 100)
    time.sleep(0.2)
    assert sandbox.read("count", 100) == before
    assert sandbox.alive()
    with pytest.raises(SandboxError, match="frozen"):
        sandbox.exec("true", timeout=5)
    sandbox.thaw()
    sandbox.thaw()
    assert until(lambda: sandbox.read("count", 100) not in (before, b""))
    sandbox.freeze()
    sandbox.kill_all()
    assert process.wait(5) == 137
    assert text(sandbox, "echo on") == "on\n"


def test_freeze_catches_one_between_vfork_and_exec(sandbox: Sandbox) -> None:
    """There it can't be stopped, since its child has its memory. Here the child first looks in folders that take long
    to look up, so that a freeze almost always comes in between."""
    start = "subprocess.run(['absent'], env={'PATH': ':'.join(['/usr/..' * 500] * 300)})"
    program = f"import subprocess\nwhile True:\n try: {start}\n except OSError: print('.', flush=True)"
    process = sandbox.popen(["python3", "-c", program])
    assert process.read(10)
    for _ in range(5):
        begin = time.monotonic()
        sandbox.freeze()
        assert time.monotonic() - begin < 2
        while process.read(0.02):
            pass
        assert not process.read(0.1)
        sandbox.thaw()
        assert process.read(10)
    process.kill()


def test_kill_all_leaves_no_process(sandbox: Sandbox, nap: str) -> None:
    text(sandbox, f"for i in 1 2 3; do (setsid sh -c 'trap \"\" TERM; sleep {nap}; true' >/dev/null 2>&1 &) ; done")
    assert until(lambda: len(host_processes(nap)) == 3)
    sandbox.kill_all()
    assert not host_processes(nap)
    left = sandbox.exec("cat /proc/[0-9]*/comm", timeout=10).stdout.decode().split()
    assert sorted(set(left)) in (
        ["bash", "cat", "python"],
        ["bash", "cat", "python3"],
        ["cat", "python"],
        ["cat", "python3"],
    ), left


def test_a_command_cannot_kill_or_trace_its_supervisor(sandbox: Sandbox, nap: str) -> None:
    assert (
        sandbox.exec("kill -9 1; kill -STOP 1; kill -INT 1; kill -TERM 1; sleep 0.2; echo on", timeout=10).stdout
        == b"on\n"
    )
    assert sandbox.exec(f"kill -9 -1; sleep {nap}", timeout=10).exit_code == 137
    assert sandbox.exec(f"kill -9 $PPID; sleep {nap}", timeout=10).exit_code == 137
    assert until(lambda: not host_processes(nap))
    assert sandbox.exec("cat /proc/1/environ /proc/1/mem || ls -l /proc/1/fd/ && exit 9", timeout=10).exit_code != 0
    assert sandbox.alive()


# -- limits


def test_fork_bomb_is_bounded(sandbox: Sandbox, nap: str) -> None:
    result = sandbox.exec(f"bomb() {{ bomb | bomb & }}; bomb; sleep {nap}", timeout=10)
    assert result.exit_code == 137
    assert result.limit == "processes"
    begin = time.monotonic()
    assert text(sandbox, "echo on") == "on\n"
    assert time.monotonic() - begin < 15


def test_fork_bomb_in_the_background_ends(sandbox: Sandbox) -> None:
    sandbox.exec("bomb() { bomb | bomb & }; bomb", timeout=10)

    def quiet() -> bool:
        return len(sandbox.exec("cat /proc/[0-9]*/comm", timeout=10).stdout.split()) < 8

    assert until(quiet, 10)


def test_background_processes_do_not_lock_the_agent_out(sandbox: Sandbox) -> None:
    """They take up every process that there may be, without a fork that is refused."""
    until(lambda: len(sandbox._pids()) <= 2)  # type: ignore[attr-defined]
    count = LIMITS.pids - len(sandbox._pids()) - 1  # type: ignore[attr-defined]
    hoard = f"import os, time; time.sleep(0.3); any(os.fork() == 0 for _ in range({count})); time.sleep(60)"
    text(sandbox, f'python3 -c "{hoard}" >/dev/null 2>&1 &')
    assert until(lambda: len(sandbox._pids()) == LIMITS.pids)  # type: ignore[attr-defined]
    assert text(sandbox, "echo on") == "on\n"
    assert len(sandbox._pids()) < 5  # type: ignore[attr-defined]


def test_memory_hog_is_killed(sandbox: Sandbox) -> None:
    result = sandbox.exec(["python", "-c", "x = bytearray(1 << 30); print(len(x))"], timeout=30)
    assert result.exit_code == 137
    assert result.limit == "memory"
    assert text(sandbox, "echo on") == "on\n"
    result = sandbox.exec(["python", "-c", "x = bytearray(100 << 20); print(len(x))"], timeout=30)
    assert result.exit_code == 0
    assert result.limit == ""


def test_disk_filler_is_killed_and_can_clean_up(sandbox: Sandbox) -> None:
    result = sandbox.exec("for i in $(seq 1000); do head -c 1000000 /dev/urandom > f$i || exit; done", timeout=60)
    assert result.exit_code == 137
    assert result.limit == "disk"
    used = sum(path.stat().st_blocks * 512 for path in sandbox.config.workspace.iterdir())
    assert used < 8 * LIMITS.disk_mb << 20
    result = sandbox.exec(["sh", "-c", "cp f1 more"], timeout=10)
    assert result.exit_code != 0
    assert b"over its limit (32 MB" in result.stderr
    assert sandbox.exec("rm f*", timeout=10).exit_code == 0
    assert until(lambda: sandbox.exec("echo on > g; cat g", timeout=10).stdout == b"on\n")


def test_inode_filler_is_killed(sandbox: Sandbox) -> None:
    code = "import time\nfor i in range(10_000): open(f'i{i}', 'x').close()\ntime.sleep(30)"
    result = sandbox.exec(["python", "-c", code], timeout=60)
    assert (result.exit_code, result.limit) == (137, "files")


def test_a_deleted_file_still_counts(sandbox: Sandbox) -> None:
    keep = "f = open('f', 'wb'); os.unlink('f'); f.write(bytes(5 << 20)); f.flush(); files.append(f)"
    code = f"import os\nfiles = []\nfor i in range(1000):\n {keep}"
    result = sandbox.exec(["python", "-c", code], timeout=60)
    assert (result.exit_code, result.limit) == (137, "disk")


def test_a_mapped_deleted_file_still_counts(sandbox: Sandbox) -> None:
    # Not by Python's mmap, which keeps a descriptor.
    code = """
        import ctypes, os, time
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
        size = 8 << 20
        for i in range(8):
            fd = os.open('f', os.O_RDWR | os.O_CREAT)
            os.unlink('f')
            os.write(fd, bytes(size))
            assert libc.mmap(None, 4096, 1, 1, fd, 0) != ctypes.c_void_p(-1).value
            os.close(fd)
        time.sleep(30)
    """
    result = sandbox.exec(["python", "-c", textwrap.dedent(code)], timeout=60)
    assert (result.exit_code, result.limit) == (137, "disk")


def test_a_file_under_way_between_sockets_still_counts(sandbox: Sandbox) -> None:
    """Nobody can see who holds it; what it takes from the disk is seen (much of it: others may free some meanwhile)."""
    code = """
        import os, socket, time
        ends = []
        for i in range(80):
            fd = os.open('f', os.O_RDWR | os.O_CREAT)
            os.unlink('f')
            os.write(fd, bytes(12 << 20))
            ends.append(socket.socketpair())
            socket.send_fds(ends[-1][0], [b'x'], [fd])
            os.close(fd)
        time.sleep(30)
    """
    result = sandbox.exec(["python", "-c", textwrap.dedent(code)], timeout=60)
    assert (result.exit_code, result.limit) == (137, "disk")
    assert text(sandbox, "echo on") == "on\n"


def test_disk_cannot_be_reserved_unwritten(sandbox: Sandbox) -> None:
    code = "import os; fd = os.open('f', os.O_RDWR | os.O_CREAT); os.posix_fallocate(fd, 0, 1 << 20)"
    text(sandbox, f'python -c "{code}"; test $(stat -c %s f) = 1048576')
    code = "import ctypes, os; fd = os.open('f', os.O_RDWR | os.O_CREAT); libc = ctypes.CDLL(None, use_errno=True)"
    code += "; print(libc.fallocate(fd, 0, ctypes.c_long(0), ctypes.c_long(1 << 20)), os.strerror(ctypes.get_errno()))"
    assert text(sandbox, f'python -c "{code}"') == "-1 Operation not supported\n"


def test_file_size_and_tmp_are_bounded(sandbox: Sandbox) -> None:
    assert sandbox.exec("head -c 17M /dev/zero > f", timeout=20).exit_code != 0
    assert (sandbox.config.workspace / "f").stat().st_size <= LIMITS.file_mb << 20
    result = sandbox.exec("for i in 1 2 3 4; do head -c 12M /dev/zero > /tmp/f$i || exit 9; done", timeout=20)
    assert result.exit_code == 9
    text(sandbox, "rm /tmp/f*")
    result = sandbox.exec("for i in 1 2 3 4; do head -c 12M /dev/zero > /dev/shm/f$i || exit 9; done", timeout=20)
    assert result.exit_code == 9
    text(sandbox, "rm /dev/shm/f*")


def test_processor_time_is_bounded(sandbox: Sandbox) -> None:
    spin = "import os, time; os.fork(); end = time.time() + 1.5\nwhile time.time() < end: pass\n"
    spin += "print(end=str(time.process_time()) + chr(10))"
    used = [float(line) for line in text(sandbox, f"python -c '{spin}'; sleep 0.3").split()]
    assert len(used) == 2
    assert sum(used) < 1.5 * 1.25  # two cores' worth were asked for


def test_deep_folders_do_no_harm(sandbox: Sandbox, tmp_path: Path) -> None:
    code = "import os\nfor i in range(2000):\n os.mkdir('d'); os.chdir('d')"
    assert sandbox.exec(["python", "-c", code], timeout=20).exit_code in (0, 137)
    assert until(lambda: sandbox.exec("find | awk -F/ 'NF > 102' | wc -l", timeout=10).stdout == b"0\n")
    sandbox.snapshot(tmp_path / "deep", max_mb=10)
    (tmp_path / "empty").mkdir()
    sandbox.restore(tmp_path / "empty")
    assert os.listdir(sandbox.config.workspace) == []


# -- mounts and life


def test_mounts_socket_and_layers(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = tmp_path / "pool"
    pool.mkdir()
    (pool / "rows").write_text("rows")
    single = tmp_path / "single.txt"
    single.write_text("single")
    out = tmp_path / "out"
    out.mkdir()
    tool = tmp_path / "data/layers/tools/bin/hello"
    tool.parent.mkdir(parents=True)
    tool.write_text("#!/bin/sh\necho hello from a layer\n")
    tool.chmod(0o755)
    monkeypatch.setenv("CURATION_ENV_DATA", str(tmp_path / "data"))
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / "socket"))
    server.listen()
    mounts = (
        Mount(pool, "/workspace/pool"),
        Mount(single, "/workspace/notes/single.txt"),
        Mount(out, "/data/out", read_only=False),
    )
    workspace = tmp_path / "workspace"
    workspace.mkdir()
    (workspace / "pool").symlink_to(tmp_path)  # planted: must be replaced, never followed
    sandbox = engine(kind, workspace, mounts=mounts, socket=tmp_path / "socket", layers=("tools",), env={"A": "b"})
    with server, sandbox:
        assert text(sandbox, "cat pool/rows notes/single.txt; echo $A; hello") == "rowssingleb\nhello from a layer\n"
        assert sandbox.exec("touch pool/x", timeout=10).exit_code != 0
        assert sandbox.exec("rm pool/rows", timeout=10).exit_code != 0
        assert sandbox.exec("chmod 777 pool; mv pool elsewhere; rmdir pool", timeout=10).exit_code != 0
        text(sandbox, "echo out > /data/out/file")
        assert (out / "file").read_text() == "out\n"
        assert sandbox.read("pool/rows", 10) == b"rows"
        assert sandbox.read("/workspace/notes/single.txt", 10) == b"single"
        assert sandbox.read("/data/out/file", 10) == b"out\n"
        sandbox.write("/data/out/back", b"back")
        assert text(sandbox, "cat /data/out/back") == "back"
        with pytest.raises(PermissionError):
            sandbox.write("pool/rows", b"forged")
        client = "import os, socket; s = socket.socket(1); s.connect(os.environ['CURATION_SOCKET'])"
        client += "; s.sendall(b'hello'); print(s.recv(9))"
        process = sandbox.popen(["python", "-c", client])
        connection, _ = server.accept()
        with connection:
            assert connection.recv(10) == b"hello"
            connection.sendall(b"back")
        assert process.wait(10) == 0
        digest = sandbox.snapshot(tmp_path / "snapshot", max_mb=10)
        assert digest
        assert not (tmp_path / "snapshot/pool").exists()
        sandbox.restore(tmp_path / "snapshot")
        assert text(sandbox, "cat pool/rows") == "rows"
    assert (pool / "rows").read_text() == "rows"
    assert pool.stat().st_mode & 0o777 == 0o755


def test_missing_parts_are_named(kind: str, tmp_path: Path) -> None:
    for config in (
        {"mounts": (Mount(tmp_path / "absent", "/workspace/pool"),)},
        {"socket": tmp_path / "absent"},
        {"layers": ("absent",)},
    ):
        sandbox = engine(kind, tmp_path / "workspace", **config)
        with pytest.raises(FileNotFoundError, match="absent"):
            sandbox.start()
        assert not sandbox.alive()
        sandbox.stop()


def test_a_dead_sandbox_is_noticed_and_starts_again(kind: str, tmp_path: Path, nap: str) -> None:
    sandbox = engine(kind, tmp_path / "workspace")
    with pytest.raises(SandboxDied):
        sandbox.exec("true", timeout=5)
    sandbox.start()
    sandbox.start()
    text(sandbox, "echo kept > file")
    process = sandbox.popen(f"sleep {nap}")
    assert until(lambda: len(host_processes(nap)) == 1)
    first = _first_process(host_processes(nap)[0])
    os.kill(first, 9)
    with pytest.raises(SandboxDied):
        process.wait(10)
    assert not sandbox.alive()
    with pytest.raises(SandboxDied):
        sandbox.exec("true", timeout=5)
    assert sandbox.read("file", 10) == b"kept\n"
    sandbox.start()
    assert text(sandbox, "cat file") == "kept\n"
    assert not host_processes(nap)
    sandbox.stop()
    sandbox.stop()
    assert not sandbox.alive()


def test_a_watch_that_fails_ends_the_sandbox(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nap: str, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("planted")

    with engine(kind, tmp_path / "workspace") as sandbox:
        process = sandbox.popen(f"setsid sleep {nap} & sleep {nap}")
        assert until(lambda: len(host_processes(nap)) == 2)
        with monkeypatch.context() as patch:
            patch.setattr("curation_env.sandbox.files.usage", broken)
            with pytest.raises(SandboxDied):
                process.wait(10)
            assert not sandbox.alive()
            assert "planted" in caplog.text
            with pytest.raises(SandboxDied):
                sandbox.exec("true", timeout=5)
            with pytest.raises(RuntimeError, match="planted"):
                sandbox.start()
            assert not sandbox.alive()
        assert until(lambda: not host_processes(nap))
        sandbox.start()
        assert text(sandbox, "echo on") == "on\n"


def test_stop_leaves_nothing(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nap: str) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "t"))
    (tmp_path / "t").mkdir()
    before = _leavings(tmp_path)
    sandbox = engine(kind, tmp_path / "workspace")
    with sandbox:
        state = sandbox._state.name  # type: ignore[attr-defined]
        sandbox.popen(f"setsid sleep {nap}")
        sandbox.exec(f"(setsid sleep {nap} &)", timeout=5)
        assert _leavings(tmp_path) != before
    assert not host_processes(nap)
    assert [path.name for path in (tmp_path / "t").rglob("*") if not path.name.startswith("curation-")] == ["lock"]
    assert not list(Path("/sys/fs/cgroup").rglob(state))
    assert _leavings(tmp_path) == before
    assert sorted(os.listdir(tmp_path)) == ["t", "workspace"]


def _leavings(folder: Path) -> dict[str, int]:
    """What a sandbox of this process over `folder` may leave on this machine."""
    gc.collect()  # a closed client of Docker's holds its descriptors in reference cycles
    found = {
        "mounts": Path("/proc/self/mounts").read_text().count(str(folder)),
        # The least of several counts: the watches of other sandboxes open something now and then.
        "descriptors": min(len(os.listdir("/proc/self/fd")) for _ in range(10) if time.sleep(0.01) is None),
        "threads": threading.active_count(),
        "containers": 0,
    }
    if docker_problem() == "":
        client = connect()
        for container in client.containers.list(all=True, sparse=True):
            found["containers"] += container.attrs["Labels"].get(STATE_LABEL, "").startswith(str(folder))
        client.close()
    return found


def _first_process(pid: int) -> int:
    """The outermost process of the sandbox that `pid` is in."""
    namespace = os.readlink(f"/proc/{pid}/ns/pid")
    while True:
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        parent = int(stat[1])
        if os.readlink(f"/proc/{parent}/ns/pid") != namespace:
            return pid
        pid = parent
