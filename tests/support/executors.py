"""An executor whose work is done when the test says so."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any


class SteppedExecutor(Executor):
    """Keeps what is submitted until ``step``; runs it on the caller's thread then."""

    def __init__(self) -> None:
        self.waiting: deque[tuple[Future[Any], Callable[[], Any]]] = deque()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.waiting.append((future, lambda: fn(*args, **kwargs)))
        return future

    def step(self) -> bool:
        """Do the oldest piece of work; tell whether there was one."""
        if not self.waiting:
            return False
        future, work = self.waiting.popleft()
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(work())
            except Exception as error:  # noqa: BLE001 - what a worker would put there
                future.set_exception(error)
        return True
