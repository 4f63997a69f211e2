"""The functions of a node, for what runs on it: an agent's tools, with the rules of any call."""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Final

from capability_schemas.errors import (
    DeadlineExceeded,
    FoamError,
    NotFound,
    PolicyDenied,
    TooLarge,
)
from capability_schemas.functions import FunctionSpec, check_input, effective_input
from node_agent.admission.calls import CALLER, Caller, CallGraph
from node_agent.admission.control import Admission, Ticket
from node_agent.admission.forecast import work_of
from node_agent.admission.queue import AdmissionQueue
from node_agent.pool.pool import InstancePool
from node_agent.runtimes.base import (
    Answer,
    Instance,
    InstanceDied,
    Piece,
    Request,
    Runtime,
)
from node_agent.runtimes.base import (
    Final as FinalPiece,
)
from node_agent.worker.frames import to_json

_LONGEST_MS: Final = 60_000
"""Time of a call that nobody set a limit to, milliseconds."""


class NodeFunctions:
    """Runs functions of the own node, queued and limited like invocations from outside.

    A call ends with its caller: it inherits deadline and priority of what runs, and is cancelled by
    closing its iterator. Owned by the agent's event loop. Implements `base.LocalFunctions`.

    Args:
        admission: Who is taken in, and what is offered.
        queue: Its queue.
        pool: The instances.
        runtimes: Runtime by name; may grow.
        clock: UTC milliseconds.
    """

    def __init__(
        self,
        *,
        admission: Admission,
        queue: AdmissionQueue,
        pool: InstancePool,
        runtimes: Mapping[str, Runtime],
        clock: Callable[[], int],
    ) -> None:
        self._admission = admission
        self._pool = pool
        self._runtimes = runtimes
        self._clock = clock
        self._graph = CallGraph(queue)
        self._numbers = itertools.count(1)

    def specs(self) -> Mapping[str, FunctionSpec]:
        """Return what the node offers now, by name."""
        return self._admission.functions

    def runtime(self, name: str) -> Runtime:
        """Return the runtime behind a function.

        Raises:
            NotFound: The node has no such function.
        """
        return self._runtimes[self._spec(name).runtime]

    async def invoke(self, name: str, request: Request) -> AsyncGenerator[Answer, None]:
        """Run a function of the node: pieces and progress, then one final.

        Closing the iterator, or cancelling whoever iterates, cancels the call.

        Args:
            name: The function.
            request: The call; its options add to those of the function, ``messages`` among them
                stand in for the input. Its id is replaced.

        Raises:
            NotFound: The node has no such function.
            PolicyDenied: The task must not leave the site, and the function would hand it outside.
            InvalidTask: The input does not fit its schema.
            ExecutionFailed: It would wait for itself, or is nested too deeply.
            DeadlineExceeded: It did not end in time, or could not.
            FoamError: It was refused, or failed.
        """
        spec = self._spec(name)
        if request.policy is not None and request.policy.local_only and spec.policy.external:
            raise PolicyDenied(f"{name} hands data to a service outside, the task must stay here")
        runtime = self._runtimes[spec.runtime]
        value = effective_input(request.text, request.input, spec.input_schema)
        if "messages" not in request.options:
            check_input(value, spec.input_schema)
        caller = CALLER.get()
        deadline = self._deadline(spec, request, caller)
        inner = Caller(
            key=f"{request.id}/call-{next(self._numbers)}",
            deadline=deadline,
            priority=5 if caller is None else caller.priority,
            session=request.session or (None if caller is None else caller.session),
            depth=0 if caller is None else caller.depth + 1,
        )
        whole = Request(
            id=inner.key,
            input=value,
            text=request.text,
            left_ms=float(deadline - self._clock()),
            options={**runtime.call_options(spec), **request.options},
            session=inner.session,
            policy=request.policy,
        )
        if caller is not None:
            self._graph.begin(
                inner.key, caller=caller, group=self._pool.group_of(spec), function=name
            )
        try:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            ticket = self._admission.admit(
                inner.key,
                spec,
                work_of(whole),
                deadline=deadline,
                priority=inner.priority,
                begin=lambda: _settle(turn, None),
                drop=lambda error: _settle(turn, error),
                nested=caller is not None,
            )
            async with contextlib.aclosing(self._run(ticket, turn, whole, inner)) as answers:
                async for answer in answers:
                    yield answer
        finally:
            self._graph.end(inner.key)

    async def _run(
        self, ticket: Ticket, turn: asyncio.Future[None], request: Request, inner: Caller
    ) -> AsyncGenerator[Answer, None]:
        spec = ticket.spec
        instance: Instance | None = None
        final: FinalPiece | None = None
        called_at: int | None = None
        try:
            ends_at = asyncio.get_running_loop().time() + (request.left_ms or 0.0) / 1000
            self._admission.dispatch()
            async with _until(ends_at, spec):
                await turn
                instance = await self._pool.acquire(spec, session=request.session)
            ticket.check_time(self._clock())
            called_at = self._clock()
            size_bytes = 0
            async with contextlib.aclosing(instance.invoke(request)) as answers:
                while final is None:
                    token = CALLER.set(inner)  # for the tasks that the call starts
                    try:
                        async with _until(ends_at, spec):
                            answer = await anext(answers, None)
                    finally:
                        CALLER.reset(token)
                    if answer is None:
                        raise InstanceDied("the instance ended a call without a final", status=None)
                    if isinstance(answer, FinalPiece):
                        final = answer
                        _check_size(spec, len(to_json(answer.output)))
                    else:
                        if isinstance(answer, Piece):
                            size_bytes += len(to_json(answer.data))
                            _check_size(spec, size_bytes)
                        yield answer
            self._admission.ended(ticket, final, run_ms=float(self._clock() - called_at))
            yield final
        except DeadlineExceeded:
            self._learn_cut(ticket, called_at)
            raise
        finally:
            await self._leave(ticket, instance, called_at, succeeded=final is not None)

    def _learn_cut(self, ticket: Ticket, called_at: int | None) -> None:
        if called_at is not None:
            self._admission.cut(ticket, ran_ms=float(self._clock() - called_at))

    async def _leave(
        self, ticket: Ticket, instance: Instance | None, called_at: int | None, *, succeeded: bool
    ) -> None:
        """Give instance and place back, once the call has left them."""
        try:
            if instance is not None:
                await instance.settled(ticket.entry.key)
        finally:
            if instance is not None:
                self._pool.release(instance, served=instance.alive)
            if not self._admission.withdraw(ticket):
                ran = called_at is not None and succeeded
                run_ms = float(self._clock() - called_at) if ran and called_at else None
                self._admission.free(ticket, run_ms=run_ms)
            self._admission.dispatch()

    def _spec(self, name: str) -> FunctionSpec:
        spec = self._admission.functions.get(name)
        if spec is None:
            known = ", ".join(sorted(self._admission.functions)) or "none"
            raise NotFound(f"this node has no function {name!r}; it has {known}")
        return spec

    def _deadline(self, spec: FunctionSpec, request: Request, caller: Caller | None) -> int:
        now = self._clock()
        limits = [request.left_ms, spec.limits.timeout_ms]
        ends = [now + int(limit) for limit in limits if limit is not None]
        if caller is not None:
            ends.append(caller.deadline)
        return min(ends, default=now + _LONGEST_MS)


@contextlib.asynccontextmanager
async def _until(ends_at: float, spec: FunctionSpec) -> AsyncGenerator[None, None]:
    """Limit a wait.

    Raises:
        DeadlineExceeded: The time is over.
    """
    try:
        async with asyncio.timeout_at(ends_at):
            yield
    except TimeoutError as exc:
        raise DeadlineExceeded(f"{spec.name} did not end in the time it was given") from exc


def _settle(turn: asyncio.Future[None], error: FoamError | None) -> None:
    if turn.done():  # the call was cancelled at this very moment
        return
    if error is None:
        turn.set_result(None)
    else:
        turn.set_exception(error)


def _check_size(spec: FunctionSpec, size_bytes: int) -> None:
    limit_bytes = spec.limits.output_bytes
    if size_bytes > limit_bytes:
        raise TooLarge("output", size_bytes=size_bytes, limit_bytes=limit_bytes)
