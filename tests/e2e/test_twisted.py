"""Every message of the protocol delivered twice, late, out of order and again from the past."""

import asyncio
import contextlib
import json
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from broker.access.policy import Role
from broker.session.base import Message
from broker.session.mqtt import MqttSession
from broker.session.settings import SessionSettings
from capability_schemas.enrollment import JoinToken
from capability_schemas.topics import DEFAULT_SITE, TopicKind, Topics
from foam.chaos.functions import answer_of
from foam.chaos.judge import Ask, Judge
from foam.chaos.mesh import ChaosMesh, MeshPlan
from foam.chaos.schedule import Load, draw_load
from foam.enrolling import enroll
from foam.mesh import ADMIN_ID, REGISTRY_ID, ROUTER_ID, Identity
from foam.sdk.address import find_mesh
from foam.sdk.client import MeshClient
from foam.settings import Settings

pytestmark = [pytest.mark.e2e, pytest.mark.broker, pytest.mark.slow, pytest.mark.timeout(400)]

TWISTED = frozenset(
    {
        TopicKind.TASK,
        TopicKind.CANCEL,
        TopicKind.RESUME,
        TopicKind.REPLY,
        TopicKind.CAPABILITY,
        TopicKind.CATALOG,
        TopicKind.NODE_STATE,
        TopicKind.NODE_LOAD,
        TopicKind.INVOKE,
        TopicKind.CONTROL,
        TopicKind.REPORT,
        TopicKind.ROUTER_STATE,
        TopicKind.REGISTRY_STATE,
        TopicKind.ADMIN,
        TopicKind.ENROLL,
        TopicKind.ENROLL_REPLY,
        TopicKind.EVENT,
        TopicKind.TRUST,
        TopicKind.EVIDENCE,
        TopicKind.DIRECT,
        TopicKind.DIRECT_CANCEL,
        TopicKind.DIRECT_RESUME,
    }
)
AMONG_ROUTERS = frozenset({TopicKind.EVENT, TopicKind.ROUTER_STATE})
UNSENT = frozenset({TopicKind.ARTIFACT, TopicKind.STAGE})
"""Nobody sends these yet."""

TOPICS = Topics()
WAIT_S = 60.0
GONE, STAYS = "chaos-2", "chaos-1"


def test_every_kind_of_message_is_twisted() -> None:
    assert set(TopicKind) == TWISTED | UNSENT


class Mesh:
    """A mesh whose every delivery is twisted, an administrator's included."""

    def __init__(self, mesh: ChaosMesh, plan: MeshPlan, judge: Judge) -> None:
        self.mesh = mesh
        self.judge = judge
        self.folder = plan.data
        self.admin: MeshClient
        self.routers = plan.router_names

    async def connect(self) -> None:
        url = await self.mesh.add_link(ADMIN_ID)
        identity = self.folder / "identities" / f"{ADMIN_ID}.json"
        self.admin = MeshClient.at(find_mesh(Settings(identity_file=identity, url=url)))

    def send(self, seed: str, count: int) -> list[Load]:
        """Send tasks: some twice, some are taken back, all are asked for again."""
        names = list(self.mesh.clients)
        loads = draw_load(names, seed=seed, span_ms=1, count=count, pace=0.2, name=seed)
        for load in loads:
            client = self.mesh.clients[load.ask.client]
            client.submit(load.ask, load.body)
            if load.repeated_at_ms is not None:
                client.submit(load.ask, load.body)
            if load.cancelled_at_ms is not None:
                client.cancel(load.ask.task)
            client.resume(load.ask.task)
        return loads

    async def answered(self) -> None:
        await self.until(self._answered, "every task to end")

    async def _answered(self) -> bool:
        lacking = any(self.judge.missing(name) for name in self.mesh.clients)
        return not self.judge.open_tasks() and not lacking

    async def until(self, holds: Callable[[], Awaitable[Any]], what: str) -> None:
        until_s = time.monotonic() + WAIT_S
        while not await holds():
            if time.monotonic() > until_s:
                pytest.fail(f"waited {WAIT_S:g} s for {what}: {self.judge.open_tasks()[:3]}")
            await asyncio.sleep(0.1)

    async def node(self, name: str) -> dict[str, Any]:
        answer = await self.admin.admin("nodes", target=ROUTER_ID, timeout_s=30)
        return next((dict(one) for one in answer["nodes"] if one["node"] == name), {})

    def runs(self) -> Counter[tuple[str, int]]:
        """How often each attempt was run to its end, by what the nodes wrote down.

        On a machine that is too slow, one router may take over what another one has just begun.
        """
        found: Counter[tuple[str, int]] = Counter()
        for log in (self.folder / "logs").glob("chaos-*.log"):
            for line in log.read_text().splitlines():
                said = json.loads(line) if line.startswith("{") else {}
                if said.get("event") == "invocation.ended" and said["status"] == "finished":
                    found[said["task"], said["attempt"]] += 1
        return found


@contextlib.asynccontextmanager
async def twisted(folder: Path, *, routers: int) -> AsyncIterator[Mesh]:
    """Run a mesh and connect its administrator; in the end no promise may be broken."""
    judge = Judge(grace_ms=60_000)
    plan = MeshPlan(
        data=folder, engine="embedded", nodes=2, devices=2, routers=routers, twisted=True
    )
    mesh = ChaosMesh(
        plan=plan,
        judge=judge,
        clock=lambda: round(1000 * time.monotonic()),
        seed="twisted",
        notify=lambda _: None,
    )
    async with mesh:
        world = Mesh(mesh, plan, judge)
        await world.connect()
        async with world.admin:
            yield world
    assert judge.verdict(at=0).breaches == ()


async def test_nothing_runs_twice_and_nothing_of_the_past_comes_back(tmp_path: Path) -> None:
    async with twisted(tmp_path, routers=1) as world:
        await tasks_run_once(world)
        await what_runs_is_taken_back(world)
        await orders_are_obeyed_in_their_order(world)
        await a_newcomer_joins_once_and_is_thrown_out_for_good(world)
        await who_has_left_does_not_come_back(world)
        await nodes_asked_themselves_run_it_once(world)
        seen = world.mesh.twisted
        assert set(seen) >= TWISTED - AMONG_ROUTERS, f"{TWISTED - set(seen)} never came"


async def test_routers_hear_each_other_twice(tmp_path: Path) -> None:
    """Few tasks at a time: what is not accepted for 2 s is taken over, and may run twice then."""
    async with twisted(tmp_path, routers=2) as world:

        async def all_heard() -> bool:
            return set(world.mesh.twisted) >= AMONG_ROUTERS

        for number in range(8):
            world.send(f"one-{number}", 1)
            await world.answered()
        world.mesh.signal(ROUTER_ID, signal.SIGKILL)
        await world.until(all_heard, "routers to tell each other what they have")
        world.send("last", 1)
        await world.answered()
        assert max(world.runs().values()) == 1


async def tasks_run_once(world: Mesh) -> None:
    loads = world.send("first", 60)
    await world.answered()
    verdict = world.judge.verdict(at=0)
    assert verdict.breaches == ()
    assert verdict.accepted == len(loads)
    assert verdict.repeated > 0
    assert verdict.finished > len(loads) // 2
    runs = world.runs()
    assert {task for task, _ in runs} <= {load.ask.task for load in loads}
    assert max(runs.values()) == 1, runs.most_common(3)


async def what_runs_is_taken_back(world: Mesh) -> None:
    name, client = next(iter(world.mesh.clients.items()))
    asked = {"key": "long", "pieces": 200, "ms": 40_000}
    pieces, _ = answer_of("recite", "long", 200)
    ask = Ask(client=name, task="long", function="recite", pieces=pieces)
    client.submit(ask, {"id": "long", "function": "recite", "input": asked})

    async def begun() -> bool:
        return any(seq > 0 for *_, seq in world.judge.open_tasks(name))

    await world.until(begun, "the first words")
    before = world.judge.verdict(at=0).failed.get("cancelled", 0)
    client.cancel("long")
    await world.answered()
    assert world.judge.verdict(at=0).failed["cancelled"] == before + 1


async def orders_are_obeyed_in_their_order(world: Mesh) -> None:
    """Of an order and its opposite, the later one holds, however often the earlier one comes."""
    for verb, cordoned in (("cordon", True), ("uncordon", False)) * 4:
        await world.admin.admin(verb, node=STAYS, timeout_s=30)
        assert (await world.node(STAYS))["cordoned"] is cordoned
    world.send("meanwhile", 20)
    await world.answered()
    for _ in range(10):
        assert (await world.node(STAYS))["cordoned"] is False


async def a_newcomer_joins_once_and_is_thrown_out_for_good(world: Mesh) -> None:
    admin = world.admin
    made = await admin.admin("token_create", target=REGISTRY_ID, role="node", timeout_s=30)
    papers = await enroll(
        url=await world.mesh.add_link("newcomer"),
        token=JoinToken.parse(made["token"]),
        identity="newcomer",
        role=Role.NODE,
        site=DEFAULT_SITE,
        timeout_s=WAIT_S,
        certificate=False,
    )
    assert papers.reply.id == "newcomer"
    await admin.admin("revoke", target=REGISTRY_ID, id="newcomer", timeout_s=30)
    trail = await admin.admin("audit", target=REGISTRY_ID, limit=500, timeout_s=30)
    told = Counter(one["action"] for one in trail["entries"] if one["subject"] == "newcomer")
    assert told["enrollment_granted"] == told["enrollment_revoked"] == 1, told


async def who_has_left_does_not_come_back(world: Mesh) -> None:
    """A node that hangs is gone for all, whatever of its earlier words is heard again."""

    async def gone() -> bool:
        return not (await world.node(GONE))["live"]

    async def gone_for_a_while() -> bool:  # on a slow machine its last words come later than that
        for _ in range(4):
            if not await gone():
                return False
            await asyncio.sleep(1.0)
        return True

    world.mesh.signal(GONE, signal.SIGSTOP)
    try:
        await world.until(gone_for_a_while, f"{GONE} to pass for gone")
        world.send("without", 30)
        await world.answered()
        for _ in range(10):
            assert await gone()
    finally:
        world.mesh.signal(GONE, signal.SIGCONT)

    async def back() -> bool:
        return bool((await world.node(GONE))["live"])

    await world.until(back, f"{GONE} to be back")


async def nodes_asked_themselves_run_it_once(world: Mesh) -> None:
    """While no router lives, a node runs what it is asked for itself, and each task once."""
    name = next(iter(world.mesh.clients))
    direct = Direct(world, name, await world.mesh.add_link(f"{name}-direct"))
    for router in world.routers:
        world.mesh.signal(router, signal.SIGSTOP)
    try:
        async with direct.session:
            await direct.session.wait_connected(WAIT_S)
            await direct.listen()
            await world.until(direct.taken, "a node to take a task itself")
            for number, load in enumerate(
                draw_load([name], seed="direct", span_ms=1, count=20, pace=0.2, name="direct")
            ):
                direct.send(load, cancelled=number % 5 == 4)
            await world.until(direct.answered, "the direct tasks to end")
    finally:
        for router in world.routers:
            world.mesh.signal(router, signal.SIGCONT)
    verdict = direct.judge.verdict(at=0)
    assert verdict.breaches == (), [str(one) for one in verdict.breaches]
    assert verdict.finished > 0
    assert max(world.runs().values()) == 1


class Direct:
    """A device that asks a node itself."""

    def __init__(self, world: Mesh, name: str, url: str) -> None:
        identity = Identity.read(world.folder / "identities" / f"{name}.json")
        self.session = MqttSession(
            settings=SessionSettings(
                urls=(url,),
                client_id=f"{name}-direct",
                username=identity.username,
                password=identity.password,
            )
        )
        self.judge = Judge()
        self._world = world
        self._name = name
        self._tried = 0
        self._unheard: set[str] = set()

    async def listen(self) -> None:
        await self.session.subscribe(
            TOPICS.filter(TopicKind.REPLY, client=self._name), self._on_reply
        )

    async def taken(self) -> bool:
        """Try it with one task; a node refuses while it believes that a router lives."""
        self._tried += 1
        (load,) = draw_load(
            [self._name], seed="try", span_ms=1, count=1, pace=0, name=f"try-{self._tried}"
        )
        self.send(load)
        await self._world.until(self.answered, "a node to say whether it takes a task")
        done = self.judge.verdict(at=0)
        return done.finished + done.failed.get("execution_failed", 0) > 0

    async def answered(self) -> bool:
        return not self.judge.open_tasks() and not self.judge.missing(self._name)

    def send(self, load: Load, *, cancelled: bool = False) -> None:
        self.judge.submitted(load.ask, at=0)
        self._unheard.add(load.ask.task)
        self._post(TopicKind.DIRECT, load.body)
        if cancelled:
            self._post(TopicKind.DIRECT_CANCEL, {"task": load.ask.task})

    def _post(self, kind: TopicKind, body: dict[str, Any]) -> None:
        topic = TOPICS.build(kind, node=STAYS, client=self._name)
        self.session.post(topic, json.dumps(body).encode())

    async def _on_reply(self, message: Message) -> None:
        *_, task, source = message.topic.split("/")
        self.judge.heard(self._name, source, message.payload, at=0)
        shown = json.loads(message.payload)["event"] in {"chunk", "result"}
        if task in self._unheard and shown:
            self._unheard.discard(task)
            self._post(TopicKind.DIRECT_RESUME, {"task": task, "from_seq": 0})
