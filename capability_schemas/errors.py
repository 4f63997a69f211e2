"""The one error tree of the mesh, grouped by what the reader should do about it.

::

    FoamError
    ├── ConfigurationError    mend the settings                      internal
    ├── ProtocolError         mend the sender                        invalid_task
    │   ├── InvalidTopic
    │   ├── MalformedPayload
    │   ├── InvalidTask
    │   ├── TooLarge                                                 too_large
    │   └── BadSignature                                             unauthorized
    ├── AccessDenied          mend the rights                        unauthorized
    │   ├── PolicyDenied                                             policy_denied
    │   └── Repeated          nothing: it was obeyed already
    ├── NotFound              ask for something that exists          no_capable_node
    │   └── NoCapableNode
    ├── Unavailable           wait, then retry                       internal
    │   ├── BrokerUnavailable
    │   └── NodeLost                                                 node_lost
    ├── Overloaded            retry after ``retry_after_ms``         overloaded
    ├── DeadlineExceeded      give it more time                      deadline_exceeded
    ├── ExecutionFailed       mend the function                      execution_failed
    ├── Conflict              the same name stands for two things    invalid_task
    └── TaskCancelled         somebody asked for it                  cancelled

The codes are those of PROTOCOL section 3 and travel in an ``error`` reply event. Cancellation of
a local coroutine is never a ``FoamError``: ``TaskCancelled`` is the recorded outcome of a task.
"""

from enum import StrEnum
from typing import Any, ClassVar


class ErrorCode(StrEnum):
    """Error codes of a reply event (PROTOCOL section 3)."""

    INVALID_TASK = "invalid_task"
    NO_CAPABLE_NODE = "no_capable_node"
    POLICY_DENIED = "policy_denied"
    UNAUTHORIZED = "unauthorized"
    TOO_LARGE = "too_large"
    OVERLOADED = "overloaded"
    DEADLINE_EXCEEDED = "deadline_exceeded"
    CANCELLED = "cancelled"
    NODE_LOST = "node_lost"
    EXECUTION_FAILED = "execution_failed"
    INTERNAL = "internal"


class FoamError(Exception):
    """Root of every error the mesh raises on purpose.

    Args:
        message: What was wrong, where, and what to do, in one or two sentences.
        retryable: Whether the same request may succeed later; the class default when omitted.
        remote: Whether it was reported by a peer rather than found here.
        **detail: Fields for programs: identifiers, sizes, limits. JSON values only.
    """

    code: ClassVar[ErrorCode] = ErrorCode.INTERNAL
    default_retryable: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        retryable: bool | None = None,
        remote: bool = False,
        **detail: Any,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.retryable = self.default_retryable if retryable is None else retryable
        self.remote = remote
        self.detail: dict[str, Any] = detail


class ConfigurationError(FoamError):
    """Settings or files of this process are wrong; nothing on the network will mend it."""


class ProtocolError(FoamError):
    """A frame breaks the wire contract; its sender must be mended."""

    code = ErrorCode.INVALID_TASK


class InvalidTopic(ProtocolError):
    """A topic is not one of the grammar, or belongs to another site."""


class MalformedPayload(ProtocolError):
    """A payload does not decode into the message its topic announces."""


class InvalidTask(ProtocolError):
    """A task is not well formed or its input does not fit the function."""


class TooLarge(ProtocolError):
    """A payload exceeds a size limit.

    Args:
        what: What was too large ("task", "result").
        size_bytes: Its size.
        limit_bytes: The largest size allowed.
    """

    code = ErrorCode.TOO_LARGE

    def __init__(
        self, what: str, *, size_bytes: int, limit_bytes: int, remote: bool = False
    ) -> None:
        super().__init__(
            f"{what} has {size_bytes} bytes, the limit is {limit_bytes}: send less, or a reference",
            remote=remote,
            size_bytes=size_bytes,
            limit_bytes=limit_bytes,
        )


class BadSignature(ProtocolError):
    """A signed message was altered, signed by another key, or not signed at all."""

    code = ErrorCode.UNAUTHORIZED


class AccessDenied(FoamError):
    """The identity is unknown, its secret is wrong, or it may not do this."""

    code = ErrorCode.UNAUTHORIZED


class PolicyDenied(AccessDenied):
    """A node could do it, but no node may under the policy of the task."""

    code = ErrorCode.POLICY_DENIED


class Repeated(AccessDenied):
    """A signed request was seen before: obeyed then, and passed over now."""


class NotFound(FoamError):
    """The thing asked for does not exist."""

    code = ErrorCode.NO_CAPABLE_NODE


class NoCapableNode(NotFound):
    """No admitted, living node offers what the task needs."""


class Unavailable(FoamError):
    """Something needed is not there at the moment."""

    default_retryable = True


class BrokerUnavailable(Unavailable):
    """The connection to the MQTT broker is down or did not answer in time."""


class NodeLost(Unavailable):
    """The node that ran the task disappeared before it finished."""

    code = ErrorCode.NODE_LOST


class Overloaded(FoamError):
    """A bounded queue is full.

    Args:
        message: Which queue, and how full.
        retry_after_ms: When another try is sensible, milliseconds from now.
    """

    code = ErrorCode.OVERLOADED
    default_retryable = True

    def __init__(
        self, message: str, *, retry_after_ms: int = 1000, remote: bool = False, **detail: Any
    ) -> None:
        super().__init__(message, remote=remote, retry_after_ms=retry_after_ms, **detail)
        self.retry_after_ms = retry_after_ms


class DeadlineExceeded(FoamError):
    """The deadline passed before the work was done."""

    code = ErrorCode.DEADLINE_EXCEEDED


class ExecutionFailed(FoamError):
    """The function itself failed; its author decides whether a retry can help."""

    code = ErrorCode.EXECUTION_FAILED


class Conflict(FoamError):
    """Two different things claim the same name, version or lease."""

    code = ErrorCode.INVALID_TASK


class TaskCancelled(FoamError):
    """The task was ended on request."""

    code = ErrorCode.CANCELLED


_BY_CODE: dict[ErrorCode, type[FoamError]] = {
    ErrorCode.INVALID_TASK: InvalidTask,
    ErrorCode.NO_CAPABLE_NODE: NoCapableNode,
    ErrorCode.POLICY_DENIED: PolicyDenied,
    ErrorCode.UNAUTHORIZED: AccessDenied,
    ErrorCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    ErrorCode.CANCELLED: TaskCancelled,
    ErrorCode.NODE_LOST: NodeLost,
    ErrorCode.EXECUTION_FAILED: ExecutionFailed,
}


def error_from_wire(
    code: str, message: str, retryable: bool, detail: dict[str, Any] | None = None
) -> FoamError:
    """Turn the fields of an ``error`` reply event back into an exception.

    Args:
        code: Error code; an unknown one (a newer peer) becomes a plain ``FoamError``.
        message: The sender's text.
        retryable: The sender's verdict.
        detail: The sender's fields.

    Returns:
        The exception, marked ``remote``.
    """
    fields = {
        k: v for k, v in (detail or {}).items() if k not in {"message", "retryable", "remote"}
    }
    if code == ErrorCode.TOO_LARGE and {"size_bytes", "limit_bytes"} <= fields.keys():
        return TooLarge(
            "payload",
            size_bytes=int(fields["size_bytes"]),
            limit_bytes=int(fields["limit_bytes"]),
            remote=True,
        )
    if code == ErrorCode.OVERLOADED:
        after = fields.pop("retry_after_ms", 1000)
        return Overloaded(message, retry_after_ms=int(after), remote=True, **fields)
    known = code in ErrorCode.__members__.values()
    kind = _BY_CODE.get(ErrorCode(code), FoamError) if known else FoamError
    error = kind(message, retryable=retryable, remote=True, **fields)
    if kind is FoamError and known:
        error.code = ErrorCode(code)  # type: ignore[misc]  # one remote code without a class here
    return error
