"""What each client may ask of a router: tasks and bytes per second, tasks at a time.

A rate is a token bucket (the generic cell rate algorithm of ITU-T I.371 in the form that counts
tokens): it holds ``burst`` at the most and fills at the rate. Every client has buckets of its own,
so that one that asks too much is told ``overloaded`` and takes nothing from the others. What is
not shared out are the bounds of the router as a whole: ``live_limit`` and the queue of tasks that
have arrived; a quota on ``concurrent`` keeps a client from filling the first alone.

Limits stand in ``quotas.toml``::

    [default]                 # for everybody
    tasks_per_s = 100
    burst = 200

    [role.node]               # instead, for the tools of agents
    tasks_per_s = 500

    [client.pump-7]           # instead, for one
    concurrent = 2
    bytes_per_s = "64KiB"

What a table leaves out the wider one decides. ``0`` means: no limit.
"""

import asyncio
import math
import tomllib
from collections import Counter, OrderedDict
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from time import monotonic
from typing import Annotated, Any, Final, Self

from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError

from broker.access.policy import Role
from broker.audit import AuditVoice
from broker.followed import FollowedFile
from capability_schemas.errors import ConfigurationError, Overloaded, TooLarge
from capability_schemas.ids import Identifier
from capability_schemas.problem import field_problems

REMEMBERED_CLIENTS: Final = 100_000
"""Clients whose use is remembered; of more, the longest unheard of starts with full buckets."""

_LIVE_RETRY_MS: Final = 1_000
_LONGEST_TURN_S: Final = 60.0
_SHOWN: Final = 500
_REASON: Final = 1_000
_LOOK_S: Final = 0.5
_ROUNDING: Final = 1e-6
"""What a sum of fillings may lack of a whole token."""

_TASKS: Final = 0
_BYTES: Final = 1


class Limits(BaseModel):
    """Limits of one client; None where the wider table decides, 0 for no limit.

    Attributes:
        tasks_per_s: Tasks per second in the long run.
        burst: Tasks at once after a rest.
        concurrent: Tasks accepted and not yet ended.
        bytes_per_s: Bytes of tasks per second in the long run.
        burst_bytes: Bytes at once after a rest. A single task that is larger is taken when the
            bucket is full, and paid for afterwards.
        task_bytes: Largest task, below the limit of the router.
        weight: Share of what nodes can do, relative to other clients, while tasks have to wait.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    tasks_per_s: Annotated[float, Field(ge=0, le=1_000_000)] | None = None
    burst: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    concurrent: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    bytes_per_s: Annotated[ByteSize, Field(ge=0)] | None = None
    burst_bytes: Annotated[ByteSize, Field(ge=1)] | None = None
    task_bytes: Annotated[ByteSize, Field(ge=0)] | None = None
    weight: Annotated[float, Field(ge=0.1, le=100)] | None = None

    def over(self, wider: "Limits") -> "Limits":
        """Return these limits, with those of a wider table where they are silent.

        A rate without a burst of its own gets that of one second, not that of a wider table, which
        was meant for another rate.
        """
        said = self.model_dump(exclude_none=True)
        for rate, burst in (("tasks_per_s", "burst"), ("bytes_per_s", "burst_bytes")):
            if rate in said:
                said.setdefault(burst, max(1, math.ceil(said[rate])))
        return wider.model_copy(update=said)


DEFAULT_LIMITS: Final = Limits(
    tasks_per_s=2_000,
    burst=10_000,
    concurrent=0,
    bytes_per_s=ByteSize(64 * 1024 * 1024),
    burst_bytes=ByteSize(256 * 1024 * 1024),
    task_bytes=ByteSize(0),
    weight=1.0,
)
"""More than one router carries, so that nobody is disturbed who does not run wild."""


class QuotaBook(BaseModel):
    """What ``quotas.toml`` says.

    Attributes:
        default: For everybody.
        role: For roles, instead.
        client: For single clients, instead.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    default: Limits = Limits()
    role: dict[Role, Limits] = {}
    client: dict[Identifier, Limits] = {}

    @classmethod
    def parse(cls, text: str, source: str) -> Self:
        """Read the file.

        Args:
            text: TOML.
            source: What it is called in messages.

        Raises:
            ConfigurationError: It is not usable; the message has a line for every mistake.
        """
        try:
            return cls.model_validate(tomllib.loads(text))
        except ValidationError as exc:
            lines = [f"{source}: {field}: {problem}" for field, problem in field_problems(exc)]
            raise ConfigurationError("\n".join(lines), problems=len(lines)) from exc
        except (ValueError, RecursionError) as exc:
            raise ConfigurationError(f"{source}: no TOML: {exc}") from exc

    def limits(self, client: str, role: Role) -> Limits:
        """Return what holds for a client."""
        own, kind = self.client.get(client, Limits()), self.role.get(role, Limits())
        return own.over(kind.over(self.default.over(DEFAULT_LIMITS)))


class QuotaFile(FollowedFile[QuotaBook]):
    """Keeps the quotas of a file, and takes up its edits as ``FollowedFile`` says.

    Args:
        path: The file; it need not be there.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, what="quotas", parse=QuotaBook.parse)


class _Terms:
    """Limits as the buckets need them; shared by all clients that have the same.

    Attributes:
        limits: The limits.
        rates: Of tasks and of bytes, per second; 0 for no limit.
        bursts: What the two buckets hold.
    """

    __slots__ = ("bursts", "limits", "rates")

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.rates = (float(limits.tasks_per_s or 0), float(limits.bytes_per_s or 0))
        self.bursts = (float(limits.burst or 1), float(limits.burst_bytes or 1))


class _Use:
    """What one client has left, tasks and bytes, and when that was so (monotonic seconds)."""

    __slots__ = ("at", "back_at", "bytes", "refused", "role", "tasks", "terms")

    def __init__(self, terms: _Terms, role: Role, now: float) -> None:
        self.terms = terms
        self.role = role
        self.tasks, self.bytes = terms.bursts
        self.at = self.back_at = now
        self.refused = 0

    def fill(self, now: float) -> None:
        passed = max(0.0, now - self.at)
        rates, bursts = self.terms.rates, self.terms.bursts
        self.tasks = min(bursts[_TASKS], self.tasks + passed * rates[_TASKS])
        self.bytes = min(bursts[_BYTES], self.bytes + passed * rates[_BYTES])
        self.at = now

    def wait_s(self, kind: int, cost: float) -> float:
        """Return how long until something may be taken; 0: now."""
        rate = self.terms.rates[kind]
        left = self.bytes if kind == _BYTES else self.tasks
        lacking = min(cost, self.terms.bursts[kind]) - left
        return lacking / rate if rate and lacking > _ROUNDING else 0.0

    def spend(self, tasks: float, size_bytes: float) -> None:
        """Take from the buckets, or put back what is negative."""
        rates, bursts = self.terms.rates, self.terms.bursts
        if rates[_TASKS]:
            self.tasks = min(bursts[_TASKS], self.tasks - tasks)
        if rates[_BYTES]:
            self.bytes = min(bursts[_BYTES], self.bytes - size_bytes)


class Quotas:
    """Counts what clients use, and refuses what is too much. Owned by the router's event loop.

    Args:
        file: The quotas, loaded by their owner; None: the defaults hold.
        role_of: Role of a client, as far as the router knows.
        clock: Monotonic seconds.
        remembered: Most clients remembered.
    """

    def __init__(
        self,
        *,
        file: QuotaFile | None,
        role_of: Callable[[str], Role],
        clock: Callable[[], float] = monotonic,
        remembered: int = REMEMBERED_CLIENTS,
    ) -> None:
        self.file = file
        self._role_of = role_of
        self._clock = clock
        self._remembered = remembered
        self._book = QuotaBook() if file is None else file.value
        self._by_role: dict[Role, _Terms] = {}
        self._uses: OrderedDict[str, _Use] = OrderedDict()
        # Apart from the uses: a client may be forgotten while it has tasks.
        self._live: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._uses)

    async def follow(self, audit: AuditVoice) -> None:
        """Take up edits of the file, and tell of them; runs until cancelled."""
        while self.file is not None:
            await asyncio.sleep(_LOOK_S)
            known = self.file.problem
            if await asyncio.to_thread(self.file.refresh):
                audit.write("quotas_changed", actor="", subject=str(self.file.path))
            elif self.file.problem is not None and self.file.problem != known:
                audit.write(
                    "quotas_refused",
                    actor="",
                    subject=str(self.file.path),
                    detail={"reason": self.file.problem[:_REASON]},
                )

    def admit(self, client: str, size_bytes: int) -> None:
        """Count a new task, or refuse it and count nothing.

        Args:
            client: Whose task it is.
            size_bytes: Bytes as received.

        Raises:
            Overloaded: A rate or the number of tasks at a time is reached. A client that waits for
                ``retry_after_ms`` gets in; several refused at once are told times one after
                another, at its rate. When one of its tasks ends cannot be known: there it is a
                second.
            TooLarge: The task is larger than this client's may be, at any time.
        """
        now = self._clock()
        use = self._use(client, now)
        limits = use.terms.limits
        if limits.task_bytes and size_bytes > limits.task_bytes:
            use.refused += 1
            raise TooLarge(
                f"the task of {client}", size_bytes=size_bytes, limit_bytes=int(limits.task_bytes)
            )
        if limits.concurrent and self._live[client] >= limits.concurrent:
            use.refused += 1
            raise Overloaded(
                f"{self._live[client]} tasks of {client} are under way, as many as may be",
                retry_after_ms=_LIVE_RETRY_MS,
                quota="concurrent",
            )
        use.fill(now)
        waits = (use.wait_s(_TASKS, 1.0), use.wait_s(_BYTES, size_bytes))
        if waits[_TASKS] or waits[_BYTES]:
            use.refused += 1
            raise _too_fast(client, use, waits, size_bytes, now)
        use.spend(1.0, size_bytes)
        self._live[client] += 1

    def weight(self, client: str) -> float:
        """Return a client's share relative to others, 0.1 to 100."""
        use = self._uses.get(client)
        terms = use.terms if use is not None else self._terms(client, self._role_of(client))
        return terms.limits.weight or 1.0

    def restore(self, client: str) -> None:
        """Count a task that an earlier process admitted and that goes on."""
        self._live[client] += 1

    def end(self, client: str) -> None:
        """Take note that an admitted task has ended."""
        self._live[client] -= 1
        if self._live[client] <= 0:
            del self._live[client]

    def refund(self, client: str, size_bytes: int) -> None:
        """Take back what ``admit`` counted: it was no new task."""
        self.end(client)
        use = self._uses.get(client)
        if use is not None:
            use.spend(-1.0, -size_bytes)

    def describe(self, client: str | None = None) -> dict[str, Any]:
        """Return limits and use as JSON: of one client, or of the 500 heard of last."""
        now = self._clock()
        self._follow()
        names = [client] if client is not None else list(islice(reversed(self._uses), _SHOWN))
        book = self._book
        return {
            "file": None if self.file is None else str(self.file.path),
            "problem": None if self.file is None else self.file.problem,
            "default": _shown(book.default.over(DEFAULT_LIMITS)),
            "role": {role.value: _shown(limits) for role, limits in sorted(book.role.items())},
            "overrides": len(book.client),
            "clients": [self._describe_client(name, now) for name in names],
            "total": len(self._uses),
        }

    def _describe_client(self, client: str, now: float) -> dict[str, Any]:
        role = self._role_of(client)
        use = self._uses.get(client) or _Use(self._terms(client, role), role, now)
        use.fill(now)
        limits = use.terms.limits
        return {
            "client": client,
            "role": role.value,
            "limits": _shown(limits),
            "live": self._live.get(client, 0),
            "tasks_left": math.floor(use.tasks) if limits.tasks_per_s else None,
            "bytes_left": math.floor(use.bytes) if limits.bytes_per_s else None,
            "refused": use.refused,
        }

    def _use(self, client: str, now: float) -> _Use:
        self._follow()
        role = self._role_of(client)
        use = self._uses.get(client)
        if use is None:
            use = self._uses[client] = _Use(self._terms(client, role), role, now)
            if len(self._uses) > self._remembered:
                self._uses.popitem(last=False)
            return use
        self._uses.move_to_end(client)
        if use.role is not role:  # learnt since
            use.role, use.terms = role, self._terms(client, role)
        return use

    def _follow(self) -> None:
        """Take up an edit of the file: what clients have used remains used."""
        if self.file is None or self.file.value is self._book:
            return
        self._book = self.file.value
        self._by_role.clear()
        for client, use in self._uses.items():
            use.terms = self._terms(client, use.role)

    def _terms(self, client: str, role: Role) -> _Terms:
        if client in self._book.client:
            return _Terms(self._book.limits(client, role))
        found = self._by_role.get(role)
        if found is None:
            found = self._by_role[role] = _Terms(self._book.limits("", role))
        return found


def _too_fast(
    client: str, use: _Use, waits: tuple[float, float], size_bytes: int, now: float
) -> Overloaded:
    """Say when to come back: each refused task has its turn after the one before it."""
    kind = _BYTES if waits[_BYTES] > waits[_TASKS] else _TASKS
    rate = use.terms.rates[kind]
    turn_s = (size_bytes if kind == _BYTES else 1.0) / rate
    use.back_at = max(now + waits[kind], min(use.back_at + turn_s, now + _LONGEST_TURN_S))
    return Overloaded(
        f"{client} may send {rate:g} {'bytes' if kind == _BYTES else 'tasks'} per second",
        retry_after_ms=math.ceil((use.back_at - now) * 1_000),
        quota="bytes_per_s" if kind == _BYTES else "tasks_per_s",
    )


def _shown(limits: Limits) -> dict[str, Any]:
    """Return limits as JSON; null for no limit."""
    return {name: value or None for name, value in limits.model_dump().items()}
