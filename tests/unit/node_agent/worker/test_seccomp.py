"""The network filter, run by an interpreter of the few instructions it is made of."""

import errno
import os
import struct

import pytest

from node_agent.worker import seccomp

ALLOW = 0x7FFF0000
KILL = 0x80000000
X86_64, I386, AARCH64, ARM = 0xC000003E, 0x40000003, 0xC00000B7, 0x40000028


def decide(program, *, arch, call, first=0):
    """Run classic BPF over ``struct seccomp_data``; returns what the kernel is told."""
    data = struct.pack("<iIQ6Q", call, arch, 0, first, 0, 0, 0, 0, 0)
    accumulator = at = 0
    steps = list(struct.iter_unpack("<HBBI", program))
    while True:
        operation, if_true, if_false, operand = steps[at]
        at += 1
        if operation == 0x20:
            (accumulator,) = struct.unpack_from("<I", data, operand)
        elif operation == 0x15:
            at += if_true if accumulator == operand else if_false
        elif operation == 0x35:
            at += if_true if accumulator >= operand else if_false
        else:
            assert operation == 0x06
            return operand


def denied(number):
    return 0x00050000 | number


@pytest.mark.parametrize(("arch", "other", "call"), [(X86_64, I386, 41), (AARCH64, ARM, 198)])
def test_only_local_sockets_and_no_rings(arch, other, call):
    program = seccomp.network_filter(arch, call)
    assert decide(program, arch=arch, call=call, first=1) == ALLOW
    for family in (0, 2, 10, 16, 17, 40, 2**31):
        assert decide(program, arch=arch, call=call, first=family) == denied(errno.EACCES)
    assert decide(program, arch=arch, call=425) == denied(errno.EPERM)
    assert decide(program, arch=arch, call=0x40000000 + 41, first=2) == denied(errno.ENOSYS)
    assert decide(program, arch=other, call=call, first=1) == KILL
    for harmless in (0, 1, 39, 42, 53, 56, 199, 424, 426, 450):
        assert decide(program, arch=arch, call=harmless, first=2) == ALLOW


@pytest.mark.parametrize(
    ("machine", "pointer", "said"),
    [
        ("riscv64", 8, "no filter for 64-bit programs on riscv64"),
        ("aarch64", 4, "no filter for 32-bit programs on aarch64"),  # a 32-bit system on a Pi
    ],
)
def test_a_machine_without_a_filter_says_so(monkeypatch, machine, pointer, said):
    uname = os.uname_result(("Linux", "n", "6", "v", machine))
    monkeypatch.setattr(os, "uname", lambda: uname)
    monkeypatch.setattr(struct, "calcsize", lambda _: pointer)
    assert seccomp.why_not() == said


def test_a_kernel_without_filters_says_so(monkeypatch, tmp_path):
    uname = os.uname_result(("Linux", "n", "6", "v", "x86_64"))
    monkeypatch.setattr(os, "uname", lambda: uname)
    monkeypatch.setattr(seccomp, "_ACTIONS", tmp_path / "actions_avail")
    assert "no seccomp filters" in seccomp.why_not()
    (tmp_path / "actions_avail").write_text("kill_process kill_thread trap errno trace log allow\n")
    assert seccomp.why_not() == ""
