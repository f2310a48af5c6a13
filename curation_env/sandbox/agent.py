"""The first process of a sandbox: starts commands for the host, reaps orphans, kills on request.

It runs INSIDE, alone with the standard library (CPython 3.9 or newer). The host connects one stream socket. A request
is a 4-byte length, a JSON object and, for `spawn`, file descriptors: a control socket, stdin, stdout, stderr and, for a
long command string, a file that holds it. Every command gets a runner: a fork of this process that is the subreaper of
all the command's descendants, so that none escapes its kill. The runner answers on the control socket: one JSON line.

Nothing here is trusted by the host: its answers are bounded and only ever describe the commands themselves.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
import time

PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 4, 22, 36, 38
SECCOMP_MODE_FILTER = 2
FILTER = "CURATION_SANDBOX_FILTER"
_libc = ctypes.CDLL(None, use_errno=True)


def children_of(root: int) -> list[int]:
    """Every living descendant of `root`, from /proc (zombies are left out: they only wait to be reaped)."""
    parents: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    state, parent = file.read().rpartition(b")")[2].split()[:2]
            except OSError:
                continue
            if state not in (b"Z", b"X"):
                parents.setdefault(int(parent), []).append(int(name))
    found, todo = [], [root]
    while todo:
        young = parents.get(todo.pop(), [])
        found += young
        todo += young
    return found


def reap() -> bool:
    """Collect the dead. False when there are no children at all any more."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True


def kill_tree(seconds: float) -> bool:
    """Kill every descendant of this process until none is left: orphans come to this process, so none escapes."""
    end = time.monotonic() + seconds
    while reap():
        if time.monotonic() > end:
            return False
        # Stopping first keeps a fork bomb from outrunning the kill.
        for signal_number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in children_of(os.getpid()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal_number)
        time.sleep(0.002)
    return True


class Agent:
    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.is_init = os.getpid() == 1

    def serve(self) -> None:
        while True:
            header, fds, _, _ = socket.recv_fds(self.sock, 4, 8)
            while header and len(header) < 4:
                header += self.sock.recv(4 - len(header))
            if not header:
                return
            (length,) = struct.unpack("!I", header)
            body = b""
            while len(body) < length:
                piece = self.sock.recv(min(length - len(body), 1 << 20))
                if not piece:
                    return
                body += piece
            request = json.loads(body)
            if request["op"] == "spawn":
                self.spawn(request, fds)
            else:
                self.sock.sendall((json.dumps(getattr(self, "do_" + request["op"])()) + "\n").encode())
            for fd in fds:
                os.close(fd)

    def spawn(self, request: dict, fds: list[int]) -> None:
        try:
            pid = os.fork()
        except OSError as error:
            os.write(fds[0], json.dumps({"refused": os.strerror(error.errno or 0)}).encode() + b"\n")
            return
        if pid == 0:
            try:
                self.sock.close()
                run(request, fds)
            finally:
                os._exit(0)

    def do_ping(self) -> dict:
        return {"ok": True}

    def do_kill_all(self) -> dict:
        if not self.is_init:
            return {"ok": kill_tree(5.0)}
        end = time.monotonic() + 5.0
        while reap() and time.monotonic() < end:
            self.signal_all(signal.SIGKILL)
            time.sleep(0.001)
        return {"ok": not reap()}

    def do_freeze(self) -> dict:
        end = time.monotonic() + 5.0
        while time.monotonic() < end:
            self.signal_all(signal.SIGSTOP)
            if all(stopped(pid) for pid in children_of(os.getpid())):
                return {"ok": True}
            time.sleep(0.002)
        return {"ok": False}

    def do_thaw(self) -> dict:
        self.signal_all(signal.SIGCONT)
        return {"ok": True}

    def signal_all(self, number: int) -> None:
        """As process 1, to the whole namespace at once: the kernel leaves no gap for a fork."""
        for pid in [-1] if self.is_init else children_of(os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


def stopped(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] in (b"T", b"t", b"Z", b"X")
    except OSError:
        return True


def run(request: dict, fds: list[int]) -> None:
    """The runner: start the command, wait for it or for the host's word to kill it, answer, leave."""
    control, stdio = fds[0], fds[1:]
    _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    try:
        child = os.fork()
    except OSError as error:
        os.write(control, json.dumps({"refused": os.strerror(error.errno or 0)}).encode() + b"\n")
        return
    if child == 0:
        try:
            execute(request, stdio)
        finally:
            os._exit(126)
    for fd in stdio:
        os.close(fd)
    while True:
        ready, _, _ = select.select([control, wake_read], [], [])
        if wake_read in ready:
            os.read(wake_read, 4096)
            try:
                while True:
                    pid, status = os.waitpid(-1, os.WNOHANG)
                    if pid == 0:
                        break
                    if pid == child:
                        code = os.waitstatus_to_exitcode(status)
                        os.write(control, json.dumps({"exit": code if code >= 0 else 128 - code}).encode() + b"\n")
                        return
            except ChildProcessError:
                return
        if control in ready:  # a kill, or the host has closed its end
            done = kill_tree(3.0)
            with contextlib.suppress(OSError):
                os.write(control, json.dumps({"killed": done}).encode() + b"\n")
            return


def execute(request: dict, stdio: list[int]) -> None:
    """In the child: take up stdio, limits and folder, and become the command."""
    signal.set_wakeup_fd(-1)
    os.setsid()
    for target, fd in enumerate(stdio):  # above the targets first, so that no copy overwrites a later source
        stdio[target] = os.dup(fd) if fd > 9 else fcntl_dup(fd)
    for target, fd in enumerate(stdio):
        os.dup2(fd, target, inheritable=True)
    os.closerange(len(stdio), 4096)
    for number in range(1, signal.NSIG):
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            with contextlib.suppress(OSError, ValueError):
                signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    try:
        for name, value in request["rlimits"].items():
            resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value))
        os.umask(0o022)
        os.chdir(request["cwd"])
        os.execvpe(request["argv"][0], request["argv"], request["env"])
    except OSError as error:
        where = error.filename if error.filename is not None else request["argv"][0]
        os.write(2, f"sandbox: {where}: {os.strerror(error.errno or 0)}\n".encode())
        os._exit(127 if error.errno == errno.ENOENT else 126)


def filter_system_calls(program: bytes) -> None:
    """Put a seccomp filter (`struct sock_filter[]`) on this process and all that it starts."""
    if not program:
        return

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))

    given = Program(len(program) // 8, program)
    if _libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(given), 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "the system-call filter was refused")


def fcntl_dup(fd: int) -> int:
    import fcntl

    return fcntl.fcntl(fd, fcntl.F_DUPFD, 10)


def main() -> None:
    where = sys.argv[1]
    if where.isdigit():
        sock = socket.socket(fileno=int(where))
    else:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(where)
    # Nothing inside may trace this process or open its descriptors, nor gain privileges.
    _libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    _libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    filter_system_calls(bytes.fromhex(os.environ.pop(FILTER, "")))
    if os.getpid() != 1:
        _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, lambda *_: reap())
    sock.sendall(b'{"ready": true}\n')
    agent = Agent(sock)
    with contextlib.suppress(OSError):
        agent.serve()
    agent.do_kill_all()


if __name__ == "__main__":
    main()
