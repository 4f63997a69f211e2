"""Every defect the embedded broker mends, shown to be one on stock amqtt by the same steps.

Each test runs the same client against both brokers and states what it sees on each, so a release
of amqtt that mends a defect fails here and the override can go.
"""

import asyncio
import contextlib
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from broker.access import CredentialStore
from broker.embedded import EmbeddedBroker
from broker.engine import EngineSettings
from capability_schemas.topics import TopicKind, Topics
from mqtt_probe import Lost, Probe, Refused, Will, connect_packet, packet, raw_answer, text
from support.broker_site import IDENTITIES

pytestmark = pytest.mark.broker

TOPICS = Topics()
TASK = TOPICS.build(TopicKind.TASK, client="pump-1")
TASKS = f"{TOPICS.root}/task/#"
STATE = TOPICS.build(TopicKind.NODE_STATE, node="edge-1")
STATES = TOPICS.filter(TopicKind.NODE_STATE)
PACKET_LIMIT = 256 * 1024
QUEUE_LIMIT = 100
INFLIGHT_LIMIT = 50


@dataclass
class Target:
    """A broker, and how to get into it."""

    kind: str
    port: int
    passwords: dict[str, str]
    opened: list[Probe]

    @property
    def hardened(self) -> bool:
        return self.kind == "hardened"

    def login(self, identity: str) -> dict[str, str]:
        return {"username": identity, "password": self.passwords[identity]}

    async def connect(self, identity: str, client_id: str | None = None, **fields: Any) -> Probe:
        probe = await Probe.open(
            self.port, client_id or identity, **{**self.login(identity), **fields}
        )
        self.opened.append(probe)
        return probe


@contextlib.asynccontextmanager
async def _hardened(store: CredentialStore, folder: Path) -> AsyncIterator[int]:
    settings = EngineSettings(
        data_dir=folder,
        packet_limit_bytes=PACKET_LIMIT,
        queue_limit=QUEUE_LIMIT,
        inflight_limit=INFLIGHT_LIMIT,
        connect_timeout_s=0.5,
    )
    async with EmbeddedBroker(settings=settings, credentials=store, topics=TOPICS) as engine:
        yield engine.port


@contextlib.asynccontextmanager
async def _stock(store: CredentialStore, folder: Path) -> AsyncIterator[int]:
    tests = Path(__file__).parent.parent
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-W",
        "ignore",
        "-c",
        f"import sys; sys.path[:0] = [{str(tests)!r}, {str(tests.parent)!r}];"
        "import asyncio, logging; logging.disable(logging.CRITICAL);"
        "from support.stock_amqtt import main; asyncio.run(main())",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        child.stdin.write(json.dumps({"credentials": str(store.path)}).encode() + b"\n")
        yield int(await child.stdout.readline())
    finally:
        child.kill()
        await child.communicate()


@pytest.fixture(scope="module")
def identities(tmp_path_factory):
    store = CredentialStore(tmp_path_factory.mktemp("identities") / "credentials.json")
    return store, {name: store.add(name, role) for name, role in IDENTITIES.items()}


@pytest.fixture(params=["hardened", "stock"])
async def target(request, identities, tmp_path):
    store, passwords = identities
    run = _hardened if request.param == "hardened" else _stock
    async with run(store, tmp_path) as port:
        found = Target(request.param, port, passwords, [])
        yield found
        for probe in found.opened:
            await probe.abort()


async def _hears_nothing(probe: Probe, *, for_s: float = 1.0) -> bool:
    with contextlib.suppress(TimeoutError):
        await probe.expect(1, timeout_s=for_s)
        return False
    return True


async def test_deliveries_survive_subscriptions_that_come_and_go(target):
    """Stock: the broadcast walks a dictionary that changes, and drops what was acknowledged."""
    stable = []
    for number, topic_filter in enumerate((TASKS, f"{TOPICS.root}/task/+", TASK)):
        probe = await target.connect("router-1", f"router-1{number or ''}")
        await probe.subscribe(topic_filter)
        stable.append(probe)
        if target.hardened:
            break  # one client id per router
    restless = [await target.connect("admin-1", f"admin-1-{number}") for number in range(4)]
    device = await target.connect("pump-1")
    stop = asyncio.Event()

    async def churn(probe: Probe) -> None:
        number = 0
        while not stop.is_set():
            number += 1
            await probe.subscribe(f"{TOPICS.root}/catalog/n{number}/f", 0)

    async with asyncio.TaskGroup() as tasks:
        for probe in restless:
            tasks.create_task(churn(probe))
        for number in range(300):
            await device.publish(TASK, b"%d" % number)
        stop.set()
    await device.ping()
    if target.hardened:
        await stable[0].expect(300)
        assert [int(m.payload) for m in stable[0].got] == list(range(300))
    else:
        for probe in stable:
            with contextlib.suppress(TimeoutError):
                await probe.expect(300, timeout_s=2.0)
        assert sum(len(probe.got) for probe in stable) < 300 * len(stable)


@pytest.mark.parametrize("clean", [True, False])
async def test_a_wrong_password_does_not_end_a_session(target, clean):
    """Stock: the session named in CONNECT is ended before the password is looked at."""
    victim = await target.connect("edge-1", clean=False)
    await victim.subscribe(TOPICS.build(TopicKind.INVOKE, node="edge-1"))
    with pytest.raises((Refused, Lost)):
        await Probe.open(target.port, "edge-1", username="edge-1", password="x", clean=clean)
    router = await target.connect("router-1")
    await router.publish(TOPICS.build(TopicKind.INVOKE, node="edge-1"), b"work")
    if target.hardened:
        await victim.expect(1)
        assert not victim.lost.is_set()
    else:
        assert victim.lost.is_set() or await _hears_nothing(victim)


async def test_nobody_gets_retained_messages_of_other_peoples_subscriptions(target):
    """Stock: a new connection is sent what anybody's filters match, without a SUBSCRIBE."""
    node = await target.connect("edge-1")
    await node.publish(STATE, b"state", retain=True)
    watcher = await target.connect("watcher-1")
    await watcher.subscribe(STATES)
    await watcher.expect(1)
    device = await target.connect("pump-1")
    assert await _hears_nothing(device) is target.hardened


async def test_retained_messages_ask_for_the_right_to_receive(target):
    """Stock: a wide filter gets every retained message, whatever the topic plugin says."""
    node = await target.connect("edge-1")
    await node.publish(STATE, b"state", retain=True)
    await node.ping()
    device = await target.connect("pump-1")
    code = await device.subscribe("#")
    assert await _hears_nothing(device) is target.hardened
    assert code == (0x80 if target.hardened else 1)


async def test_a_silent_client_is_cut_off_and_its_will_sent(target):
    """Stock: a keepalive that has run out is noticed and ignored."""
    watcher = await target.connect("watcher-1")
    await watcher.subscribe(STATES)
    node = await target.connect("edge-1", keepalive=1, will=Will(STATE, b"dead"))
    if target.hardened:
        assert await watcher.payloads(1) == [b"dead"]
        await node.wait_lost()
    else:
        assert await _hears_nothing(watcher, for_s=4.0)
        assert not node.lost.is_set()


async def test_a_take_over_closes_the_old_connection(target):
    """Stock: the old socket of a clean session stays open, and deaf."""
    old = await target.connect("pump-1", "one")
    new = await target.connect("pump-1", "one")
    await new.ping()
    if target.hardened:
        await old.wait_lost()
    else:
        with pytest.raises(TimeoutError):
            await old.wait_lost(timeout_s=1.0)


async def test_quality_of_service_is_not_raised(target):
    """Stock: the subscription's quality of service counts, whatever was published."""
    router, device = await target.connect("router-1"), await target.connect("pump-1")
    await router.subscribe(TASKS, 1)
    await device.publish(TASK, b"x", qos=0)
    (message,) = await router.expect(1)
    assert message.qos == (0 if target.hardened else 1)


async def test_publishing_to_a_dollar_topic_ends_the_connection(target):
    """Stock: it goes on acknowledging and delivers nothing any more."""
    router, device = await target.connect("router-1"), await target.connect("pump-1")
    await router.subscribe(TASKS)
    device.send(packet(0x30, text("$foam/x") + b"x"))
    if target.hardened:
        await device.wait_lost()
    else:
        await device.publish(TASK, b"acknowledged")
        assert await _hears_nothing(router)


async def test_an_unacknowledged_message_comes_again(target):
    """Stock: what was sent is forgotten with the connection."""
    router = await target.connect("router-1", clean=False, auto_ack=False)
    await router.subscribe(TASKS)
    device = await target.connect("pump-1")
    for number in range(3):
        await device.publish(TASK, b"%d" % number)
    await router.expect(3)
    await router.abort()
    router = await target.connect("router-1", clean=False)
    if target.hardened:
        got = await router.expect(3)
        assert [(m.payload, m.dup) for m in got] == [(b"0", True), (b"1", True), (b"2", True)]
    else:
        assert await _hears_nothing(router)


async def test_what_waited_for_an_absent_client_is_not_marked_retained(target):
    """Stock: offline messages carry the retain flag."""
    router = await target.connect("router-1", clean=False)
    await router.subscribe(TASKS)
    await router.disconnect()
    device = await target.connect("pump-1")
    await device.publish(TASK, b"missed")
    router = await target.connect("router-1", clean=False)
    (message,) = await router.expect(1)
    assert message.retain is not target.hardened


async def test_mqtt_5_with_credentials_is_refused_at_once(target):
    """Stock: no answer at all; the client waits for its own timeout."""
    hello = connect_packet("five", level=5, **target.login("pump-1"))
    answer = await raw_answer(target.port, hello, timeout_s=3.0)
    assert answer == (b"\x20\x03\x00\x84\x00" if target.hardened else None)


@pytest.mark.parametrize("start", [b"", b"\x10", b"\x10\x20\x00\x04MQ"])
async def test_a_connection_without_a_connect_is_closed(target, start):
    """Stock: it may stay forever, and holds a socket and a task."""
    answer = await raw_answer(target.port, start, timeout_s=3.0)
    assert answer == (b"" if target.hardened else None)


async def test_a_packet_above_the_limit_is_not_taken(target):
    """Stock: any size up to 256 MB is read into memory and passed on."""
    router, device = await target.connect("router-1"), await target.connect("pump-1")
    await router.subscribe(TASKS)
    device.send(packet(0x32, text(TASK) + b"\0\1" + bytes(PACKET_LIMIT + 1)))
    if target.hardened:
        await device.wait_lost()
        assert await _hears_nothing(router, for_s=0.3)
    else:
        (message,) = await router.expect(1)
        assert len(message.payload) == PACKET_LIMIT + 1


async def test_the_length_of_an_endless_packet_is_refused_before_it_is_sent(target):
    """Stock: it waits for the rest."""
    device = await target.connect("pump-1")
    device.send(b"\x32\xff\xff\xff\x7f")
    if target.hardened:
        await device.wait_lost()
    else:
        with pytest.raises(TimeoutError):
            await device.wait_lost(timeout_s=1.0)


async def test_a_stalled_reader_is_given_a_bounded_queue(target):
    """Stock: everything is kept in memory, without end, and delivered at the very last."""
    router = await target.connect("router-1")
    await router.subscribe(TASKS)
    await router.ping()
    router.stop_reading()
    device = await target.connect("pump-1")
    total = 2 * (QUEUE_LIMIT + INFLIGHT_LIMIT)
    for number in range(total):
        await device.publish(TASK, b"%04d" % number + bytes(8 * 1024))
    router.go_on_reading()
    # The reader had begun one packet before it stopped, and acknowledged that one.
    expected = QUEUE_LIMIT + INFLIGHT_LIMIT + 1 if target.hardened else total
    got = await router.expect(expected)
    await router.ping()
    assert [int(m.payload[:4]) for m in got] == list(range(expected))


async def test_a_will_asks_for_the_right_to_publish(target):
    """Stock: the will is sent whatever its topic is."""
    watcher = await target.connect("watcher-1")
    await watcher.subscribe(STATES)
    will = Will(STATE, b"forged")
    if target.hardened:
        with pytest.raises(Refused) as refusal:
            await target.connect("pump-1", will=will)
        assert refusal.value.code == 5
        assert await _hears_nothing(watcher, for_s=0.3)
    else:
        await (await target.connect("pump-1", will=will)).abort()
        assert await watcher.payloads(1) == [b"forged"]


async def test_a_resumed_session_has_the_will_of_its_last_connect(target):
    """Stock: the retain flag of the will is that of the first one."""
    node = await target.connect("edge-1", clean=False, will=Will(STATE, b"dead", retain=False))
    await node.disconnect()
    node = await target.connect("edge-1", clean=False, will=Will(STATE, b"dead", retain=True))
    early = await target.connect("watcher-1", "early")
    await early.subscribe(STATES)
    await node.abort()
    await early.expect(1)
    late = await target.connect("watcher-1", "late")
    await late.subscribe(STATES)
    assert await _hears_nothing(late) is not target.hardened


async def test_shared_subscriptions_are_refused_not_ignored(target):
    """Stock: SUBACK grants them, and nothing ever comes."""
    router = await target.connect("router-1")
    code = await router.subscribe(f"$share/group/{TASKS}")
    assert code == (0x80 if target.hardened else 1)


async def test_a_slow_acknowledgement_does_not_lose_the_message(target):
    """Stock: after five seconds without PUBACK it stops waiting, and forgets."""
    router = await target.connect("router-1", clean=False, auto_ack=False)
    await router.subscribe(TASKS)
    device = await target.connect("pump-1")
    await device.publish(TASK, b"slow")
    await router.expect(1)
    with contextlib.suppress(TimeoutError):
        await router.wait_lost(timeout_s=5.5)
    await router.abort()
    router = await target.connect("router-1", clean=False)
    if target.hardened:
        assert await router.payloads(1) == [b"slow"]
    else:
        assert await _hears_nothing(router)


@pytest.mark.parametrize("target", ["hardened"], indirect=True)
async def test_nonsense_ends_one_connection_and_nothing_else(target):
    """Every kind of broken packet; the broker goes on serving the others."""
    router = await target.connect("router-1")
    await router.subscribe(TASKS)
    broken = [
        b"\x00\x00",  # reserved type
        b"\xf0\x00",
        b"\x10\x00",  # a second CONNECT
        b"\x20\x02\x00\x00",  # CONNACK from a client
        b"\x30\x00",  # PUBLISH without a topic
        b"\x30\x02\x00\x09",  # topic longer than the packet
        b"\x36\x05\x00\x01a\x00\x01",  # quality of service 3
        b"\x30\x03\x00\x01\xff",  # topic not UTF-8
        b"\x30\x04\x00\x02a+",  # wildcard in a topic
        b"\x32\x03\x00\x01a",  # no packet id
        b"\x82\x02\x00\x01",  # SUBSCRIBE to nothing
        b"\x82\x00",
        b"\x30\x80\x80\x80\x80\x01",  # length of five digits
    ]
    for data in broken:
        probe = await target.connect("pump-1")
        probe.send(data)
        await probe.wait_lost()
    for start in (b"GET / HTTP/1.1\r\n\r\n", b"\x10\xff\xff\xff\x7f", b"\x10\x02\x00\x04"):
        assert await raw_answer(target.port, start) == b""
    device = await target.connect("pump-1")
    await device.publish(TASK, b"well")
    assert await router.payloads(1) == [b"well"]


@pytest.mark.parametrize("target", ["hardened"], indirect=True)
async def test_many_connects_of_one_client_leave_exactly_one(target, eventually):
    """Each takes over from the one before, whatever the order they are decided in."""
    async with asyncio.TaskGroup() as tasks:
        for _ in range(20):
            tasks.create_task(target.connect("edge-1", clean=False))
    await eventually(lambda: sum(not probe.lost.is_set() for probe in target.opened) == 1)
    (winner,) = (probe for probe in target.opened if not probe.lost.is_set())
    await winner.subscribe(TOPICS.build(TopicKind.INVOKE, node="edge-1"))
    router = await target.connect("router-1")
    await router.publish(TOPICS.build(TopicKind.INVOKE, node="edge-1"), b"work")
    assert await winner.payloads(1) == [b"work"]


@pytest.mark.parametrize("target", ["hardened"], indirect=True)
async def test_one_identity_cannot_fill_the_broker(target):
    """Sessions of an identity and filters of a session are counted."""
    for number in range(64):
        await target.connect("pump-1", f"pump-1-{number}")
    with pytest.raises(Refused) as refusal:
        await target.connect("pump-1", "pump-1-one-more")
    assert refusal.value.code == 3
    device = target.opened[0]
    codes = [
        await device.subscribe(f"{TOPICS.root}/reply/pump-1/{number}/n") for number in range(1001)
    ]
    assert (set(codes[:1000]), codes[1000]) == ({1}, 0x80)
