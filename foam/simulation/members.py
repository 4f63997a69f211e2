"""The members of a simulated mesh: real routers and nodes, devices, and a clerk for the registry.

A member lives in processes of the simulation, one after the other: it can be killed, stopped, left
and started again. Its clock can be wrong.
"""

import asyncio
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from broker.access.policy import Role
from broker.session.base import Message
from capability_schemas.capability import CapabilityClaim, CatalogRecord
from capability_schemas.errors import Unavailable
from capability_schemas.passport import Passport, PassportBook, issue
from capability_schemas.provenance import Signer
from capability_schemas.signing import SigningKey, sign
from capability_schemas.topics import TopicKind, Topics
from capability_schemas.wire import decode, encode
from foam.chaos.device import DeviceClient
from foam.chaos.judge import Judge
from foam.mesh import REGISTRY_ID
from foam.simulation.loop import Process
from foam.simulation.network import SimulatedBroker, SimulatedSession
from foam.simulation.runtime import FUNCTIONS, RUNTIME, SimulatedRuntime
from foam.simulation.words import WordEncoder
from node_agent.agent import NodeAgent
from node_agent.settings import NodeSettings, Sleep
from registry.search import CapabilitySearch
from registry.vectors import capability_texts, record_vectors
from router import Ledger, RouterService, RouterSettings, router_will

__all__ = ["Clerk", "Device", "LoopLedger", "Member", "Node", "Place", "Router"]

_EPOCH_MS: Final = 1_700_000_000_000
_VALID_MS: Final = 30 * 86_400_000
"""How long a passport is good, before and after the epoch: no clock here is wrong by that much."""
_COMMIT_S: Final = 0.001
_MEMORY_BYTES: Final = 8 * 2**30
"""Free on every node: what this machine has would make each run another one."""

_FAREWELL_S: Final = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where members live.

    Attributes:
        broker: Their broker.
        topics: Topics of the site.
        seed: Of what they draw.
        folder: For files.
        judge: Hears what devices get.
        key: The registry's: what it vouches for, members believe.
    """

    broker: SimulatedBroker
    topics: Topics
    seed: str
    folder: Path
    judge: Judge
    key: SigningKey = field(default_factory=SigningKey.generate)

    def now_ms(self) -> int:
        """Return the true time, UTC milliseconds."""
        return _EPOCH_MS + round(1000 * self.broker.loop.time())

    def vouch(self, name: str, role: Role) -> Signer:
        """Make a member's key, and the passport that the registry vouches with.

        Args:
            name: The member.
            role: What it is.
        """
        key = SigningKey.generate()
        passport = Passport(
            identity=name,
            role=role.value,
            site=self.topics.site,
            public_key=key.public,
            issued_at=_EPOCH_MS - _VALID_MS,
            expires_at=_EPOCH_MS + _VALID_MS,
            registry=REGISTRY_ID,
        )
        return Signer(identity=name, key=key, passport=issue(passport, self.key))

    def book(self, clock: Callable[[], int]) -> PassportBook:
        """Make the book of passports that a member begins its life with.

        Args:
            clock: The member's, UTC milliseconds.
        """
        known = {REGISTRY_ID: self.key.public}
        return PassportBook(site=self.topics.site, registries=known, clock=clock)


class Member(ABC):
    """Something that lives in a process.

    Args:
        name: Its id.
        place: Where it lives.

    Attributes:
        offset_ms: By how much its clock is wrong.
        process: The process it lives in, or lived in last.
        crash: Why its last life ended by itself, if it did.
    """

    def __init__(self, name: str, place: Place) -> None:
        self.name = name
        self.place = place
        self.offset_ms = 0
        self.process = Process(name)
        self.crash: BaseException | None = None
        self._life: asyncio.Task[None] | None = None
        self._leave = asyncio.Event()
        self._epoch = 0

    @property
    def alive(self) -> bool:
        """Whether it runs, or stands still."""
        return self._life is not None and not self._life.done()

    def clock(self) -> int:
        """Return the time by its own clock, UTC milliseconds."""
        return self.place.now_ms() + self.offset_ms

    def next_epoch(self) -> int:
        """Return the epoch of a new life, later than that of the last one, whatever the clock says.

        The lock file of an identity (`foam.identity_lock`) does so for a real member.
        """
        self._epoch = max(self.clock(), self._epoch + 1)
        return self._epoch

    def start(self) -> None:
        """Begin to live; nothing when it lives."""
        if self.alive:
            return
        self.process = Process(self.name)
        self._leave = asyncio.Event()
        self._life = asyncio.get_running_loop().create_task(
            self._run(), name=self.name, context=self.process.context()
        )

    async def kill(self) -> None:
        """Die without a word; no time passes."""
        self.place.broker.cut(self.name)
        self._cut_off()
        await self.process.kill()
        self._life = None

    async def leave(self) -> None:
        """End in order, within a minute."""
        life = self._life
        if life is None:
            return
        self._leave.set()
        await asyncio.wait([life], timeout=_FAREWELL_S)
        if not life.done():
            await self.kill()

    async def _run(self) -> None:
        try:
            async with AsyncExitStack() as stack:
                await self._enter(stack)
                await self._leave.wait()
        except Exception as error:  # noqa: BLE001  # what a supervisor would see
            self.crash = error

    @abstractmethod
    async def _enter(self, stack: AsyncExitStack) -> None:
        """Enter everything it consists of."""

    def _cut_off(self) -> None:  # noqa: B027  # most hold no files
        """Lose hold of files."""


class LoopLedger(Ledger):
    """The router's ledger with its work done in the loop, a virtual millisecond after it came.

    Args:
        path: The SQLite file.
        clock: The router's, UTC milliseconds.
    """

    def __init__(self, *, path: Path, clock: Callable[[], int]) -> None:
        super().__init__(path=path, clock=clock)
        self._db: Any = None
        self._due = False

    async def __aenter__(self) -> Self:
        """Open the file."""
        self._loop = asyncio.get_running_loop()
        self._db = self._open()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Write what waits, and close the file."""
        self._work_off()
        await asyncio.sleep(0)
        self.lose()

    def lose(self) -> None:
        """Close the file with nothing further written, as the death of the process does."""
        db, self._db = self._db, None
        self._closed.set()
        if db is not None:
            db.close()

    def fill_disk(self, *, full: bool) -> None:
        """Let the file grow no more, or again."""
        if self._db is not None:
            self._db.execute(f"PRAGMA max_page_count = {1 if full else 2**30}")

    def _submit(self, work: Callable[[Any], Any]) -> asyncio.Future[Any]:
        future = super()._submit(work)
        if not self._due and self._loop is not None:
            self._due = True
            self._loop.call_later(_COMMIT_S, self._work_off)
        return future

    def _work_off(self) -> None:
        self._due = False
        if self._db is None:
            return
        while not self._jobs.empty():
            jobs = self._take()
            if jobs:
                self._transact(self._db, jobs)


class Router(Member):
    """A router.

    Attributes:
        service: The service of its present life; None before.
        ledger: Its ledger, likewise.
    """

    def __init__(self, name: str, place: Place, *, settings: RouterSettings) -> None:
        super().__init__(name, place)
        self.service: RouterService | None = None
        self.ledger: LoopLedger | None = None
        self.session: SimulatedSession | None = None
        self._settings = settings
        self._signer = place.vouch(name, Role.ROUTER)

    async def _enter(self, stack: AsyncExitStack) -> None:
        place, epoch = self.place, self.next_epoch()
        self.ledger = LoopLedger(path=place.folder / f"{self.name}.sqlite", clock=self.clock)
        await stack.enter_async_context(self.ledger)
        encoder = WordEncoder()
        self.session = SimulatedSession(
            broker=place.broker,
            client_id=self.name,
            will=lambda: router_will(place.topics, self.name, epoch=epoch, at=self.clock()),
            clean=False,
        )
        self.service = RouterService(
            session=self.session,
            topics=place.topics,
            search=CapabilitySearch(space=encoder.space),
            encoder=encoder,
            ledger=self.ledger,
            router_id=self.name,
            settings=self._settings,
            signer=self._signer,
            book=place.book(self.clock),
            epoch=epoch,
            clock=self.clock,
        )
        await self.service.listen()
        await stack.enter_async_context(self.session)
        await self.session.wait_connected()
        await stack.enter_async_context(self.service)

    def _cut_off(self) -> None:
        if self.ledger is not None:
            self.ledger.lose()


class Node(Member):
    """A node that offers `foam.simulation.runtime.FUNCTIONS`.

    Attributes:
        agent: The agent of its present life; None before.
    """

    def __init__(
        self,
        name: str,
        place: Place,
        *,
        load_interval_s: float,
        claim_lease_s: float,
        sleep: Sleep | None = None,
    ) -> None:
        super().__init__(name, place)
        self.agent: NodeAgent | None = None
        self.session: SimulatedSession | None = None
        self.settings = NodeSettings(
            node=name,
            load_interval_s=load_interval_s,
            claim_lease_s=claim_lease_s,
            cut_off_s=2 * load_interval_s,
            memory_reserve_bytes=0,
            sleep=sleep,
        )
        self._signer = place.vouch(name, Role.NODE)

    async def _enter(self, stack: AsyncExitStack) -> None:
        place, agents = self.place, list[NodeAgent]()
        self.session = SimulatedSession(
            broker=place.broker,
            client_id=self.name,
            will=lambda: agents[0].last_will() if agents else None,
        )
        self.agent = NodeAgent(
            session=self.session,
            topics=place.topics,
            settings=self.settings,
            functions=FUNCTIONS,
            signer=self._signer,
            book=place.book(self.clock),
            runtimes={RUNTIME: SimulatedRuntime()},
            epoch=self.next_epoch(),
            clock=self.clock,
            available=lambda: _MEMORY_BYTES,
        )
        agents.append(self.agent)
        await stack.enter_async_context(self.session)
        await self.session.wait_connected()
        await stack.enter_async_context(self.agent)


class Clerk(Member):
    """Stands in for the registry: admits every claim, withdraws it when its lease has run out."""

    def __init__(self, name: str, place: Place) -> None:
        super().__init__(name, place)
        self._encoder = WordEncoder()
        self._leases: dict[tuple[str, str], CatalogRecord] = {}
        self._payloads: dict[tuple[str, str], bytes] = {}
        self._session: SimulatedSession | None = None

    async def _enter(self, stack: AsyncExitStack) -> None:
        self._session = SimulatedSession(broker=self.place.broker, client_id=self.name)
        await self._session.subscribe(
            self.place.topics.filter(TopicKind.CAPABILITY), self._on_claim, queue_limit=100_000
        )
        await stack.enter_async_context(self._session)
        sweep = asyncio.get_running_loop().create_task(self._sweep())
        stack.callback(sweep.cancel)

    async def _on_claim(self, message: Message) -> None:
        levels = self.place.topics.parse(message.topic).levels
        key = (levels["node"], levels["function"])
        if not message.payload:
            self._withdraw(key)
            return
        claim = decode(CapabilityClaim, message.payload)
        known = self._leases.get(key)
        if known is not None and claim.order < known.order:
            return
        texts = capability_texts(
            claim.function, claim.description, claim.examples, claim.input_schema
        )
        vectors = record_vectors(self._encoder.embed(texts), len(claim.examples))
        record = CatalogRecord(
            **{
                **claim.model_dump(exclude={"embedding", "space"}),
                **vectors._asdict(),
                "space": self._encoder.space,
                "registry": self.name,
                "admitted_at": self.clock(),
                "claim_digest": "sha256:0",
            }
        )
        self._leases[key] = record
        self._payloads[key] = encode(sign(record, self.place.key))
        if self._session is not None:
            self._session.announce(self._topic(key), lambda: self._payloads.get(key, b""))

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(5)
            now = self.clock()
            for key, record in list(self._leases.items()):
                if record.expires_at is not None and record.expires_at < now:
                    self._withdraw(key)

    def _withdraw(self, key: tuple[str, str]) -> None:
        if self._leases.pop(key, None) is not None and self._session is not None:
            self._payloads.pop(key, None)
            self._session.retract(self._topic(key))
            self._session.post(self._topic(key), b"", retain=True)

    def _topic(self, key: tuple[str, str]) -> str:
        return self.place.topics.build(TopicKind.CATALOG, node=key[0], function=key[1])


class Device(Member):
    """A client.

    Args:
        name: Its id.
        place: Where it lives.
        kept: Whether the broker keeps its session while it is away.

    Attributes:
        client: What it does.
    """

    def __init__(self, name: str, place: Place, *, kept: bool) -> None:
        super().__init__(name, place)
        self.session = SimulatedSession(broker=place.broker, client_id=name, clean=not kept)
        self.client = DeviceClient(
            client=name,
            session=self.session,
            topics=place.topics,
            judge=place.judge,
            clock=place.now_ms,
            chance=random.Random(f"{place.seed}/{name}"),  # noqa: S311  # a simulation
        )

    async def _enter(self, stack: AsyncExitStack) -> None:
        await self.client.listen()
        await stack.enter_async_context(self.session)
        nag = asyncio.get_running_loop().create_task(self.client.nag())
        stack.callback(nag.cancel)


def crashes(members: Sequence[Member]) -> list[str]:
    """Say which members ended by themselves, and why."""
    return [
        f"{member.name} ended by itself: {member.crash!r}"
        for member in members
        if member.crash is not None and not isinstance(member.crash, Unavailable)
    ]
