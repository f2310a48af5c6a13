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
import fcntl
import json
import os
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import time

PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 4, 22, 36, 38
SECCOMP_MODE_FILTER = 2
FILTER = "CURATION_SANDBOX_FILTER"
SCRIPT = 3
_libc = ctypes.CDLL(None, use_errno=True)


def children_of(root: int) -> dict[int, tuple[bytes, int]]:
    """State and parent of every living descendant of `root`, by its number, from /proc (zombies are left out: they only
    wait to be reaped)."""
    states: dict[int, tuple[bytes, int]] = {}
    young: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb", buffering=0) as file:
                    state, parent = file.read().rpartition(b")")[2].split()[:2]
            except OSError:
                continue
            if state not in (b"Z", b"X"):
                states[int(name)] = state, int(parent)
                young.setdefault(int(parent), []).append(int(name))
    found: dict[int, tuple[bytes, int]] = {}
    todo = [root]
    while todo:
        children = young.get(todo.pop(), [])
        found.update((pid, states[pid]) for pid in children)
        todo += children
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
                send(pid, signal_number)
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
            answer(fds[0], {"refused": os.strerror(error.errno or 0)})
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
        pause = 0.0002
        while time.monotonic() < end:
            reap()
            if not self.signal_all(signal.SIGSTOP):
                return {"ok": True}
            family = children_of(os.getpid())
            moving = {pid for pid, (state, _) in family.items() if state not in (b"T", b"t")}
            if not moving:
                return {"ok": True}
            # A process in vfork only stops once its child has become a program, so that child may go on for a moment.
            for pid, (_, parent) in family.items():
                if pid not in moving and family.get(parent, (b"", 0))[0] == b"D":
                    send(pid, signal.SIGCONT)
            time.sleep(pause)
            pause = min(2 * pause, 0.002)
        return {"ok": False}

    def do_thaw(self) -> dict:
        self.signal_all(signal.SIGCONT)
        return {"ok": True}

    def signal_all(self, number: int) -> bool:
        """Whether there was anyone. As process 1, to the whole namespace at once: the kernel leaves no gap for a fork,
        and says when nobody is there, which spares a look into /proc."""
        sent = [send(pid, number) for pid in ([-1] if self.is_init else children_of(os.getpid()))]
        return any(sent)


def send(pid: int, number: int) -> bool:
    """A signal; False where there is nobody to take it."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def run(request: dict, fds: list[int]) -> None:
    """The runner: start the command, wait for it or for the host's word to kill it, answer, leave."""
    control, *stdio = take(fds)
    _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.signal(signal.SIGCHLD, nothing)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    try:
        child = start(request, stdio)  # kept: a Popen that goes out of use waits for its process itself
    except (OSError, ValueError) as error:
        answer(control, not_started(error, request, stdio[2]))
        return
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
                    if pid == child.pid:
                        code = os.waitstatus_to_exitcode(status)
                        answer(control, {"exit": code if code >= 0 else 128 - code})
                        return
            except ChildProcessError:
                return
        if control in ready:  # a kill, or the host has closed its end
            answer(control, {"killed": kill_tree(3.0)})
            return


def take(fds: list[int]) -> list[int]:
    """The descriptors of a request, moved out of the way of those that a command has; a script is where it looks."""
    taken = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in fds]
    for fd in fds:
        os.close(fd)
    if len(taken) > 4:
        os.dup2(taken[4], SCRIPT)
        os.close(taken[4])
        taken[4] = SCRIPT
    return taken


def answer(control: int, words: dict) -> None:
    with contextlib.suppress(OSError):
        os.write(control, json.dumps(words).encode() + b"\n")


def start(request: dict, stdio: list[int]) -> subprocess.Popen:
    """Start the command in a session of its own. Its limits and umask are this process' from here on, so that `Popen`
    has nothing left that would take more than vfork and exec: a fork would copy this interpreter's memory."""
    for name, value in request["rlimits"].items():
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value))
    os.umask(0o022)
    return subprocess.Popen(
        request["argv"],
        stdin=stdio[0],
        stdout=stdio[1],
        stderr=stdio[2],
        pass_fds=stdio[3:],
        env=request["env"],
        cwd=request["cwd"],
        start_new_session=True,
    )


def not_started(error: Exception, request: dict, stderr: int) -> dict:
    """The answer for a command that could not be started; its stderr says why."""
    number = getattr(error, "errno", None)
    if number in (errno.EAGAIN, errno.ENOMEM):
        return {"refused": os.strerror(number)}
    where = getattr(error, "filename", None) or request["argv"][0]
    with contextlib.suppress(OSError):
        os.write(stderr, f"sandbox: {where}: {os.strerror(number) if number else error}\n".encode(errors="replace"))
    return {"exit": 127 if number == errno.ENOENT else 126}


def filter_system_calls(program: bytes) -> None:
    """Put a seccomp filter (`struct sock_filter[]`) on this process and all that it starts."""
    if not program:
        return

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))

    given = Program(len(program) // 8, program)
    if _libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(given), 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "the system-call filter was refused")


def nothing(number: int, frame: object) -> None:
    """A signal handler. Unlike an ignored signal, one that is handled has its default effect in a new program."""


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
    ignored = [number for number in signal.valid_signals() if signal.getsignal(number) == signal.SIG_IGN]
    for number in (*ignored, signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, nothing)
    signal.signal(signal.SIGCHLD, lambda *_: reap())
    sock.sendall(b'{"ready": true}\n')
    agent = Agent(sock)
    with contextlib.suppress(OSError):
        agent.serve()
    agent.do_kill_all()


if __name__ == "__main__":
    main()
