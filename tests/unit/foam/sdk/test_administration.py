"""Which router answers an administrator, and what if one of them hangs."""

import asyncio
import contextlib

import pytest

from broker.presence import RouterPresence
from broker.rpc import ReplyInbox
from broker.session.memory import MemoryBroker, MemorySession
from capability_schemas.admin import AdminRequest
from capability_schemas.errors import FoamError, InvalidTask, NotFound, Unavailable
from capability_schemas.node import RegistryState, RouterState
from capability_schemas.reply import ErrorEvent, Result
from capability_schemas.topics import TopicKind
from capability_schemas.wire import decode, encode
from foam.sdk import administration
from foam.sdk.administration import Administration
from foam.sdk.registries import RegistryWatch

CLIENT = "admin-1"
HANGS = object()


class Site:
    """An administrator, and routers that answer as told."""

    def __init__(self, session, far, topics, inbox):
        self.far = far
        self.topics = topics
        self.asked = []
        self.presence = RouterPresence(session=session, topics=topics)
        self.desk = Administration(
            inbox=inbox,
            presence=self.presence,
            registries=RegistryWatch(session=session, topics=topics),
            router="router-1",
        )

    async def router(self, name, answer, *, state="birth"):
        """Have a router say that it lives, and give one answer to whatever it is asked."""

        async def on_request(message):
            request = decode(AdminRequest, message.payload)
            self.asked.append((name, request.verb))
            if answer is HANGS:
                return
            event: ErrorEvent | Result
            if isinstance(answer, FoamError):
                event = ErrorEvent.from_error(answer, task=request.id, at=1)
            else:
                event = Result(
                    task=request.id, at=1, seq=0, output={"by": name, **answer}, node=name
                )
            topic = self.topics.build(TopicKind.REPLY, client=CLIENT, task=request.id, source=name)
            self.far.post(topic, encode(event))

        await self.far.subscribe(self.topics.filter(TopicKind.ADMIN, target=name), on_request)
        said = RouterState(router=name, state=state, epoch=1, at=1)
        topic = self.topics.build(TopicKind.ROUTER_STATE, router=name)
        await self.far.publish(topic, encode(said), retain=True)

    async def registry(self, name):
        """Have a registry say that it lives; it answers nothing."""
        said = RegistryState(
            registry=name, state="birth", epoch=1, at=1, leads=True, term=1, beat=1, lease_ms=1000
        )
        topic = self.topics.build(TopicKind.REGISTRY_STATE, registry=name)
        await self.far.publish(topic, encode(said), retain=True)

    async def ask(self, verb="nodes", *, timeout_s=20.0, target=None):
        return await self.desk.ask(verb, target=target, timeout_s=timeout_s)


@pytest.fixture
async def site(topics, monkeypatch):
    monkeypatch.setattr(administration, "_PATIENCE_S", 0.5)
    monkeypatch.setattr(administration, "_RETURN_S", 0.05)
    broker = MemoryBroker()
    async with contextlib.AsyncExitStack() as stack:
        session = MemorySession(broker=broker, client_id=CLIENT)
        far = MemorySession(broker=broker, client_id="far")
        for one in (session, far):
            await stack.enter_async_context(one)
            await one.wait_connected()
        inbox = ReplyInbox(session=session, topics=topics, client=CLIENT)
        await stack.enter_async_context(inbox)
        yield Site(session, far, topics, inbox)


async def test_the_router_of_the_mesh_is_asked_before_others(site):
    await site.router("router-1", {})
    await site.router("router-0", {})
    assert (await site.ask())["by"] == "router-1"


async def test_another_router_answers_for_one_that_hangs(site):
    await site.router("router-1", HANGS)
    await site.router("router-2", {})
    assert (await site.ask())["by"] == "router-2"
    assert (await site.ask("functions"))["by"] == "router-2"
    assert site.asked.count(("router-1", "routers")) == 1  # it is not waited for again
    assert site.desk.router == "router-2"


async def test_no_order_is_given_to_a_router_that_hangs(site):
    await site.router("router-1", HANGS)
    await site.router("router-2", {})
    await site.ask("calibrate")
    assert ("router-1", "calibrate") not in site.asked


async def test_who_is_named_is_asked_and_nobody_else(site):
    await site.router("router-1", HANGS)
    await site.router("router-2", {})
    with pytest.raises(Unavailable, match=r"router-1 did not answer nodes within 0\.1 s"):
        await site.ask(target="router-1", timeout_s=0.1)
    assert site.asked == [("router-1", "nodes")]


async def test_a_target_that_was_never_here_is_not_waited_for(site):
    await site.router("router-1", {})
    await site.registry("registry-1")
    with pytest.raises(NotFound, match=r"registry router-3 here: there are router-1, "):
        await asyncio.wait_for(site.ask(target="router-3", timeout_s=3600), 30)
    assert site.asked == []


async def test_a_registry_can_be_a_target_as_well(site):
    await site.router("router-1", {})
    await site.registry("registry-1")
    with pytest.raises(Unavailable, match="registry-1 did not answer nodes"):
        await site.ask(target="registry-1", timeout_s=0.1)


async def test_a_target_that_has_gone_is_still_asked(site):
    await site.router("router-1", HANGS, state="offline")
    with pytest.raises(Unavailable, match="router-1 did not answer nodes"):
        await site.ask(target="router-1", timeout_s=0.1)


async def test_who_hears_of_nobody_asks_whom_it_was_told_to(site):
    with pytest.raises(Unavailable, match="router-3 did not answer nodes"):
        await site.ask(target="router-3", timeout_s=0.1)


async def test_without_routers_it_is_said_at_once_who_was_there(site):
    await site.router("router-1", HANGS, state="offline")
    await site.router("router-2", HANGS, state="offline")
    with pytest.raises(Unavailable, match="no router lives: router-1 is offline, router-2 is off"):
        await site.ask()
    assert site.asked == []


async def test_a_cordon_is_told_to_all_and_who_did_not_hear_it_is_named(site):
    await site.router("router-1", {})
    await site.router("router-2", {})
    assert (await site.ask("cordon"))["by"] == "router-1"
    assert sorted(site.asked) == [("router-1", "cordon"), ("router-2", "cordon")]
    await site.router("router-3", HANGS)
    with pytest.raises(Unavailable, match="done by router-1, router-2; router-3 did not answer"):
        await site.ask("cordon", timeout_s=2.0)


async def test_all_are_asked_about_tasks(site):
    await site.router("router-1", NotFound("task t-1 is not known here", task="t-1"))
    await site.router("router-2", {"node": "edge-1"})
    await site.router("router-3", HANGS)
    answers = await site.desk.ask_all("task", timeout_s=20.0, id="t-1")
    assert answers.given == {"router-2": {"by": "router-2", "node": "edge-1"}}
    assert answers.silent == ("router-3",)


async def test_what_no_router_knows_is_not_found(site):
    await site.router("router-1", NotFound("task t-1 is not known here", task="t-1"))
    await site.router("router-2", HANGS)
    with pytest.raises(NotFound, match=r"not known here \(router-2 did not answer\)"):
        await site.desk.ask_all("task", timeout_s=20.0, id="t-1")


async def test_a_mistake_is_the_answer_of_all(site):
    await site.router("router-1", {})
    await site.router("router-2", InvalidTask("unknown argument", field="args"))
    with pytest.raises(InvalidTask, match="unknown argument"):
        await site.desk.ask_all("stats", timeout_s=20.0)


async def test_where_all_hang_all_are_named(site):
    await site.router("router-1", HANGS)
    await site.router("router-2", HANGS)
    with pytest.raises(Unavailable, match="asked: router-1, router-2"):
        await site.desk.ask_all("stats", timeout_s=20.0)
