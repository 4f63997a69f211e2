"""One simulation from start to end: a mesh, its load, its faults, and what must hold all the time.

Held against the mesh while it runs: each accepted task ends exactly once, its numbers have no gap,
nothing is shown twice and nothing after the end (`foam.chaos.judge`); every queue stays within its
bound. Held against it when the faults have stopped: everything accepted has ended, nobody who has
left still counts as present, and nothing is held for anybody.
"""

import asyncio
import dataclasses
import hashlib
import json
import tempfile
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from broker.session.base import Message
from capability_schemas.node import NodeState
from capability_schemas.topics import TopicKind, Topics
from capability_schemas.wire import decode
from foam.chaos.judge import Breach, Judge, Verdict
from foam.chaos.schedule import Fault
from foam.mesh import REGISTRY_ID
from foam.simulation.loop import VirtualLoop, run_virtual
from foam.simulation.members import Clerk, Device, Member, Node, Place, Router, crashes
from foam.simulation.network import SimulatedBroker
from foam.simulation.scenario import Scenario
from node_agent.settings import Sleep
from router import RouterSettings

__all__ = ["Run", "simulate"]

_PROBE_S: Final = 1.0
_WRITTEN_S: Final = 1.0
"""Until a router has written what a full disk did not take, seconds: it tries at each sweep."""
_BACK_S: Final = 45.0
"""How long clients take to come back to a broker: the longest pause of a session and a half."""

_START_LIMIT_S: Final = 120.0
_SETTLE_S: Final = 240.0
"""Quiet time at the end: longer than any lease, so that nothing may be left of who has gone.

Not so with very many nodes, which renew their claims rarely; there, everybody has come back.
"""
_HEARTBEATS: Final = 4
"""Loads of each node that are waited for before anybody is taken for a ghost."""

_OUTBOX: Final = 10_000 + 64
_LIVE: Final = 10_000
_LARGE: Final = 100
"""Nodes above which heartbeats are rarer, or nothing else would happen."""

_SLEEP: Final = Sleep(awake_s=2.0, asleep_s=5.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What came of a simulation.

    Attributes:
        scenario: What was simulated, its faults drawn.
        verdict: What the clients saw.
        problems: What else must not be: queues beyond their bounds, ghosts, crashes, two ends
            published for one task.
        excused: Breaches where two losses met, see `_World.excuse`: they do not count.
        messages: Publications and deliveries.
        seconds: Virtual time.
        print_: Digest of everything that was published: the same for the same seed and code.
        trace: What happened last, one line each.
    """

    scenario: Scenario
    verdict: Verdict
    problems: tuple[str, ...]
    excused: tuple[Breach, ...] = ()
    messages: int
    seconds: float
    print_: str
    trace: tuple[str, ...]

    @property
    def failed(self) -> bool:
        """Whether anything was not as it must be."""
        return bool(self.problems or self.verdict.breaches)

    def summary(self) -> dict[str, Any]:
        """Return the figures as JSON."""
        verdict = self.verdict
        return {
            "seed": self.scenario.seed,
            "failed": self.failed,
            "nodes": self.scenario.nodes,
            "sleepers": self.scenario.sleepers,
            "routers": self.scenario.routers,
            "tasks": verdict.submitted,
            "accepted": verdict.accepted,
            "finished": verdict.finished,
            "errors": verdict.failed,
            "broken": dict(verdict.broken),
            "problems": list(self.problems),
            "breaches": [_words(breach) for breach in verdict.breaches],
            "excused": [_words(breach) for breach in self.excused],
            "repeated": verdict.repeated,
            "stale": verdict.stale,
            "moved": verdict.moved,
            "faults": len(self.scenario.faults or ()),
            "messages": self.messages,
            "virtual_s": round(self.seconds, 1),
            "print": self.print_,
        }


def _words(breach: Breach) -> str:
    return f"{breach.kind}: {breach.client}/{breach.task}: {breach.what}"


def simulate(scenario: Scenario) -> Run:
    """Run a simulation to its end.

    Args:
        scenario: What to simulate.

    Returns:
        What came of it. The same for the same scenario and code, given ``PYTHONHASHSEED``.
    """
    scenario = scenario.drawn()
    with tempfile.TemporaryDirectory(prefix="foam-simulation-") as folder:
        run: Run = run_virtual(lambda loop: _World(scenario, Path(folder), loop).run())
        return run


class _Recorder:
    """Sees every publication: keeps the last ones and digests all."""

    def __init__(self, loop: VirtualLoop, topics: Topics, *, kept: int) -> None:
        self.lines: deque[str] = deque(maxlen=kept)
        self.told: Callable[[str, str, dict[str, Any]], None] = lambda _client, _who, _event: None
        self._loop = loop
        self._root = f"{topics.root}/"
        self._digest = hashlib.sha256()

    @property
    def print_(self) -> str:
        """Digest of what was published so far."""
        return self._digest.hexdigest()[:16]

    def note(self, what: str) -> None:
        """Keep a line."""
        self.lines.append(f"{self._loop.time():9.3f} {what}")

    def take(self, publisher: str, message: Message) -> None:
        """See a publication."""
        topic = message.topic.removeprefix(self._root)
        if topic.startswith("event/") or topic.endswith("/load"):
            return  # these hold figures of the machine, and there are many
        if topic.startswith("reply/") and b'"chunk"' not in message.payload:
            self.told(topic.split("/")[1], publisher, json.loads(message.payload))
        size = len(message.payload)
        self._digest.update(f"{self._loop.time():.6f} {publisher} {topic} {size}".encode())
        self.note(f"{publisher} {topic} {message.payload[:300].decode(errors='replace')}")


class _World:
    """A simulation while it runs."""

    def __init__(self, scenario: Scenario, folder: Path, loop: VirtualLoop) -> None:
        self._scenario = scenario
        self._loop = loop
        large = scenario.nodes > _LARGE
        topics = Topics()
        self._recorder = _Recorder(loop, topics, kept=scenario.trace)
        self._broker = SimulatedBroker(
            quality=scenario.network(), seed=str(scenario.seed), tap=self._recorder.take
        )
        self._judge = Judge(grace_ms=60_000)
        self._place = place = Place(
            broker=self._broker,
            topics=topics,
            seed=str(scenario.seed),
            folder=folder,
            judge=self._judge,
        )
        self._load_interval_s = 30.0 if large else 5.0
        settings = RouterSettings(calibration_delay_s=3_600.0, sweep_s=2.0 if large else 0.5)
        self._clerk = Clerk(REGISTRY_ID, place)
        self._routers = {n: Router(n, place, settings=settings) for n in scenario.router_names}
        self._nodes = {
            name: Node(
                name,
                place,
                load_interval_s=self._load_interval_s,
                claim_lease_s=5 * _SETTLE_S if large else _SETTLE_S / 2,
                sleep=_SLEEP if name in scenario.sleeper_names else None,
            )
            for name in scenario.node_names
        }
        self._devices = {
            name: Device(name, place, kept=number % 2 == 0)
            for number, name in enumerate(scenario.device_names)
        }
        self._members: dict[str, Member] = {
            member.name: member
            for member in (
                self._clerk,
                *self._routers.values(),
                *self._nodes.values(),
                *self._devices.values(),
            )
        }
        self._problems: dict[str, None] = {}
        self._healing: list[asyncio.Task[None]] = []
        self._routed: dict[tuple[str, str], list[tuple[float, str]]] = {}
        self._deaths: list[tuple[float, str]] = []
        self._forgot: list[tuple[float, float]] = []
        self._accepted: dict[tuple[str, str], set[str]] = {}
        self._ended: dict[tuple[str, str], list[tuple[float, str]]] = {}
        self._full: dict[str, float] = {}
        self._unwritten: list[tuple[float, float, str]] = []
        self._recorder.told = self._note_word

    async def run(self) -> Run:
        """Run it."""
        loop = self._loop
        for member in self._members.values():
            member.start()
        await self._until(self._is_complete, _START_LIMIT_S)
        probe = loop.create_task(self._probe(), name="simulation.probe")
        begin_s = loop.time()
        load = loop.create_task(self._submit_all(begin_s), name="simulation.load")
        faults = loop.create_task(self._break_all(begin_s), name="simulation.faults")
        await asyncio.wait([load, faults])
        load.result()
        faults.result()
        if self._healing:
            await asyncio.wait(self._healing)
        self._recorder.note("all faults have stopped")
        longest_s = max((ask.timeout_ms for ask, *_ in self._judge.open_tasks()), default=0) / 1000
        await self._until(lambda: not self._unsettled(), longest_s + _SETTLE_S)
        await asyncio.sleep(_SETTLE_S)
        # Loads may be lost: four in a row make a live node silent, until the next one comes.
        await self._until(lambda: not self._remains(), _HEARTBEATS * self._load_interval_s)
        probe.cancel()
        for problem in self._remains():
            self._problem(problem)
        for problem in [*crashes(list(self._members.values())), *loop.mishaps]:
            self._problem(problem)
        verdict = self._judge.verdict(at=self._place.now_ms() + 24 * 3_600_000)
        excused = tuple(breach for breach in verdict.breaches if self.excuse(breach))
        breaches = tuple(breach for breach in verdict.breaches if breach not in excused)
        verdict = dataclasses.replace(verdict, breaches=breaches)
        for member in reversed(self._members.values()):
            await member.kill()
        return Run(
            scenario=self._scenario,
            verdict=verdict,
            problems=tuple(self._problems),
            excused=excused,
            messages=self._broker.messages,
            seconds=loop.time(),
            print_=self._recorder.print_,
            trace=tuple(self._recorder.lines),
        )

    # ---- load and faults

    async def _submit_all(self, begin_s: float) -> None:
        moments: list[tuple[int, int, Callable[[], None]]] = []
        for load in self._scenario.load():
            client = self._devices[load.ask.client].client
            send = partial(client.submit, load.ask, load.body)
            moments.append((load.at_ms, len(moments), send))
            if load.repeated_at_ms is not None:
                moments.append((load.repeated_at_ms, len(moments), send))
            if load.cancelled_at_ms is not None:
                cancel = partial(client.cancel, load.ask.task)
                moments.append((load.cancelled_at_ms, len(moments), cancel))
        for at_ms, _, act in sorted(moments):
            await self._sleep_until(begin_s + at_ms / 1000)
            act()

    async def _break_all(self, begin_s: float) -> None:
        for fault in self._scenario.faults or ():
            await self._sleep_until(begin_s + fault.at_ms / 1000)
            self._recorder.note(f"FAULT {fault}")
            self._healing = [task for task in self._healing if not task.done()]
            breaking = self._break(fault)
            self._healing.append(self._loop.create_task(breaking, name="simulation.fault"))

    async def _break(self, fault: Fault) -> None:
        """Let a fault happen, last and pass."""
        lasts_s = fault.lasts_ms / 1000
        if fault.target:
            await self._break_member(fault, self._members[fault.target], lasts_s)
            return
        self._broker.down()
        if not self._broker.quality.keeps_sessions:
            self._forgot.append((self._loop.time(), self._loop.time() + lasts_s + _BACK_S))
        await asyncio.sleep(lasts_s)
        self._broker.up()

    async def _break_member(self, fault: Fault, member: Member, lasts_s: float) -> None:
        network = self._broker.network
        match fault.kind:
            case "kill_node" | "kill_router" | "leave_node":
                self._deaths.append((self._loop.time(), member.name))
                if (since_s := self._full.pop(member.name, None)) is not None:
                    self._unwritten.append((since_s, self._loop.time(), member.name))
                await (member.leave() if fault.kind == "leave_node" else member.kill())
                await asyncio.sleep(lasts_s)
                member.start()
            case "pause_node" | "pause_router":
                await self._pause(member, lasts_s)
            case "fill_disk":
                await self._fill_disk(self._routers[fault.target], lasts_s)
            case "cut":
                self._broker.cut(fault.target)
            case "stall":
                self._broker.stall(fault.target, lasts_s)
                await asyncio.sleep(lasts_s)
            case "slow":
                network.slow(fault.target, fault.amount)
                await asyncio.sleep(lasts_s)
                network.slow(fault.target, 1.0)
            case "set_clock":
                member.offset_ms += round(fault.amount)
                await asyncio.sleep(lasts_s)
                member.offset_ms -= round(fault.amount)

    async def _pause(self, member: Member, lasts_s: float) -> None:
        process = member.process
        process.stop()
        await asyncio.sleep(lasts_s)
        if process.stopped:
            process.go_on(self._loop)

    async def _fill_disk(self, router: Router, lasts_s: float) -> None:
        ledger = router.ledger
        if ledger is not None:
            ledger.fill_disk(full=True)
            since_s = self._full[router.name] = self._loop.time()
            await asyncio.sleep(lasts_s)
            ledger.fill_disk(full=False)
            await asyncio.sleep(_WRITTEN_S)
            if self._full.get(router.name) == since_s:
                del self._full[router.name]

    # ---- what must hold

    def _note_word(self, client: str, who: str, event: dict[str, Any]) -> None:
        key, now_s = (client, event["task"]), self._loop.time()
        if event["event"] == "routed":
            self._routed.setdefault(key, []).append((now_s, event["node"]))
        elif event["event"] == "accepted":
            self._accepted.setdefault(key, set()).add(who)
        elif event["event"] in {"result", "error"}:
            self._ended.setdefault(key, []).append((now_s, who))

    def excuse(self, breach: Breach) -> bool:
        """Tell whether two losses met, which nobody can mend (ADR 36).

        The broker forgot its sessions, and with them what a node had told the client and not yet
        the router; and the only one who knew it, that node, was killed or left before it could be
        asked: while the broker was away, or as long after as its clients take to come back. Or a
        router heard or told an end that its full disk did not take, and was killed before there was
        room; and so was the node, if it was one's.
        """
        if breach.kind not in {"doubled", "wrong"}:
            return False
        key = breach.client, breach.task
        routers = self._accepted.get(key, set())
        forgotten = any(
            node == dead and asked_s <= died_s and down_s <= died_s <= back_s and asked_s <= down_s
            for asked_s, node in self._routed.get(key, [])
            for died_s, dead in self._deaths
            for down_s, back_s in self._forgot
        )
        gone = {dead: died_s for died_s, dead in self._deaths}
        return forgotten or any(
            since_s <= told_s <= died_s and gone.get(who, 0.0) >= told_s and router in routers
            for told_s, who in self._ended.get(key, [])
            for since_s, died_s, router in self._unwritten
        )

    async def _probe(self) -> None:
        """Look at every queue once a second."""
        # A node works its figures out anew each time.
        every_s = _PROBE_S * max(1, self._scenario.nodes // _LARGE)
        while True:
            await asyncio.sleep(every_s)
            for router in self._routers.values():
                if router.alive and router.session is not None and router.service is not None:
                    self._bound(router.name, "outbox", router.session.outbox_size, _OUTBOX)
                    tasks = router.service.dispatcher
                    self._bound(router.name, "live tasks", len(tasks), _LIVE)
                    self._bound(router.name, "waiting room", len(tasks.usher.room), len(tasks))
            for node in self._nodes.values():
                if node.alive and node.session is not None and node.agent is not None:
                    self._bound(node.name, "outbox", node.session.outbox_size, _OUTBOX)
                    waiting = node.agent.load().queued
                    self._bound(node.name, "queue", waiting, node.settings.queue_limit)

    def _bound(self, who: str, what: str, size: int, limit: int) -> None:
        if size > limit:
            self._problem(f"{who}: {what} holds {size}, its bound is {limit}")

    def _remains(self) -> list[str]:
        """Return what is left of those who have gone."""
        offered = {name for name, node in self._nodes.items() if node.alive}
        found: list[str] = []
        for topic, message in self._broker.retained.items():
            parsed = self._place.topics.parse(topic)
            node = parsed.levels.get("node")
            if parsed.kind is TopicKind.NODE_STATE:
                state = decode(NodeState, message.payload).state
                if (state in {"birth", "sleeping"}) != (node in offered):
                    found.append(f"ghost: the retained state of {node} is {state}")
            elif parsed.kind is TopicKind.CATALOG and node not in offered:
                found.append(f"ghost: {topic} is still there")
        for router in self._routers.values():
            found += _beliefs(router, offered)
        for name, member in self._nodes.items():
            if member.agent is not None and member.alive and member.agent.load().running:
                found.append(f"busy: {name} still runs {member.agent.load().running} tasks")
        return found

    def _problem(self, what: str) -> None:
        if what not in self._problems:
            self._recorder.note(f"PROBLEM {what}")
            self._problems[what] = None

    # ---- waiting

    def _is_complete(self) -> bool:
        """Tell whether every router knows every node."""
        offers = len(self._nodes) * 3
        return all(
            router.service is not None
            and len(router.service.fleet.records) == offers
            and all(view.live or view.asleep for view in router.service.fleet.nodes.values())
            and len(router.service.fleet.nodes) == len(self._nodes)
            for router in self._routers.values()
        )

    def _unsettled(self) -> bool:
        return bool(self._judge.open_tasks()) or any(
            self._judge.missing(name) for name in self._devices
        )

    async def _until(self, check: Callable[[], bool], limit_s: float) -> None:
        for _ in range(round(limit_s / _PROBE_S)):
            if check():
                return
            await asyncio.sleep(_PROBE_S)

    async def _sleep_until(self, when_s: float) -> None:
        await asyncio.sleep(max(0.0, when_s - self._loop.time()))


def _beliefs(router: Router, offered: set[str]) -> list[str]:
    """Return what a router still believes of those who have gone."""
    if router.service is None or not router.alive:
        return [f"gone: {router.name} does not run at the end"]
    found: list[str] = []
    if len(router.service.dispatcher):
        found.append(f"busy: {router.name} still holds {len(router.service.dispatcher)} tasks")
    for name, view in router.service.fleet.nodes.items():
        there = view.live or view.asleep
        if there != (name in offered):
            found.append(f"ghost: {router.name} takes {name} for live: {there}")
        if view.assigned:
            found.append(f"busy: {router.name} counts {view.assigned} tasks on {name}")
    return found
