"""No network: a filter on system calls that this process and all it starts keep for ever.

Every network connection begins with ``socket(2)``; the filter denies it (``EACCES``) for all
families but ``AF_UNIX``: IPv4 and IPv6, and also packet, netlink, VM and Bluetooth sockets.
``io_uring_setup(2)`` is denied besides, for a ring opens sockets without system calls. Sockets
between processes of this machine stay, for the standard library (``multiprocessing``) lives on
them. A filter sees numbers, not the addresses behind pointers, so that abstract sockets cannot be
told from those in files: both are allowed, and a service of this machine that listens on one is in
reach, a name service among them.

Kernel documentation: userspace-api/seccomp_filter.rst ("checking the arch value is not optional";
x32 calls carry the arch of x86-64 and bit 30), userspace-api/no_new_privs.rst, ``seccomp(2)``.
"""

import ctypes
import errno
import os
import struct
import sys
from pathlib import Path
from typing import Final

_PR_SET_NO_NEW_PRIVS: Final = 38
_SET_MODE_FILTER: Final = 1
_SPEC_ALLOW: Final = 4
"""``SECCOMP_FILTER_FLAG_SPEC_ALLOW``: before Linux 5.16 a filter also turned on a mitigation that
slows native code (models) down, and that has nothing to do with this filter's purpose."""

_ALLOW: Final = 0x7FFF0000
_KILL_PROCESS: Final = 0x80000000
_ERRNO: Final = 0x00050000

_LOAD: Final = 0x20  # BPF_LD | BPF_W | BPF_ABS
_EQUAL: Final = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_AT_LEAST: Final = 0x35  # BPF_JMP | BPF_JGE | BPF_K
_RETURN: Final = 0x06  # BPF_RET | BPF_K

_NUMBER_AT: Final = 0
_ARCH_AT: Final = 4
_FIRST_ARGUMENT_AT: Final = 16  # its low half: both machines are little-endian
_X32_BIT: Final = 0x40000000
_AF_UNIX: Final = 1
_IO_URING_SETUP: Final = 425

_MACHINES: Final = {
    "x86_64": {"arch": 0xC000003E, "socket": 41, "seccomp": 317},
    "aarch64": {"arch": 0xC00000B7, "socket": 198, "seccomp": 277},
}
"""``AUDIT_ARCH_*`` of linux/audit.h and numbers of system calls."""

_ACTIONS: Final = Path("/proc/sys/kernel/seccomp/actions_avail")


def why_not() -> str:
    """Return why this system cannot deny the network; empty when it can."""
    if sys.platform != "linux":
        return f"no seccomp on {sys.platform}"
    machine = os.uname().machine
    if machine not in _MACHINES or struct.calcsize("P") != 8:  # noqa: PLR2004 - bytes of a pointer
        return f"no filter for {8 * struct.calcsize('P')}-bit programs on {machine}"
    try:
        known = _ACTIONS.read_text().split()
    except OSError:
        known = []
    wanted = {"kill_process", "errno", "allow"}
    return "" if wanted <= set(known) else "the kernel has no seccomp filters (CONFIG_SECCOMP)"


def deny_network() -> None:
    """Put the filter on this thread and on all threads and processes it starts from here on.

    Raises:
        OSError: The kernel refuses it.
    """
    machine = _MACHINES[os.uname().machine]
    program = network_filter(machine["arch"], machine["socket"])
    libc = ctypes.CDLL(None, use_errno=True)
    code = ctypes.create_string_buffer(program, len(program))
    # struct sock_fprog: the number of instructions, then, aligned, where they are
    head = struct.pack("HP", len(program) // 8, ctypes.addressof(code))
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.syscall(
        ctypes.c_long(machine["seccomp"]), _SET_MODE_FILTER, _SPEC_ALLOW, head
    ):
        number = ctypes.get_errno()
        raise OSError(number, f"seccomp: {os.strerror(number)}")


def network_filter(arch: int, socket_call: int) -> bytes:
    """Return the program, ``struct sock_filter`` after ``struct sock_filter``.

    Args:
        arch: ``AUDIT_ARCH`` of the machine; programs of another one are killed.
        socket_call: Its number of ``socket(2)``.
    """

    def deny(number: int) -> int:
        return _ERRNO | number

    # jump counts are relative to the next instruction: (operation, if true, if false, operand)
    steps = (
        (_LOAD, 0, 0, _ARCH_AT),
        (_EQUAL, 1, 0, arch),
        (_RETURN, 0, 0, _KILL_PROCESS),
        (_LOAD, 0, 0, _NUMBER_AT),
        (_AT_LEAST, 6, 0, _X32_BIT),
        (_EQUAL, 6, 0, _IO_URING_SETUP),
        (_EQUAL, 1, 0, socket_call),
        (_RETURN, 0, 0, _ALLOW),
        (_LOAD, 0, 0, _FIRST_ARGUMENT_AT),
        (_EQUAL, 3, 0, _AF_UNIX),
        (_RETURN, 0, 0, deny(errno.EACCES)),
        (_RETURN, 0, 0, deny(errno.ENOSYS)),
        (_RETURN, 0, 0, deny(errno.EPERM)),
        (_RETURN, 0, 0, _ALLOW),
    )
    return b"".join(struct.pack("HBBI", *step) for step in steps)
