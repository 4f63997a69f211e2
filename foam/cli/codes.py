"""Exit codes of the ``foam`` command: one table, for scripts.

Codes from 10 are the error codes of PROTOCOL section 3, so that a script can tell "nobody can do
this" from "too late" without reading words. They stay clear of the shell's own (126 and up) and of
typer's 2 for a wrong command line.
"""

from typing import Final

from capability_schemas.errors import (
    AccessDenied,
    ConfigurationError,
    Conflict,
    ErrorCode,
    FoamError,
    NotFound,
    TaskCancelled,
    Unavailable,
)

__all__ = ["CODES_EPILOG", "EXIT_CANCELLED", "exit_code"]

EXIT_CANCELLED: Final = 130

_BY_CODE: Final[dict[ErrorCode, tuple[int, str]]] = {
    ErrorCode.INTERNAL: (1, "something inside the mesh failed"),
    ErrorCode.INVALID_TASK: (10, "the task is not well formed, or its input does not fit"),
    ErrorCode.NO_CAPABLE_NODE: (11, "nobody can do it"),
    ErrorCode.POLICY_DENIED: (12, "somebody could, the policy forbids it"),
    ErrorCode.UNAUTHORIZED: (13, "wrong name or password, or not allowed"),
    ErrorCode.TOO_LARGE: (14, "a size limit is exceeded"),
    ErrorCode.OVERLOADED: (15, "a queue is full; try again later"),
    ErrorCode.DEADLINE_EXCEEDED: (16, "the time is over"),
    ErrorCode.NODE_LOST: (17, "the node disappeared and nobody could take over"),
    ErrorCode.EXECUTION_FAILED: (18, "the function failed"),
    ErrorCode.CANCELLED: (EXIT_CANCELLED, "cancelled (Ctrl-C)"),
}
_LOCAL: Final[tuple[tuple[type[FoamError], int, str], ...]] = (
    (ConfigurationError, 20, "settings, files or a port are not usable"),
    (Conflict, 21, "it exists already, or already runs"),
    (Unavailable, 22, "the broker, the router or a server does not answer"),
    (NotFound, 23, "there is no such mesh, member or model"),
)
_PREFERS_CODE: Final = (AccessDenied, TaskCancelled)


def exit_code(error: FoamError) -> int:
    """Return the exit code for an error.

    Args:
        error: What ended the command.
    """
    if error.code is ErrorCode.NODE_LOST or error.remote or isinstance(error, _PREFERS_CODE):
        return _BY_CODE[error.code][0]
    for kind, code, _ in _LOCAL:
        if isinstance(error, kind):
            return code
    return _BY_CODE[error.code][0]


def _epilog() -> str:
    rows = [(0, "done"), (2, "wrong command line")]
    rows += list(_BY_CODE.values()) + [(code, words) for _, code, words in _LOCAL]
    listed = " · ".join(f"{code} {words}" for code, words in sorted(rows))
    return f"Exit codes: {listed}"


CODES_EPILOG: Final = _epilog()
