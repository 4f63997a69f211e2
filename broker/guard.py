"""Starts a foreign program that must not outlive us: ``guard.py PARENT_PID PROGRAM ARG...``.

Asks the kernel to send SIGTERM when the parent dies (``prctl(2)``, PR_SET_PDEATHSIG, which survives
``execve``), then becomes the program: same process id, nothing left in between. Run by path with
the standard library alone. Where there is no ``prctl`` the program simply runs.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    """Become the program named in ``arguments``; returns only when that fails.

    Args:
        arguments: Process id of the parent, path of the program, its arguments.

    Raises:
        OSError: The program cannot be run.
    """
    parent, program = int(arguments[0]), arguments[1]
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:  # it died before we asked
            return
    os.execv(program, arguments[1:])  # noqa: S606 - becoming another program is the purpose


if __name__ == "__main__":
    main(sys.argv[1:])
