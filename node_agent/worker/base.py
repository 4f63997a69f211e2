"""What the process needs of a host, and what a host gets from the process."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from node_agent.worker.frames import Frame

_MESSAGE: Final = 2_000


class InvocationError(Exception):
    """An invocation ended badly in a way its caller should read.

    Args:
        code: Error code of PROTOCOL section 3.
        message: One or two sentences, no traceback.
        detail: Fields for programs, JSON values.
    """

    def __init__(self, code: str, message: str, **detail: Any) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.detail = detail

    def frame(self, request: "Request") -> Frame:
        """Return the frame that ends an invocation with it; a long message is cut."""
        return {
            "t": "error",
            "id": request.id,
            "code": self.code,
            "message": self.message[:_MESSAGE],
            "detail": self.detail,
        }


@dataclass
class Request:
    """One invocation inside the child.

    Attributes:
        id: Chosen by the agent, unique in this process.
        input: The effective input, already checked against the schema by the agent.
        text: The words of the task, or None.
        options: What the invocation asks of a model beyond its prompt.
        deadline: ``time.monotonic()`` seconds at which it is worthless, or None.
        session: Affinity key, or None.
        shown: The beginning of the answer, given by another node: go on behind it.
        cancelled: Set when the agent no longer wants the answer.
    """

    id: str
    input: Any
    text: str | None
    options: dict[str, Any] = field(default_factory=dict)
    deadline: float | None = None
    session: str | None = None
    shown: str | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)

    @classmethod
    def from_frame(cls, frame: Frame) -> "Request":
        """Read an ``invoke`` frame; the time left in it is counted from now."""
        left_ms = frame.get("left_ms")
        return cls(
            id=str(frame["id"]),
            input=frame.get("input"),
            text=frame.get("text"),
            options=frame.get("options") or {},
            deadline=None if left_ms is None else time.monotonic() + left_ms / 1000,
            session=frame.get("session"),
            shown=frame.get("shown"),
        )


Emit = Callable[[Frame], None]
"""Sends one frame to the agent; safe from any thread."""


class Host(Protocol):
    """Runs the invocations of one instance; made by ``__main__`` from the ``load`` frame."""

    def load(self) -> dict[str, Any]:
        """Import the code or load the model; returns what the agent may advertise.

        Raises:
            InvocationError: It cannot be loaded; the message says why and what to do.
        """
        ...

    def submit(self, request: Request) -> None:
        """Take an invocation from the reader thread; never blocks."""
        ...

    def cancel(self, request_id: str) -> None:
        """Ask a running or waiting invocation to end; called by the reader thread."""
        ...

    def serve(self) -> None:
        """Run invocations on the main thread until ``close``."""
        ...

    def close(self) -> None:
        """Make ``serve`` return; called by the reader thread."""
        ...
