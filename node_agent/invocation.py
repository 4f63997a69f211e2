"""One invocation from its instance to its terminal event, and the memory of ended ones."""

import asyncio
import contextlib
import dataclasses
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

import structlog

from capability_schemas.errors import (
    ConfigurationError,
    DeadlineExceeded,
    ErrorCode,
    ExecutionFailed,
    FoamError,
    Overloaded,
    TaskCancelled,
    TooLarge,
)
from capability_schemas.functions import FunctionSpec
from capability_schemas.invocation import UNSURE_LIMIT_BYTES, Invocation, Report
from capability_schemas.provenance import Signer, sign_result
from capability_schemas.reply import CascadeStep, ErrorEvent, Result, Timing, Usage
from capability_schemas.signing import digest
from node_agent.continuation import Repetition, continues_of, shown_text
from node_agent.runtimes.base import (
    Final as FinalPiece,
)
from node_agent.runtimes.base import (
    Instance,
    InstanceDied,
    InstanceFailed,
    Piece,
    Progress,
    Request,
)
from node_agent.stream import ReplyStream
from node_agent.worker.frames import to_json

if TYPE_CHECKING:
    from node_agent.admission.control import Ticket

_END_LIMIT_S: Final = 30.0
"""How long a terminal event may wait for room in the session, seconds."""

SILENT_REASONS: Final = frozenset({"superseded", "cut off"})
"""Reasons for a stop after which nothing more may be said: another attempt has the word."""

HANDED_BACK: Final = "the node is leaving"
"""Reason of a stop that gives the task back to the router, who may find another node."""

OVERTAKEN: Final = "overtaken"
"""Reason of a stop that gives the task back, if the client has been shown nothing: another node has
the answer already."""

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How an invocation ended, as it is reported, also to whoever asks again.

    Attributes:
        status: Status of the report; ``dropped``: nobody is told.
        code: Error code; None when it went well.
        reason: Why, in words.
        seq: Next free number of the task.
        retry_after_ms: When another try is sensible.
        peer: A node that may take it instead.
        payload: What the node said with the answer in it, if it did: the terminal event, or the
            report ``unsure`` or ``held``.
        reply: Topic that a terminal event went to.
    """

    status: Literal["finished", "unsure", "held", "failed", "refused", "dropped"]
    code: str | None = None
    reason: str = ""
    seq: int | None = None
    retry_after_ms: int | None = None
    peer: str | None = None
    payload: bytes | None = None
    reply: str = ""

    @property
    def answered(self) -> bool:
        """Whether the function ran to its end and gave an answer."""
        return self.status in ("finished", "unsure", "held") and self.code is None


class Named(Protocol):
    """What names an attempt and who hears of it: an `Invocation`, or `Asked`."""

    @property
    def client(self) -> str:
        """Whose task it is."""
        ...

    @property
    def task(self) -> str:
        """The task."""
        ...

    @property
    def attempt(self) -> int:
        """Which attempt."""
        ...

    @property
    def router(self) -> str:
        """Who hears the report."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """An attempt that a router asks for; see `Named`."""

    client: str
    task: str
    attempt: int
    router: str


def key_of(invocation: Named) -> str:
    """Return the identity of an attempt."""
    return f"{invocation.client}/{invocation.task}/{invocation.attempt}"


@dataclass(frozen=True, slots=True)
class Standing:
    """How a task stands on this node.

    Attributes:
        attempt: The latest attempt that is known of; 0: none is.
        running: What it was asked for, unless it has ended.
        outcome: How it ended; None: it runs, or that is not known any more.
    """

    attempt: int = 0
    running: Invocation | None = None
    outcome: Outcome | None = None


class OutcomeMemory:
    """The last outcomes by (client, task, attempt), so that nothing runs twice.

    Args:
        limit: Most outcomes; the oldest is forgotten first.
        payload_limit_bytes: Most bytes of payloads kept for sending again; older outcomes keep
            their report only.
    """

    def __init__(self, *, limit: int, payload_limit_bytes: int = 4 * 1024 * 1024) -> None:
        self._limit = limit
        self._payload_limit_bytes = payload_limit_bytes
        self._outcomes: OrderedDict[tuple[str, str, int], Outcome] = OrderedDict()
        self._payloads: dict[tuple[str, str, int], None] = {}  # of those that still have theirs
        self._attempts: dict[tuple[str, str], int] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._outcomes)

    def record(self, invocation: Invocation, outcome: Outcome) -> None:
        """Remember how an attempt ended."""
        task = (invocation.client, invocation.task)
        key = (*task, invocation.attempt)
        self._forget(key)
        self._outcomes[key] = outcome
        self._attempts[task] = max(invocation.attempt, self._attempts.get(task, 0))
        self._bytes += len(outcome.payload or b"")
        if outcome.payload is not None:
            self._payloads[key] = None
        while len(self._outcomes) > self._limit:
            self._forget(next(iter(self._outcomes)))
        while self._bytes > self._payload_limit_bytes:
            self._drop_payload(next(iter(self._payloads)))

    def find(self, invocation: Named) -> Outcome | None:
        """Return how this very attempt ended, if it did."""
        return self._outcomes.get((invocation.client, invocation.task, invocation.attempt))

    def latest_attempt(self, whose: tuple[str, str]) -> int:
        """Return the highest attempt of a client's task that ended here; 0 when none."""
        return self._attempts.get(whose, 0)

    def _forget(self, key: tuple[str, str, int]) -> None:
        if key not in self._outcomes:
            return
        self._drop_payload(key)
        del self._outcomes[key]
        if self._attempts.get(key[:2]) == key[2]:
            del self._attempts[key[:2]]

    def _drop_payload(self, key: tuple[str, str, int]) -> None:
        """Forget the payload of an outcome: it must not run again for that."""
        self._payloads.pop(key, None)
        outcome = self._outcomes[key]
        self._bytes -= len(outcome.payload or b"")
        self._outcomes[key] = dataclasses.replace(outcome, payload=None)


class Instances(Protocol):
    """Where an execution gets its instance: `node_agent.pool.InstancePool`."""

    async def acquire(self, spec: FunctionSpec, *, session: str | None = None) -> Instance:
        """Lease an instance."""
        ...

    def release(self, instance: Instance, *, served: bool) -> None:
        """Give it back."""
        ...


class Execution:
    """The run of one admitted invocation; owned by the agent's event loop.

    Args:
        invocation: What the router asked for.
        spec: The function.
        value: Effective input, checked.
        node: This node.
        stream: Where the events go.
        report_topic: Where an answer goes that is less sure than the invocation demands.
        instances: Where the instance comes from.
        options: Options of the runtime for this call.
        clock: UTC milliseconds.
        signer: Signs the result; None: it goes unsigned.

    Attributes:
        request: The call of the instance.
        ticket: Its admission, once it is admitted.
        final: The end of its answer, once there is one.
        asked_by: The router that asked last how it stands; None: nobody did.
        cut_ms: How long it had run in its instance when it was stopped or its time was over,
            milliseconds; None when it was not.
    """

    def __init__(
        self,
        *,
        invocation: Invocation,
        spec: FunctionSpec,
        value: Any,
        node: str,
        stream: ReplyStream,
        report_topic: str,
        instances: Instances,
        options: dict[str, Any],
        clock: Callable[[], int],
        signer: Signer | None = None,
    ) -> None:
        self._signer = signer
        self.invocation = invocation
        self.spec = spec
        self.stopped_by: str | None = None
        self.first_ms: float | None = None
        self.run_ms = 0.0
        self.cut_ms: float | None = None
        self.asked_by: str | None = None
        self.ticket: Ticket | None = None
        self.final: FinalPiece | None = None
        self._node = node
        self._stream = stream
        self._report_topic = report_topic
        self._instances = instances
        self._clock = clock
        self._received_at = clock()
        self._started_at: int | None = None
        self._called_at: int | None = None
        self._scope: asyncio.Timeout | None = None
        self._instance: Instance | None = None
        self._output_bytes = 0
        self.request = Request(
            id=key_of(invocation),
            input=value,
            text=invocation.text,
            options=options,
            session=invocation.session,
            policy=invocation.policy,
        )
        self._again: Repetition | None = None

    @property
    def key(self) -> str:
        """Identity of the attempt."""
        return self.request.id

    @property
    def warm_first_ms(self) -> float | None:
        """Time from the call of the instance to its first output, milliseconds."""
        if self.first_ms is None or self._called_at is None:
            return None
        return max(0.0, self._received_at + self.first_ms - self._called_at)

    def stop(self, reason: str) -> None:
        """End it soon: by a terminal ``cancelled`` or ``deadline_exceeded``, or without a word.

        Args:
            reason: ``client``, ``deadline``, ``superseded``, ``cut off``, `HANDED_BACK` or words.
        """
        if self.stopped_by is not None:
            return
        self.stopped_by = reason
        if reason in SILENT_REASONS:
            self._stream.silence()
        elif reason == OVERTAKEN:
            self._stream.drop()
        if self._scope is not None and not self._scope.expired():
            self._scope.reschedule(asyncio.get_running_loop().time())

    @property
    def seq(self) -> int:
        """Number of the next event of the task, as far as it has got here."""
        return self._stream.seq

    @property
    def can_yield(self) -> bool:
        """Whether it can be given back: the client has been shown nothing."""
        return self._stream.blank and self.final is None

    async def run(self) -> Outcome:
        """Run it and send its events; returns when the terminal event is on its way.

        Call `settle` afterwards, whatever happens. Cancellation stops the call in the instance and
        sends nothing.
        """
        self._started_at = self._clock()
        self._stream.open()
        error: FoamError | None = None
        cut = False
        try:
            self.final = await self._limited()
        except TimeoutError:
            cut, error = True, self.stop_error()
        except FoamError as exc:
            error = exc if self.stopped_by is None else self.stop_error()
        except BaseException:
            self._stream.drop()
            raise
        # From the call on: the start of an instance is no property of the function.
        self.run_ms = float(self._clock() - (self._called_at or self._started_at))
        if self._called_at is not None and self.final is None and (cut or self.stopped_by):
            self.cut_ms = self.run_ms
        if self.final is not None and self.stopped_by not in SILENT_REASONS:
            return await self._succeed(self.final)
        return await self.end_with(error or self.stop_error())

    async def settle(self) -> None:
        """Wait until the call has left its instance (bounded by the grace time), and return it."""
        if self._instance is None:
            return
        try:
            await self._instance.settled(self.request.id)
        finally:
            self._instances.release(self._instance, served=self._instance.alive)

    async def _limited(self) -> FinalPiece:
        left_ms = float(self.invocation.deadline - self._clock())
        if self.spec.limits.timeout_ms is not None:
            left_ms = min(left_ms, self.spec.limits.timeout_ms)
        ends_at = asyncio.get_running_loop().time() + left_ms / 1000
        async with asyncio.timeout_at(ends_at) as scope:
            self._scope = scope
            try:
                if self.stopped_by is not None:  # stopped before it began
                    raise self.stop_error()
                return await self._call(self._clock() + left_ms)
            finally:
                self._scope = None

    async def _call(self, ends_at: float) -> FinalPiece:
        self._instance = await self._instances.acquire(self.spec, session=self.request.session)
        if self.ticket is not None:
            self.ticket.check_time(self._clock())
        self._called_at = self._clock()
        request = dataclasses.replace(
            self.request, left_ms=ends_at - self._called_at, shown=self._take_up()
        )
        final: FinalPiece | None = None
        async with contextlib.aclosing(self._instance.invoke(request)) as answers:
            async for item in answers:
                if self.first_ms is None:
                    self.first_ms = float(self._clock() - self._received_at)
                if isinstance(item, Piece):
                    again, data = self._again, item.data
                    for fresh in [data] if again is None else again.fresh(data):
                        self._stream.add(fresh)
                    await self._stream.room()  # the instance is not read meanwhile, and pauses
                elif isinstance(item, Progress):
                    self._stream.show(item)
                else:
                    final = item
        if final is None:
            raise InstanceDied("the instance ended a call without a final", status=None)
        if self._again is not None:
            self._again.end()
        self._output_bytes = len(to_json(final.output).encode())
        limit_bytes = self.spec.limits.output_bytes
        if self._output_bytes > limit_bytes:
            raise TooLarge("output", size_bytes=self._output_bytes, limit_bytes=limit_bytes)
        return final

    def _take_up(self) -> str | None:
        """Prepare to go on with what another node has begun; return the text to go on behind.

        Raises:
            ExecutionFailed: The function cannot.
        """
        continuation = self.invocation.continuation
        if continuation is None:
            return None
        how = continues_of(self.spec)
        if how in ("prefix", "any"):
            return shown_text(continuation, self.spec)
        if how != "skip":
            raise ExecutionFailed(f"{self.spec.name} cannot go on in mid-answer: it is {how!r}")
        self._again = Repetition(continuation, function=self.spec.name)
        return None

    async def _succeed(self, final: FinalPiece) -> Outcome:
        invocation, terms = self.invocation, self.invocation.cascade
        if invocation.hold:
            return await self._hold_back(final)
        sureness = final.confidence
        unsure = terms is not None and sureness is not None and sureness < terms.accept
        if unsure and self._output_bytes <= UNSURE_LIMIT_BYTES:
            return await self._hand_over(final, "unsure")
        began = self._started_at or self._received_at
        output_digest = digest(final.output)

        def make(seq: int, at: int) -> Result:
            total_ms = float(at - self._received_at)
            result = Result(
                task=invocation.task,
                at=at,
                seq=seq,
                attempt=invocation.attempt,
                output=final.output,
                node=self._node,
                function=self.spec.name,
                version=self.spec.version,
                usage=self._usage(final),
                timing=Timing(
                    queue_ms=float(began - self._received_at),
                    first_ms=self.first_ms,
                    total_ms=total_ms,
                ),
                confidence=sureness,
                digest=output_digest,
                cascade=(*terms.steps, self._step(final, total_ms)) if terms is not None else None,
            )
            if self._signer is None or self._signer.passport is None:
                return result
            return sign_result(
                result,
                client=invocation.client,
                signer=self._signer,
                show_passport=invocation.proof,
            )

        terminal = await self._stream.end(make, limit_s=_END_LIMIT_S)
        if terminal is None and self.stopped_by in SILENT_REASONS:  # while it waited for room
            return self._dropped()
        return Outcome(
            status="finished", seq=self._stream.seq, payload=terminal, reply=self._stream.topic
        )

    async def _hold_back(self, final: FinalPiece) -> Outcome:
        """Give an answer to the router that another node may have told already, if it fits."""
        if self._output_bytes <= UNSURE_LIMIT_BYTES:
            return await self._hand_over(final, "held")
        size = TooLarge("output", size_bytes=self._output_bytes, limit_bytes=UNSURE_LIMIT_BYTES)
        return await self.end_with(size)

    async def _hand_over(self, final: FinalPiece, status: Literal["unsure", "held"]) -> Outcome:
        """Give an answer to the router, be it unsure or held; the client has seen nothing."""

        def make(seq: int, at: int) -> Report:
            return Report(
                task=self.invocation.task,
                client=self.invocation.client,
                attempt=self.invocation.attempt,
                node=self._node,
                status=status,
                seq=seq,
                output=final.output,
                confidence=final.confidence,
                usage=self._usage(final),
                total_ms=float(at - self._received_at),
            )

        report = await self._stream.end(make, limit_s=_END_LIMIT_S, instead=self._report_topic)
        if report is None:
            if self.stopped_by in SILENT_REASONS:
                return self._dropped()
            return await self.end_with(Overloaded("the session had no room for the answer"))
        reason = f"the answer was {status}, and is no longer kept"
        return Outcome(status=status, reason=reason, seq=self._stream.seq, payload=report)

    def _usage(self, final: FinalPiece) -> Usage:
        return Usage(
            input_tokens=final.usage.get("input_tokens"),
            output_tokens=final.usage.get("output_tokens"),
            cost=self.spec.cost.money or None,
        )

    def _step(self, final: FinalPiece, total_ms: float) -> CascadeStep:
        return CascadeStep(
            node=self._node,
            function=self.spec.name,
            version=self.spec.version,
            confidence=final.confidence,
            cost=self.spec.cost.money,
            total_ms=total_ms,
        )

    async def end_with(self, error: FoamError) -> Outcome:
        """End it by an error, or hand it back to the router; also before it has begun.

        Args:
            error: What happened. The loss of an instance, one that does not start, overload, a node
                that is not made for it and a leaving node are mended by another node; anything else
                is the task's terminal event. In a cascade the router decides in every case as long
                as nothing was shown: it may hold an earlier answer, or know a stronger node.
        """
        if self.stopped_by in SILENT_REASONS:
            return self._dropped()
        held = self.invocation.cascade is not None or self.invocation.hold
        mendable = (held and self._stream.blank) or self.stopped_by == OVERTAKEN
        code = self._code_of(error)
        if code is not error.code or mendable or isinstance(error, Overloaded):
            self._stream.drop()
            return Outcome(
                status="failed",
                code=code.value,
                reason=error.message,
                seq=self._stream.seq,
                retry_after_ms=error.detail.get("retry_after_ms"),
            )

        def make(seq: int, at: int) -> ErrorEvent:
            return ErrorEvent.from_error(
                error, task=self.invocation.task, at=at, seq=seq, attempt=self.invocation.attempt
            )

        terminal = await self._stream.end(make, limit_s=_END_LIMIT_S)
        if terminal is None and self.stopped_by in SILENT_REASONS:
            return self._dropped()
        return Outcome(
            status="finished",
            code=error.code.value,
            reason=error.message,
            seq=self._stream.seq,
            payload=terminal,
            reply=self._stream.topic,
        )

    def _dropped(self) -> Outcome:
        return Outcome(status="dropped", reason=self.stopped_by or "", seq=self._stream.seq)

    def _code_of(self, error: FoamError) -> ErrorCode:
        """Return what an error of this node's making means to the router; the error's own else."""
        if isinstance(error, InstanceDied) or self.stopped_by == HANDED_BACK:
            return ErrorCode.NODE_LOST
        if isinstance(error, InstanceFailed):
            return ErrorCode.EXECUTION_FAILED
        if isinstance(error, ConfigurationError):  # larger than the memory of this node
            return ErrorCode.NO_CAPABLE_NODE
        return error.code

    def stop_error(self) -> FoamError:
        """Return the error for a run that was stopped or ran out of time."""
        if self.stopped_by is not None and self.stopped_by != "deadline":
            by_client = self.stopped_by == "client"
            why = "the client cancelled the task" if by_client else f"cancelled: {self.stopped_by}"
            return TaskCancelled(why, reason=self.stopped_by)
        limit_ms = self.spec.limits.timeout_ms
        if limit_ms is not None and self._clock() < self.invocation.deadline:
            return DeadlineExceeded(
                f"{self.spec.name} ran for longer than its limit of {limit_ms} ms",
                limit_ms=limit_ms,
            )
        return DeadlineExceeded(
            f"the deadline passed while {self.spec.name} ran on {self._node}",
            deadline=self.invocation.deadline,
        )
