"""What the end of an attempt says: about the node, and to a client nobody else can help. Pure."""

from collections.abc import Sequence
from typing import Final

from capability_schemas.errors import (
    ErrorCode,
    FoamError,
    NoCapableNode,
    Overloaded,
    error_from_wire,
)
from capability_schemas.invocation import Report
from router.events import Observed, Verdict

_OF_THE_NODE: Final = frozenset(
    {
        ErrorCode.EXECUTION_FAILED,
        ErrorCode.INTERNAL,
        ErrorCode.NODE_LOST,
        ErrorCode.NO_CAPABLE_NODE,
        ErrorCode.DEADLINE_EXCEEDED,
    }
)
"""Codes of a reported failure that speak against the node. The last two are about its memory and
the time limit of its function."""

_POINTLESS: Final = frozenset(
    {
        ErrorCode.INVALID_TASK,
        ErrorCode.POLICY_DENIED,
        ErrorCode.UNAUTHORIZED,
        ErrorCode.TOO_LARGE,
        ErrorCode.DEADLINE_EXCEEDED,
        ErrorCode.CANCELLED,
    }
)
"""Codes of a failure after which it makes no sense to send the same task again."""

_REASON_CHARACTERS: Final = 1_000
"""A report may be as large as a result, but not its reason."""


def verdict_on_end(event: Observed) -> Verdict | None:
    """Return what a final event of a node says about it; None when nothing.

    A deadline or an input that does not fit is the client's choice.
    """
    if event.event == "result":
        return "good"
    return "failed" if event.code in {ErrorCode.EXECUTION_FAILED, ErrorCode.INTERNAL} else None


def verdict_on_failure(report: Report, *, stopped: bool) -> Verdict | None:
    """Return what a report ``failed`` says about the node; None when nothing.

    Args:
        report: The report.
        stopped: Whether the router had told the node to stop.
    """
    if report.code == ErrorCode.OVERLOADED:
        return "refused"
    against = report.code is None or report.code in _OF_THE_NODE
    return "failed" if against and not stopped else None


def is_want_of_room(report: Report) -> bool:
    """Tell whether a node refuses a task because it is full: that says nothing against it."""
    return report.status == "refused" and report.code == ErrorCode.OVERLOADED


def problem_of(report: Report) -> FoamError:
    """Turn a refusal or failure into the error a client would get if nobody else could help."""
    message = f"node {report.node}: {report.reason[:_REASON_CHARACTERS] or report.status}"
    default = ErrorCode.OVERLOADED if report.status == "refused" else ErrorCode.EXECUTION_FAILED
    detail: dict[str, object] = {"node": report.node}
    if report.retry_after_ms is not None:
        detail["retry_after_ms"] = report.retry_after_ms
    retryable = report.status == "refused" or report.code not in _POINTLESS
    return error_from_wire(report.code or default.value, message, retryable, detail)


def exhausted(problems: Sequence[FoamError]) -> FoamError:
    """Return the one error that tells the client most about why nobody was left.

    Args:
        problems: What became of the attempts, in order.
    """
    if not problems:
        return NoCapableNode("no candidate was left to try", retryable=True)
    overloads = [error for error in problems if isinstance(error, Overloaded)]
    if overloads:
        return Overloaded(
            f"nobody took the task, {len(problems)} tried; the last one: {problems[-1].message}",
            retry_after_ms=min(error.retry_after_ms for error in overloads),
            tried=len(problems),
        )
    return problems[-1]
