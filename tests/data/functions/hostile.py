"""Functions that misbehave in every way, for the tests of isolation."""

import contextlib
import ctypes
import mmap
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from node_agent.functions import function

_ASLEEP = "import sys, time; open(sys.argv[1], 'x').close(); time.sleep(120)"
_IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE)


@function
def forks(folder: str, count: int) -> int:
    """Fork children that stay."""
    for _ in range(count):
        if os.fork() == 0:
            (Path(folder) / str(os.getpid())).touch()
            time.sleep(120)
            os._exit(0)
    return count


@function
def daemons(folder: str, count: int, end: bool) -> int:
    """Leave daemons behind: another session, no parent, no environment, another program."""
    for _ in range(count):
        if os.fork():
            continue
        os.setsid()
        if os.fork():
            os._exit(0)
        mark = Path(folder) / str(os.getpid())
        os.execve(sys.executable, [sys.executable, "-S", "-c", _ASLEEP, str(mark)], {})
    while len(list(Path(folder).iterdir())) < count:
        time.sleep(0.005)
    if end:
        os._exit(3)
    return count


@function
def leaks() -> int:
    """Take memory until there is none."""
    kept = []
    while True:
        kept.append(bytearray(8_000_000))


@function
def floods(stream: int, marker: str) -> None:
    """Write to a standard stream for ever."""
    block = (b"x" * 99 + b"\n") * 5000
    Path(marker).touch()
    while True:
        os.write(stream, block)


@function
def deaf(marker: str) -> None:
    """Ignore signals, cancels and exceptions."""
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    Path(marker).touch()
    while True:
        with contextlib.suppress(BaseException):
            time.sleep(0.01)


@function
def dies(how: str) -> None:
    """End the process."""
    if how == "exit":
        os._exit(7)
    if how == "segv":
        ctypes.string_at(0)
    os.kill(os.getpid(), signal.SIGKILL)


@function
def opens() -> int:
    """Open ten thousand files."""
    return len([Path(os.devnull).open() for _ in range(10_000)])


@function
def fills(path: str) -> int:
    """Write a file of ten megabytes."""
    with Path(path).open("wb", buffering=0) as file:
        return sum(file.write(bytes(1_000_000)) for _ in range(10))


@function
def burns(marker: str) -> None:
    """Use a processor in native code that never looks up."""
    Path(marker).touch()
    re.match(r"(a+)+$", "a" * 64 + "b")


@function
def connects(port: int) -> str:
    """Talk to a server of this machine."""
    with socket.create_connection(("127.0.0.1", port), 5) as connection:
        return connection.recv(10).decode()


@function
def resolves() -> None:
    """Look up a name."""
    socket.getaddrinfo("example.org", 80)


@function
def fetches(port: int) -> None:
    """Use a library that wraps what the system says."""
    urllib.request.urlopen(f"http://127.0.0.1:{port}/")


@function
def families() -> dict[str, str]:
    """Try sockets of all kinds, in a program of its own too."""
    said = {}
    kinds = {"inet": 2, "inet6": 10, "netlink": 16, "packet": 17, "vsock": 40, "unix": 1}
    for name, number in kinds.items():
        try:
            socket.socket(number, socket.SOCK_DGRAM).close()
            said[name] = "open"
        except OSError as exc:
            said[name] = str(exc.errno)
    program = "import socket\ntry: socket.socket()\nexcept OSError as exc: print(exc.errno, end='')"
    done = subprocess.run([sys.executable, "-S", "-c", program], capture_output=True, check=True)
    left, right = socket.socketpair()
    with left, right:
        return {**said, "program": done.stdout.decode()}


@function
def rings() -> list[int]:
    """Try what opens sockets without ``socket``: io_uring and, on x86-64, calls of x32."""
    libc = ctypes.CDLL(None, use_errno=True)
    numbers = []
    for call in (425, 0x40000000 + 41):
        assert libc.syscall(ctypes.c_long(call), 2, 1, 0) == -1
        numbers.append(ctypes.get_errno())
    return numbers


@function
def enters_32_bit() -> int:
    """Make a system call by the door of 32-bit programs (``int 0x80``, getpid)."""
    code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(bytes([0xB8, 20, 0, 0, 0, 0xCD, 0x80, 0xC3]))
    call = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))
    return int(call())


@function
def looks_around() -> dict[str, object]:
    """Tell what it sees."""
    with tempfile.NamedTemporaryFile(delete=False) as file:
        file.write(b"left behind")
    descriptors = [int(path.name) for path in Path("/proc/self/fd").iterdir()]
    program = "import os; print(len(os.listdir('/proc/self/fd')), end='')"
    child = subprocess.run(
        [sys.executable, "-S", "-c", program], capture_output=True, check=True, close_fds=False
    )
    return {
        "environment": dict(os.environ),
        "temporary": file.name,
        "umask": os.umask(0o077),
        "descriptors": descriptors,
        "inherited": int(child.stdout),
        "core": resource.getrlimit(resource.RLIMIT_CORE)[0],
    }


@function
def swarms(folder: str) -> str:
    """Fork until it is not allowed, 200 times at the most."""
    pids = []
    try:
        for _ in range(200):
            pid = os.fork()
            if pid == 0:
                time.sleep(60)
                os._exit(0)
            pids.append(pid)
            (Path(folder) / str(pid)).touch()
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
    return "all of them"


@function
def chatters() -> Iterator[str]:
    """Stream pieces for ever."""
    while True:
        yield "x" * 1000
