"""A real broker with real nodes, and a real router where a test starts one."""

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from broker.session.mqtt import MqttSession
from capability_schemas.capability import CatalogRecord
from capability_schemas.functions import FunctionSpec
from capability_schemas.node import RouterState
from capability_schemas.topics import TopicKind
from capability_schemas.wire import encode
from foam.sdk import MeshAddress, MeshClient
from node_agent.agent import NodeAgent
from node_agent.settings import NodeSettings
from registry.encoders import EncoderThread
from registry.search import CapabilitySearch
from router import Ledger, RouterService, RouterSettings
from support.broker_site import BrokerSite
from support.capabilities import make_record
from support.encoders import WordEncoder

WORKSHOP = Path(__file__).parents[1] / "data" / "functions" / "workshop.py"
CONNECT_S = 30.0
CLIENT = "pump-1"


def python(name: str, **fields: Any) -> FunctionSpec:
    given = {"name": name, "description": name, "entry": f"{WORKSHOP}:{name}", **fields}
    return FunctionSpec.model_validate(given)


FUNCTIONS = {
    spec.name: spec
    for spec in (
        python("add", input_schema={"type": "object", "required": ["a"]}),
        python("recite", continues="skip"),
        python("words", description="Say the words of a text one by one."),
    )
}


def recited(lines: int) -> str:
    """What ``recite`` says."""
    return "".join(f"line {number}\n" for number in range(lines))


class Plant:
    """A broker, and whatever is started on it; all of it in this process but the broker."""

    def __init__(self, site: BrokerSite, stack: contextlib.AsyncExitStack, folder: Path) -> None:
        self.site = site
        self.stack = stack
        self.folder = folder
        self.words = WordEncoder()

    async def session(self, identity: str, **fields: Any) -> MqttSession:
        """Connect an identity until the end of the test."""
        made = MqttSession(settings=self.site.settings(identity, **fields))
        await self.stack.enter_async_context(made)
        await made.wait_connected(CONNECT_S)
        return made

    async def start_node(
        self, node: str = "edge-1", *, url: str | None = None, **settings: Any
    ) -> tuple[NodeAgent, MqttSession]:
        """Start a node with ``FUNCTIONS``, and have the registry admit them."""
        session = MqttSession(
            settings=self.site.settings(node, url=url, reconnect_floor_s=0.05),
            will=lambda: agent.last_will(),  # noqa: PLW0108  # it comes after its session
        )
        agent = NodeAgent(
            session=session,
            topics=self.site.topics,
            settings=NodeSettings(node=node, cancel_grace_s=0.5, drain_timeout_s=0.1, **settings),
            functions=tuple(FUNCTIONS.values()),
        )
        await self.stack.enter_async_context(session)
        await session.wait_connected(CONNECT_S)
        await self.stack.enter_async_context(agent)
        async with MqttSession(settings=self.site.settings("registry-1")) as registry:
            await registry.wait_connected(CONNECT_S)
            for spec in FUNCTIONS.values():
                record = self.record(node, spec)
                topic = self.site.topics.build(
                    TopicKind.CATALOG, node=node, function=record.function
                )
                await registry.publish(topic, encode(record), retain=True)
        return agent, session

    def record(self, node: str, spec: FunctionSpec) -> CatalogRecord:
        """Admit a function."""
        return make_record(
            self.words,
            node,
            spec.name,
            description=spec.description,
            version=spec.version,
            continues=spec.continues or "restart",
            examples=("say the words of this text one by one",) if spec.name == "words" else (),
        )

    async def start_router(
        self, stack: contextlib.AsyncExitStack, **settings: Any
    ) -> tuple[RouterService, MqttSession]:
        """Start the router, on the journal and the session it has left."""
        ledger = await stack.enter_async_context(Ledger(path=self.folder / "router.sqlite"))
        encoder = await stack.enter_async_context(EncoderThread(encoder=self.words))
        session = MqttSession(
            settings=self.site.settings("router-1", clean=False, reconnect_floor_s=0.05)
        )
        router = RouterService(
            session=session,
            topics=self.site.topics,
            search=CapabilitySearch(space=self.words.space),
            encoder=encoder,
            ledger=ledger,
            router_id="router-1",
            settings=RouterSettings(calibration_delay_s=3_600, **settings),
        )
        await router.listen()
        await stack.enter_async_context(session)
        await session.wait_connected(CONNECT_S)
        await stack.enter_async_context(router)
        return router, session

    async def router_was_here(self) -> None:
        """Leave the state of a router that has ended."""
        async with MqttSession(settings=self.site.settings("router-1")) as session:
            await session.wait_connected(CONNECT_S)
            said = RouterState(router="router-1", state="offline", epoch=1, at=1)
            topic = self.site.topics.build(TopicKind.ROUTER_STATE, router="router-1")
            await session.publish(topic, encode(said), retain=True)

    async def client(self, *, url: str | None = None, **options: Any) -> MeshClient:
        """Connect a device with the SDK."""
        address = MeshAddress(
            url=url or self.site.url,
            site="local",
            client=CLIENT,
            username=CLIENT,
            password=self.site.settings(CLIENT).password,
        )
        return await self.stack.enter_async_context(
            MeshClient.at(address, connect_timeout_s=CONNECT_S, **options)
        )

    def moved(self, site: BrokerSite) -> None:
        """Go on with a broker that was started again."""
        self.site = replace(site)
