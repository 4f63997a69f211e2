"""A broker in memory, a router, and nodes that do as they are told."""

import json
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from broker.session.base import Message
from broker.session.memory import MemoryBroker, MemorySession
from capability_schemas.capability import CatalogRecord
from capability_schemas.invocation import Invocation, Report
from capability_schemas.node import NodeLoad, NodeState
from capability_schemas.signing import SigningKey, sign
from capability_schemas.topics import TopicKind, Topics
from capability_schemas.wire import encode
from registry.encoders import EncoderThread
from registry.search import CapabilitySearch
from router import Ledger, RouterService, RouterSettings, router_will
from support.capabilities import make_record
from support.encoders import WordEncoder

QUICK = RouterSettings(
    report_timeout_ms=150,
    cancel_grace_ms=60,
    deadline_grace_ms=40,
    finish_grace_ms=60,
    settle_ms=60,
    quiet_ms=10,
    doubt_ms=300,
    grace_ms=500,
    sweep_s=0.05,
    calibration_delay_s=3_600,
)
Behaviour = Callable[["ScriptedNode", Invocation], None]


def answer(node: "ScriptedNode", invocation: Invocation) -> None:
    """Admit, stream two chunks, finish."""
    node.report(invocation, "admitted")
    if invocation.stream:
        node.reply(invocation, event="chunk", seq=0, data="hello ")
        node.reply(invocation, event="chunk", seq=1, data="world")
    last = 2 if invocation.stream else 0
    node.reply(invocation, event="result", seq=last, output="hello world", node=node.node)
    node.report(invocation, "finished", seq=last + 1)


def refuse(node: "ScriptedNode", invocation: Invocation) -> None:
    node.report(invocation, "refused", code="overloaded", reason="full", retry_after_ms=700)


def admit(node: "ScriptedNode", invocation: Invocation) -> None:
    node.report(invocation, "admitted")


def begin(node: "ScriptedNode", invocation: Invocation) -> None:
    node.report(invocation, "admitted")
    node.reply(invocation, event="chunk", seq=0, data="hel")


def say_nothing(node: "ScriptedNode", invocation: Invocation) -> None:
    """Leave the invocation unanswered."""


class ScriptedNode:
    """A node that answers invocations as told, and accounts for what it has said of them."""

    def __init__(self, session: MemorySession, topics: Topics, behaviour: Behaviour) -> None:
        self.session = session
        self.topics = topics
        self.node = session.client_id
        self.behaviour = behaviour
        self.invocations: list[Invocation] = []
        self.orders: list[dict[str, Any]] = []
        self.questions: list[int | None] = []
        self._said: dict[tuple[str, str, int], list[tuple[str, bytes]]] = {}
        self._last: dict[tuple[str, str, int], dict[str, Any]] = {}

    def forget(self) -> None:
        """Know nothing any more, as after a start."""
        self._said.clear()
        self._last.clear()

    async def start(self) -> None:
        await self.session.subscribe(
            self.topics.build(TopicKind.INVOKE, node=self.node), self._on_invoke
        )
        await self.session.subscribe(
            self.topics.build(TopicKind.CONTROL, node=self.node), self._on_control
        )
        self.be("birth")

    def be(self, state: Any, epoch: int = 10) -> None:
        message = NodeState(node=self.node, state=state, epoch=epoch, at=1, load_interval_s=60)
        topic = self.topics.build(TopicKind.NODE_STATE, node=self.node)
        self.session.post(topic, encode(message), retain=True)

    def load(self, **fields: Any) -> None:
        message = NodeLoad(node=self.node, epoch=10, at=1, **fields)
        self.session.post(self.topics.build(TopicKind.NODE_LOAD, node=self.node), encode(message))

    def report(self, invocation: Invocation, status: Any, **fields: Any) -> None:
        message = Report(
            task=invocation.task,
            client=invocation.client,
            attempt=invocation.attempt,
            node=self.node,
            status=status,
            **fields,
        )
        topic = self.topics.build(TopicKind.REPORT, router=invocation.router, node=self.node)
        if status != "admitted":
            self._last[_key(invocation)] = {"status": status, **fields}
        self.session.post(topic, encode(message))

    def reply(self, invocation: Invocation, **fields: Any) -> None:
        event = {"v": 1, "task": invocation.task, "at": 1, "attempt": invocation.attempt} | fields
        topic, payload = f"{invocation.reply}/{self.node}", json.dumps(event).encode()
        self._said.setdefault(_key(invocation), []).append((topic, payload))
        self.session.post(topic, payload)

    async def _on_invoke(self, message: Message) -> None:
        invocation = Invocation.model_validate_json(message.payload)
        self.invocations.append(invocation)
        self._said.setdefault(_key(invocation), [])
        self.behaviour(self, invocation)

    async def _on_control(self, message: Message) -> None:
        order = json.loads(message.payload)
        if order["verb"] == "account":
            self.questions.append(order.get("attempt"))
            for client, task in order.get("tasks", ()):
                self._account(order | {"client": client, "task": task})
            if "task" in order:
                self._account(order)
        else:
            self.orders.append(order)

    def _account(self, order: dict[str, Any]) -> None:
        """Say how an attempt stands, as `node_agent.executor` does."""
        whose = order["client"], order["task"]
        attempts = [key[2] for key in self._said if key[:2] == whose]
        attempt = order.get("attempt") or max(attempts, default=0)
        if not attempt:
            return
        said = self._said.get((*whose, attempt))
        answer: dict[str, Any] = {"status": "unknown"}
        if said is not None:
            events = [json.loads(payload) for _, payload in said]
            numbers = [event["seq"] for event in events if "seq" in event]
            answer = {"status": "running", "seq": max(numbers, default=-1) + 1}
            answer = self._last.get((*whose, attempt), answer)
            if events and events[-1]["event"] in {"result", "error"}:
                self.session.post(*said[-1])
                answer = {"status": "finished", "seq": events[-1]["seq"] + 1}
        report = Report(client=whose[0], task=whose[1], attempt=attempt, node=self.node, **answer)
        topic = self.topics.build(TopicKind.REPORT, router=order["sender"], node=self.node)
        self.session.post(topic, encode(report))


def _key(invocation: Invocation) -> tuple[str, str, int]:
    return invocation.client, invocation.task, invocation.attempt


class Mesh:
    """A broker, a router, nodes and one client."""

    def __init__(self, stack: AsyncExitStack, path: Path, topics: Topics) -> None:
        self.stack = stack
        self.path = path
        self.topics = topics
        self.broker = MemoryBroker()
        self.words = WordEncoder()
        self.registry_key: SigningKey | None = None
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.client: MemorySession
        self.router: RouterService
        self.routers: dict[str, RouterService] = {}
        self._router_lives: dict[str, AsyncExitStack] = {}
        self._router_sessions: dict[str, MemorySession] = {}

    async def session(self, name: str, **options: Any) -> MemorySession:
        session = MemorySession(broker=self.broker, client_id=name, **options)
        return await self.stack.enter_async_context(session)

    async def start_client(self, name: str = "pump-7") -> None:
        self.client = await self.session(name)
        await self.client.subscribe(
            self.topics.filter(TopicKind.REPLY, client=name), self._on_reply
        )

    async def start_router(
        self,
        settings: RouterSettings = QUICK,
        *,
        name: str = "router-1",
        epoch: int = 1,
        will: bool = True,
        **more: Any,
    ) -> RouterService:
        life = self._router_lives[name] = AsyncExitStack()
        ledger = await life.enter_async_context(
            Ledger(path=self.path / f"{name}.sqlite", limit_bytes=settings.ledger_bytes)
        )
        encoder = await life.enter_async_context(EncoderThread(encoder=self.words))
        session = MemorySession(
            broker=self.broker,
            client_id=name,
            will=router_will(self.topics, name, epoch=epoch, at=1) if will else None,
            clean=False,
        )
        self._router_sessions[name] = session
        router = RouterService(
            session=session,
            topics=self.topics,
            search=CapabilitySearch(space=self.words.space),
            encoder=encoder,
            ledger=ledger,
            router_id=name,
            settings=settings,
            epoch=epoch,
            **more,
        )
        self.routers[name] = router
        if name == "router-1":
            self.router = router
        await router.listen()
        await life.enter_async_context(session)
        await life.enter_async_context(router)
        await self.broker.settle()
        return router

    async def stop_router(self, name: str = "router-1") -> None:
        life = self._router_lives.pop(name, None)
        if life is not None:
            await life.aclose()

    async def kill_router(self, name: str) -> None:
        """Have a router gone without a word of its own; its journal stays."""
        await self._router_sessions[name].abort()
        await self.stop_router(name)

    async def node(
        self, name: str, behaviour: Behaviour = answer, *records: CatalogRecord
    ) -> ScriptedNode:
        node = ScriptedNode(await self.session(name), self.topics, behaviour)
        await node.start()
        registry = self.client
        for record in records or (make_record(self.words, name),):
            topic = self.topics.build(TopicKind.CATALOG, node=name, function=record.function)
            if self.registry_key is not None:
                record = sign(record, self.registry_key)  # noqa: PLW2901 - as a registry would
            registry.post(topic, encode(record), retain=True)
        await self.broker.settle()
        return node

    def submit(self, **fields: Any) -> None:
        self.send(json.dumps(fields).encode())

    def send(self, payload: bytes) -> None:
        self.client.post(self.topics.build(TopicKind.TASK, client="pump-7"), payload)

    def tell(self, kind: TopicKind, **fields: Any) -> None:
        topic = self.topics.build(kind, client="pump-7")
        self.client.post(topic, json.dumps(fields).encode())

    def of(self, task: str) -> list[dict[str, Any]]:
        return [event for _, event in self.events if event["task"] == task]

    def kinds(self, task: str) -> list[str]:
        return [event["event"] for event in self.of(task)]

    def final(self, task: str) -> dict[str, Any] | None:
        finals = [event for event in self.of(task) if event["event"] in {"result", "error"}]
        return finals[0] if finals else None

    async def admin(self, eventually: Any, verb: str, **args: Any) -> dict[str, Any]:
        ask = f"ask-{len(self.events)}"
        topic = self.topics.build(TopicKind.ADMIN, target="router-1", client="pump-7")
        self.client.post(topic, json.dumps({"id": ask, "verb": verb, "args": args}).encode())
        await eventually(lambda: self.final(ask))
        reply = self.final(ask)
        assert reply is not None
        return reply

    async def _on_reply(self, message: Message) -> None:
        self.events.append((message.topic, json.loads(message.payload)))
