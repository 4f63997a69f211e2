"""A host whose calls block: as many threads as calls at a time."""

import queue
import threading
import traceback
from typing import Any

from node_agent.worker.base import Emit, InvocationError, Request
from node_agent.worker.frames import FrameError, NotJsonError


class ThreadedHost:
    """Takes calls from a queue, each on a thread of its own; override `call` and `interrupt`.

    Args:
        slots: Calls at a time.
        emit: Sends a frame.

    Attributes:
        stack_bytes: Stack of each thread: little, for most wait only, and address space is limited.
    """

    stack_bytes = 512 * 1024

    def __init__(self, *, slots: int, emit: Emit) -> None:
        self.slots = slots
        self.emit = emit
        self._requests: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._known: dict[str, Request] = {}

    def call(self, request: Request, slot: int) -> Any:
        """Run one call and return its output.

        Args:
            request: The call.
            slot: Which thread this is, from 0.

        Raises:
            InvocationError: It failed.
        """
        raise InvocationError("internal", f"{type(self).__name__} runs nothing")

    def interrupt(self, request: Request) -> None:
        """End a running call, whose event is set; called by the reader thread, never blocks."""

    def submit(self, request: Request) -> None:
        """Take an invocation."""
        self._known[request.id] = request
        self._requests.put(request)

    def cancel(self, request_id: str) -> None:
        """End a waiting or running invocation."""
        request = self._known.get(request_id)
        if request is not None:
            request.cancelled.set()
            self.interrupt(request)

    def close(self) -> None:
        """End ``serve`` after what is running."""
        for _ in range(self.slots):
            self._requests.put(None)

    def serve(self) -> None:
        """Run invocations until ``close``."""
        threading.stack_size(self.stack_bytes)
        others = [
            threading.Thread(target=self._serve, args=(slot,), daemon=True)
            for slot in range(1, self.slots)
        ]
        for thread in others:
            thread.start()
        self._serve(0)
        for thread in others:
            thread.join()

    def _serve(self, slot: int) -> None:
        while (request := self._requests.get()) is not None:
            try:
                if request.cancelled.is_set():
                    self.emit(self._failure(request, InvocationError("cancelled", "")))
                else:
                    self._answer(request, slot)
            except OSError:  # the agent is gone; the reader thread ends the process
                return
            finally:
                self._known.pop(request.id, None)

    def _answer(self, request: Request, slot: int) -> None:
        try:
            frame = {"t": "final", "id": request.id, "output": self.call(request, slot)}
        except InvocationError as exc:
            frame = self._failure(request, exc)
        except (NotJsonError, FrameError) as exc:
            frame = self._failure(
                request, InvocationError("execution_failed", f"its output is not JSON: {exc}")
            )
        except Exception as exc:  # noqa: BLE001 - supervision boundary: one call, not the instance
            traceback.print_exception(exc)
            message = f"{type(exc).__name__}: {exc}"
            frame = self._failure(request, InvocationError("execution_failed", message))
        self.emit(frame)

    @staticmethod
    def _failure(request: Request, error: InvocationError) -> dict[str, Any]:
        if request.cancelled.is_set():  # however it ended, this is why
            error = InvocationError("cancelled", "cancelled before it ended")
        return error.frame(request)
