"""The clock of a machine is set by an hour while a task runs: of router, node, registry."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final

import pytest

from broker.session.base import Message
from broker.session.memory import MemorySession
from capability_schemas.clock import SteadyClock
from capability_schemas.ids import wall_ms
from capability_schemas.topics import TopicKind, Topics
from foam.simulation.runtime import FUNCTIONS, RUNTIME, SimulatedRuntime
from node_agent.agent import NodeAgent
from node_agent.settings import NodeSettings
from registry.admission import Identity
from registry.encoders import EncoderThread
from registry.service import RegistryService
from registry.settings import RegistrySettings
from registry.store import SqliteStore
from support.members import REGISTRY_KEY, make_book, make_signer
from support.scripted_mesh import QUICK, Mesh

HOUR_MS: Final = 3_600_000
LEASE_S: Final = 2.0
SETTINGS = QUICK.model_copy(update={"report_timeout_ms": 2_000, "sweep_s": 0.05})


class Machine:
    """A machine whose wall clock somebody sets."""

    def __init__(self) -> None:
        self.set_by = 0
        self.clock = SteadyClock(wall=lambda: wall_ms() + self.set_by)


class Site(Mesh):
    """Registry, router and node, each on a machine of its own."""

    def __init__(self, stack: AsyncExitStack, path: Path, topics: Topics) -> None:
        super().__init__(stack, path, topics)
        self.machines = {name: Machine() for name in ("router", "node", "registry")}
        self.agent: NodeAgent

    async def start(self) -> None:
        await self.start_client()
        router, node, registry = (machine.clock for machine in self.machines.values())
        store = await self.stack.enter_async_context(SqliteStore(path=self.path / "reg.sqlite"))
        encoder = await self.stack.enter_async_context(EncoderThread(encoder=self.words))
        signer = make_signer("edge-1", "node", now=wall_ms())
        await self.stack.enter_async_context(
            RegistryService(
                session=await self.session("registry-1"),
                topics=self.topics,
                store=store,
                encoder=encoder,
                key=REGISTRY_KEY,
                identities={"edge-1": Identity(signer.key.public)}.get,
                registry_id="registry-1",
                settings=RegistrySettings(grace_s=1.0, sweep_interval_s=0.05),
                clock=registry,
            )
        )
        await self.start_router(
            SETTINGS,
            clock=router,
            signer=make_signer("router-1", "router", now=wall_ms()),
            book=make_book(router),
        )
        session = MemorySession(
            broker=self.broker,
            client_id="edge-1",
            will=lambda: self.agent.last_will(),  # noqa: PLW0108  # it is made below
        )
        self.agent = NodeAgent(
            session=session,
            topics=self.topics,
            settings=NodeSettings(node="edge-1", claim_lease_s=LEASE_S, load_interval_s=0.2),
            functions=FUNCTIONS,
            signer=signer,
            book=make_book(node),
            runtimes={RUNTIME: SimulatedRuntime()},
            clock=node,
        )
        await self.stack.enter_async_context(session)
        await self.stack.enter_async_context(self.agent)

    def claims(self) -> list[Message]:
        topic = self.topics.build(TopicKind.CAPABILITY, node="edge-1", function="recite")
        return self.broker.published(topic)

    def ask(self, task: str, ms: int) -> None:
        self.submit(
            id=task,
            function="recite",
            input={"key": task, "pieces": 8, "ms": ms},
            timeout_ms=20_000,
        )


@pytest.fixture
async def site(tmp_path: Path, topics: Topics) -> AsyncIterator[Site]:
    async with AsyncExitStack() as stack:
        made = Site(stack, tmp_path, topics)
        await made.start()
        yield made
        await made.stop_router()


@pytest.mark.parametrize("step_ms", [HOUR_MS, -HOUR_MS], ids=["ahead", "back"])
@pytest.mark.parametrize("machine", ["router", "node", "registry"])
async def test_a_clock_that_is_set_under_a_task_costs_nothing(
    site: Site, eventually: Any, machine: str, step_ms: int
) -> None:
    await eventually(lambda: len(site.router.fleet.records) == len(FUNCTIONS), timeout_s=30)
    await eventually(lambda: site.router.fleet.node("edge-1").live, timeout_s=30)
    site.ask("during", ms=1_500)
    await eventually(lambda: "chunk" in site.kinds("during"), timeout_s=30)
    site.machines[machine].set_by = step_ms
    await eventually(lambda: site.final("during"), timeout_s=30)
    final = site.final("during")
    assert final is not None
    assert (final["event"], final["attempt"]) == ("result", 1)
    claimed = len(site.claims())  # a lease is three renewals: it would have ended meanwhile
    await eventually(lambda: len(site.claims()) >= claimed + 5, timeout_s=30)
    assert site.router.fleet.node("edge-1").live
    assert len(site.router.fleet.records) == len(FUNCTIONS)
    site.ask("after", ms=10)  # signed, and looked at by clocks that differ by an hour
    await eventually(lambda: site.final("after"), timeout_s=30)
    final = site.final("after")
    assert final is not None
    assert (final["event"], final["attempt"]) == ("result", 1)
    assert site.agent.refused == {}
    site.machines[machine].set_by = 0
    site.ask("put-right", ms=10)
    await eventually(lambda: site.final("put-right"), timeout_s=30)
    assert [event["event"] for event in site.of("put-right")][-1] == "result"
