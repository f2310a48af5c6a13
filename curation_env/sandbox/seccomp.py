"""The system-call filter that the agent puts on itself and so on every command, in each engine.

Calls that reach kernel parts which namespaces don't separate (keyrings, BPF, performance counters, io_uring, mounts,
modules) fail with EPERM, and so do sockets of families other than Unix, IP and netlink (a VM's vsock would otherwise be
a way out of a sandbox without network). Reserving disk without writing to it fails as on a file system that can't
(programs then write zeros): the watch over the workspace tells by what was written who used the disk up.
"""

from __future__ import annotations

import errno
import platform
import struct

# name: (x86_64, aarch64)
_DENIED = {
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "setns": (308, 268),
    "unshare": (272, 97),
    "open_by_handle_at": (304, 265),
    "name_to_handle_at": (303, 264),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "acct": (163, 89),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "reboot": (169, 142),
    "syslog": (103, 116),
    "quotactl": (179, 60),
}
_UNSUPPORTED = {"fallocate": (285, 47)}
_SOCKET = (41, 198)
_FAMILIES = (1, 2, 10, 16)  # AF_UNIX, AF_INET, AF_INET6, AF_NETLINK
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, AUDIT_ARCH
_X32 = 0x40000000

_LOAD, _JEQ, _JGE, _RET = 0x20, 0x15, 0x35, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_NUMBER, _ARCH, _ARG0 = 0, 4, 16  # offsets in struct seccomp_data


def program() -> bytes:
    """The filter as `struct sock_filter[]`; empty on a processor that the table above doesn't list."""
    if platform.machine() not in _MACHINES:
        return b""
    column, arch = _MACHINES[platform.machine()]
    deny = _ERRNO | errno.EPERM
    code: list[tuple[int, int, int, int]] = [
        (_LOAD, 0, 0, _ARCH),
        (_JEQ, 1, 0, arch),
        (_RET, 0, 0, _ERRNO | errno.ENOSYS),  # calls of another architecture have other numbers
        (_LOAD, 0, 0, _NUMBER),
        (_JGE, 0, 1, _X32),
        (_RET, 0, 0, _ERRNO | errno.ENOSYS),
    ]
    for numbers in _DENIED.values():
        code += [(_JEQ, 0, 1, numbers[column]), (_RET, 0, 0, deny)]
    for numbers in _UNSUPPORTED.values():
        code += [(_JEQ, 0, 1, numbers[column]), (_RET, 0, 0, _ERRNO | errno.EOPNOTSUPP)]
    code += [(_JEQ, 1, 0, _SOCKET[column]), (_RET, 0, 0, _ALLOW), (_LOAD, 0, 0, _ARG0)]
    for family in _FAMILIES:
        code += [(_JEQ, 0, 1, family), (_RET, 0, 0, _ALLOW)]
    code.append((_RET, 0, 0, deny))
    return b"".join(struct.pack("=HBBI", *line) for line in code)
