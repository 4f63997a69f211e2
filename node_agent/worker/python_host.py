"""Runs user functions: plain, async, generators and async generators.

Plain functions and generators run one at a time on the main thread (their signal handlers and
libraries expect it); more at a time means more processes, which is the pool's business. Async
ones share one event loop, up to the function's concurrency.
"""

import asyncio
import importlib
import importlib.util
import inspect
import queue
import sys
import traceback
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from node_agent.functions import Answer, InvocationContext
from node_agent.worker.base import Emit, InvocationError, Request
from node_agent.worker.frames import FrameError, NotJsonError

_PLAIN: Final = {str, int, float, bool, type(None), Any, dict, list, inspect.Parameter.empty}
_SPECIAL: Final = ("context", "text")


def load_entry(entry: str) -> tuple[types.ModuleType, Any]:
    """Import ``module:attribute`` or ``path/to/file.py:attribute``.

    The folder of a file goes onto the import path, so that it may import its neighbours.

    Raises:
        InvocationError: The file, the module or the attribute does not exist.
    """
    where, _, attribute = entry.rpartition(":")
    if not where or not attribute:
        raise InvocationError(
            "internal", f"entry {entry!r}: write module:function or file.py:function"
        )
    module = import_target(where)
    return module, find_function(module, where, attribute)


def find_function(module: types.ModuleType, where: str, attribute: str) -> Any:
    """Return a function of a module by name, dots within it allowed.

    Raises:
        InvocationError: There is none.
    """
    found: Any = module
    for part in attribute.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise InvocationError("internal", f"{where} has no function {attribute!r}")
    return found


def import_target(target: str) -> types.ModuleType:
    """Import a module by dotted name, or a ``.py`` file by path.

    Raises:
        InvocationError: There is no such file or module. Errors of the code itself pass through.
    """
    if not target.endswith(".py"):
        try:
            return importlib.import_module(target)
        except ModuleNotFoundError as exc:
            if exc.name is not None and (target == exc.name or target.startswith(exc.name + ".")):
                raise InvocationError("internal", f"module {target!r} is not installed") from exc
            raise
    path = Path(target).resolve()
    if not path.is_file():
        raise InvocationError("internal", f"file {target} does not exist")
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise InvocationError("internal", f"file {target} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses and pickling look their module up
    spec.loader.exec_module(module)
    return module


def is_plain(annotation: Any) -> bool:
    """Tell whether JSON values already are values of a type, so that nothing needs converting."""
    if isinstance(annotation, type) and annotation in _PLAIN:
        return True
    if annotation is Any or annotation is inspect.Parameter.empty:
        return True
    origin = typing.get_origin(annotation)
    if origin is typing.Literal:
        return True
    if origin in (list, dict, typing.Union, types.UnionType):
        return all(is_plain(argument) for argument in typing.get_args(annotation))
    return False


class Signature:
    """Turns the effective input of a task into keyword arguments of a function.

    Args:
        target: The function.
    """

    def __init__(self, target: Callable[..., Any]) -> None:
        parameters = inspect.signature(target).parameters
        kinds = {parameter.kind for parameter in parameters.values()}
        self._open = inspect.Parameter.VAR_KEYWORD in kinds
        self._names = tuple(
            name
            for name, parameter in parameters.items()
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        )
        hints = typing.get_type_hints(target)
        self._converters: dict[str, Callable[[Any], Any]] = {}
        for name in self._names:
            annotation = hints.get(name, Any)
            if name != "context" and not is_plain(annotation):
                from pydantic import TypeAdapter  # noqa: PLC0415 - costs 60 ms, few need it

                self._converters[name] = TypeAdapter(annotation).validate_python

    def arguments(self, request: Request) -> dict[str, Any]:
        """Return the keyword arguments of one call.

        Raises:
            InvocationError: ``invalid_task``: the input does not fit the parameters.
        """
        given = self._given(request)
        if "text" in self._names and "text" not in given and request.text is not None:
            given["text"] = request.text
        if not self._open:
            unknown = sorted(given.keys() - set(self._names))
            if unknown:
                raise InvocationError(
                    "invalid_task", f"input has no parameter for {', '.join(unknown)}"
                )
        for name, convert in self._converters.items():
            if name in given:
                try:
                    given[name] = convert(given[name])
                except ValueError as exc:
                    raise InvocationError(
                        "invalid_task", f"input.{name}: {exc}", field=name
                    ) from exc
        if "context" in self._names:
            given["context"] = InvocationContext(request.deadline, request.cancelled)
        return given

    def _given(self, request: Request) -> dict[str, Any]:
        if request.input is None:
            return {}
        if isinstance(request.input, dict):
            known = set(self._names)
            # A task in words for a function that does not ask for them: the words chose it, no
            # more.
            return {
                name: value
                for name, value in request.input.items()
                if self._open or name in known or name != "text"
            }
        wanted = [name for name in self._names if name not in _SPECIAL]
        if len(wanted) == 1:
            return {wanted[0]: request.input}
        raise InvocationError(
            "invalid_task", "input must be an object with the function's parameters"
        )


class Pieces:
    """What a generator has yielded so far, and the output that follows from it."""

    def __init__(self, request: Request, emit: Emit) -> None:
        self._request = request
        self._emit = emit
        self._yielded: list[Any] = []
        self._answer: Answer[Any] | None = None

    def add(self, value: Any) -> None:
        """Send one yielded value, a chunk of its own or part of one; keep an `Answer` for the end.

        Raises:
            InvocationError: The `Answer` was not the last.
        """
        if self._answer is not None:
            raise InvocationError("execution_failed", "it yielded more after its Answer")
        if isinstance(value, Answer):
            self._answer = value
            return
        self._emit({"t": "piece", "id": self._request.id, "d": value})
        self._yielded.append(value)

    def output(self, returned: Any) -> Any:
        """Return the final output: the return value, else the joined text, else the list.

        That of an `Answer` without one likewise, with its confidence.
        """
        answer = returned if isinstance(returned, Answer) else self._answer
        if answer is not None and answer.output is None:
            return Answer(self._whole(), answer.confidence)
        if returned is not None:
            return returned
        return self._whole() if answer is None else answer

    def _whole(self) -> Any:
        if all(isinstance(value, str) for value in self._yielded):
            return "".join(self._yielded)
        return self._yielded


def final_frame(request: Request, output: Any) -> dict[str, Any]:
    """Return the frame that ends a call."""
    frame: dict[str, Any] = {"t": "final", "id": request.id}
    if not isinstance(output, Answer):
        return {**frame, "output": output}
    return {**frame, "output": output.output, "confidence": float(output.confidence)}


def _cancelled_early() -> InvocationError:
    return InvocationError("cancelled", "cancelled before it ran")


class PythonHost:
    """Host of one Python function.

    Args:
        entry: ``module:function`` or ``file.py:function``.
        concurrency: Invocations at a time, used by async functions only.
        emit: Sends a frame.
        explain: Says which limit of the process is behind an error (`Confinement.explain`).
    """

    def __init__(
        self,
        *,
        entry: str,
        concurrency: int,
        emit: Emit,
        explain: Callable[[BaseException], dict[str, str]],
    ) -> None:
        self._explain = explain
        self._entry = entry
        self._concurrency = concurrency
        self._emit = emit
        self._requests: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._known: dict[str, Request] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    def load(self) -> dict[str, Any]:
        """Import the function; returns ``{"slots": invocations at a time, "kind": ...}``."""
        _, self._target = load_entry(self._entry)
        self._signature = Signature(self._target)
        self._is_async = inspect.iscoroutinefunction(self._target) or inspect.isasyncgenfunction(
            self._target
        )
        return {"slots": self._concurrency if self._is_async else 1, "async": self._is_async}

    def submit(self, request: Request) -> None:
        """Take an invocation."""
        self._known[request.id] = request
        self._requests.put(request)
        self._wake()

    def cancel(self, request_id: str) -> None:
        """Set the request's event, and cancel the task of an async function."""
        request = self._known.get(request_id)
        if request is None:
            return
        request.cancelled.set()
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._cancel_task, request_id)

    def close(self) -> None:
        """End ``serve`` after what is running."""
        self._requests.put(None)
        self._wake()

    def serve(self) -> None:
        """Run invocations on this thread until ``close``."""
        if self._is_async:
            asyncio.run(self._serve_async())
            return
        while (request := self._requests.get()) is not None:
            self._finish(request)

    def _call(self, request: Request) -> Any:
        if request.cancelled.is_set():
            raise _cancelled_early()
        result = self._target(**self._signature.arguments(request))
        if not inspect.isgenerator(result):
            return result
        pieces = Pieces(request, self._emit)
        while True:
            if request.cancelled.is_set():
                result.close()
                raise InvocationError("cancelled", "cancelled while it ran")
            try:
                value = next(result)
            except StopIteration as stop:
                return pieces.output(stop.value)
            pieces.add(value)

    def _finish(self, request: Request) -> None:
        try:
            self._emit(final_frame(request, self._call(request)))
        # Supervision boundary: whatever user code raises, SystemExit too, ends its task only.
        except BaseException as exc:  # noqa: BLE001
            self._report(request, exc)
        finally:
            self._known.pop(request.id, None)

    def _report(self, request: Request, exc: BaseException) -> None:
        if isinstance(exc, OSError) and isinstance(exc, BrokenPipeError):
            raise exc
        if isinstance(exc, NotJsonError | FrameError):
            exc = InvocationError("execution_failed", f"the function's output is not JSON: {exc}")
        if not isinstance(exc, InvocationError):
            traceback.print_exception(exc)  # to the log; the wire gets type and message only
            kind = type(exc).__name__
            message = f"{kind}: {exc}" if str(exc) else kind
            detail = {"type": kind, **self._explain(exc)}
            if hint := detail.pop("hint", ""):
                message = f"{message[:1800]} ({hint})"
            exc = InvocationError("execution_failed", message, **detail)
        self._emit(exc.frame(request))

    # ---- async functions: everything below runs on the loop of serve()

    def _wake(self) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._arrived.set)

    def _cancel_task(self, request_id: str) -> None:
        task = self._tasks.get(request_id)
        if task is not None:
            task.cancel()

    async def _serve_async(self) -> None:
        self._arrived = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._arrived.set()  # what arrived before the loop ran
        async with asyncio.TaskGroup() as group:
            while True:
                await self._arrived.wait()
                self._arrived.clear()
                while not self._requests.empty():
                    request = self._requests.get()
                    if request is None:
                        return
                    self._tasks[request.id] = group.create_task(
                        self._run_async(request), name=f"node_agent.PythonHost[{request.id}].run"
                    )

    async def _run_async(self, request: Request) -> None:
        try:
            self._emit(final_frame(request, await self._call_async(request)))
        except asyncio.CancelledError:
            # The end of this task by the agent's cancel frame, not of the loop: it is the outcome.
            self._report(request, InvocationError("cancelled", "cancelled while it ran"))
        # Supervision boundary: whatever user code raises, SystemExit too, ends its task only.
        except BaseException as exc:  # noqa: BLE001
            self._report(request, exc)
        finally:
            self._known.pop(request.id, None)
            self._tasks.pop(request.id, None)

    async def _call_async(self, request: Request) -> Any:
        if request.cancelled.is_set():
            raise _cancelled_early()
        result = self._target(**self._signature.arguments(request))
        if not inspect.isasyncgen(result):
            return await result
        pieces = Pieces(request, self._emit)
        try:
            async for value in result:
                pieces.add(value)
                await asyncio.sleep(
                    0
                )  # a generator that never waits must not starve its neighbours
        finally:
            await result.aclose()
        return pieces.output(None)
