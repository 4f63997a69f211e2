"""One conformance suite over every broker; what one cannot do is asserted by its traits."""

import asyncio
import contextlib
import functools
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from broker.access import Role
from broker.control import DynamicSecurity
from broker.embedded import EmbeddedBroker
from broker.engine import speaks_mqtt
from capability_schemas.errors import BrokerUnavailable, ConfigurationError
from capability_schemas.topics import TopicKind, Topics
from mqtt_probe import Lost, Probe, Refused, Will, connect_packet, packet, raw_answer, text
from support.broker_site import BrokerSite, run_site
from support.ports import free_port

pytestmark = pytest.mark.broker

KINDS = [
    "embedded",
    pytest.param("mosquitto", marks=pytest.mark.external_broker),
    pytest.param("mosquitto_static", marks=pytest.mark.external_broker),
    pytest.param("nats", marks=pytest.mark.external_broker),
]
TOPICS = Topics()
TASKS = f"{TOPICS.root}/task/#"
REPLIES = f"{TOPICS.root}/reply/#"
TASK = TOPICS.build(TopicKind.TASK, client="pump-1")
STATE = TOPICS.build(TopicKind.NODE_STATE, node="edge-1")
STATES = TOPICS.filter(TopicKind.NODE_STATE)


@pytest.fixture(params=KINDS)
def site(request) -> BrokerSite:
    """A running broker with identities; shared, so tests leave no retained message behind."""
    found: BrokerSite = request.getfixturevalue(f"{request.param}_site")
    return found


@pytest.fixture
async def connect(site):
    """Connect as an identity; everything is closed and every session ended afterwards."""
    opened: list[tuple[Probe, str, str, bool]] = []

    async def open_probe(identity: str, client_id: str | None = None, **fields) -> Probe:
        name = client_id or identity
        fields = {"username": identity, "password": site.passwords[identity], **fields}
        probe = await _patient_open(site, name, **fields)
        opened.append((probe, identity, name, fields.get("clean", True)))
        return probe

    yield open_probe
    for probe, *_ in opened:
        await probe.abort()
    for _, identity, name, clean in opened:
        if not clean:
            ended = await _patient_open(
                site, name, username=identity, password=site.passwords[identity]
            )
            await ended.disconnect()


async def _patient_open(site: BrokerSite, name: str, **fields) -> Probe:
    """Connect; nats-server wants a second between two connections of one client id."""
    for _ in range(20):
        try:
            return await Probe.open(site.port, name, **fields)
        except Lost:
            await asyncio.sleep(0.25)
    pytest.fail("the broker never answered CONNECT")


async def _settled(*probes: Probe) -> None:
    for probe in probes:
        await probe.ping()


class TestDelivery:
    @pytest.mark.parametrize(
        "topic_filter", [TASKS, f"{TOPICS.root}/task/+/cancel", f"{TOPICS.root}/task/pump-1/cancel"]
    )
    async def test_wildcards_match_what_they_should_and_nothing_else(self, connect, topic_filter):
        router, device = await connect("router-1"), await connect("pump-1")
        await router.subscribe(topic_filter)
        for kind in (TopicKind.TASK, TopicKind.CANCEL, TopicKind.RESUME):
            await device.publish(TOPICS.build(kind, client="pump-1"), str(kind).encode())
        wanted = [b"task", b"cancel", b"resume"] if topic_filter == TASKS else [b"cancel"]
        await router.expect(len(wanted))
        await _settled(device, router)
        assert [message.payload for message in router.got] == wanted

    async def test_the_parent_of_a_subtree_belongs_to_it(self, connect):
        router, device = await connect("router-1"), await connect("pump-1")
        await router.subscribe(f"{TASK}/#")
        await device.publish(TASK, b"parent")
        assert await router.payloads(1) == [b"parent"]

    @pytest.mark.parametrize(
        ("published", "subscribed", "delivered"), [(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 1)]
    )
    async def test_delivery_has_the_lower_quality_of_service(
        self, connect, published, subscribed, delivered
    ):
        router, device = await connect("router-1"), await connect("pump-1")
        await router.subscribe(TASKS, subscribed)
        await device.publish(TASK, b"x", qos=published)
        (message,) = await router.expect(1)
        assert message.qos == delivered

    async def test_messages_of_one_publisher_stay_in_order(self, connect):
        router, device = await connect("router-1"), await connect("pump-1")
        await router.subscribe(TASKS)
        for number in range(500):
            await device.publish(TASK, b"%d" % number)
        got = await router.expect(500)
        assert [int(message.payload) for message in got] == list(range(500))

    async def test_overlapping_filters(self, site, connect):
        router, device = await connect("router-1"), await connect("pump-1")
        for topic_filter in (TASKS, f"{TOPICS.root}/task/+", TASK):
            await router.subscribe(topic_filter)
        await device.publish(TASK, b"x")
        copies = 1 if site.engine.traits.merges_overlap else 3
        await router.expect(copies)
        await _settled(device, router)
        assert len(router.got) == copies

    async def test_unsubscribe_ends_delivery(self, connect):
        router, device = await connect("router-1"), await connect("pump-1")
        await router.subscribe(TASK)
        await router.subscribe(STATES)
        await router.unsubscribe(TASK)
        node = await connect("edge-1")
        await device.publish(TASK, b"no")
        await node.publish(STATE, b"yes")
        assert await router.payloads(1) == [b"yes"]

    async def test_binary_and_large_payloads_arrive_unchanged(self, connect):
        router, device = await connect("router-1"), await connect("pump-1")
        await router.subscribe(TASKS)
        payload = bytes(range(256)) * 8192  # 2 MiB: above the task limit, below the broker's
        await device.publish(TASK, payload)
        assert await router.payloads(1) == [payload]

    async def test_qos_2(self, site, connect):
        router, device = await connect("router-1"), await connect("pump-1")
        assert await router.subscribe(TASKS, 2) in {1, 2}
        if site.engine.traits.qos2:
            await router.subscribe(TASKS, 1)
            await device.publish(TASK, b"exactly", qos=2)
            assert await router.payloads(1) == [b"exactly"]
        else:
            with pytest.raises(Lost):
                await device.publish(TASK, b"exactly", qos=2)


class TestRetained:
    async def test_the_last_message_is_kept_and_an_empty_one_clears_it(self, connect):
        node = await connect("edge-1")
        await node.publish(STATE, b"v1", retain=True)
        await node.publish(STATE, b"v2", retain=True)
        first = await connect("watcher-1", "early")
        await first.subscribe(STATES)
        assert [(m.payload, m.retain) for m in await first.expect(1)] == [(b"v2", True)]
        await node.publish(STATE, b"", retain=True)
        await first.expect(2)
        assert (first.got[1].payload, first.got[1].retain) == (b"", False)
        second = await connect("watcher-1", "late")
        await second.subscribe(STATES)
        await node.publish(STATE, b"live")
        assert [(m.payload, m.retain) for m in await second.expect(1)] == [(b"live", False)]

    async def test_subscribing_again_sends_it_again(self, connect):
        node, watcher = await connect("edge-1"), await connect("watcher-1")
        await node.publish(STATE, b"v1", retain=True)
        try:
            await watcher.subscribe(STATES)
            await watcher.expect(1)
            await watcher.subscribe(STATES)
            assert [m.retain for m in await watcher.expect(2)] == [True, True]
        finally:
            await node.publish(STATE, b"", retain=True)


class TestWills:
    WILL = Will(STATE, b"dead")

    async def test_a_reset_connection_sends_the_will(self, connect):
        watcher = await connect("watcher-1")
        await watcher.subscribe(STATES)
        node = await connect("edge-1", will=self.WILL)
        await node.abort()
        assert await watcher.payloads(1) == [b"dead"]

    async def test_a_retained_will_is_kept(self, connect):
        node = await connect("edge-1", will=Will(STATE, b"dead", retain=True))
        early = await connect("watcher-1", "early")
        await early.subscribe(STATES)
        await node.abort()
        await early.expect(1)
        late = await connect("watcher-1", "late")
        await late.subscribe(STATES)
        assert [(m.payload, m.retain) for m in await late.expect(1)] == [(b"dead", True)]
        other = await connect("edge-1")
        await other.publish(STATE, b"", retain=True)

    async def test_a_silent_client_is_cut_off_and_its_will_sent(self, connect):
        watcher = await connect("watcher-1")
        await watcher.subscribe(STATES)
        node = await connect("edge-1", will=self.WILL, keepalive=1)
        assert await watcher.payloads(1) == [b"dead"]
        await node.wait_lost()

    async def test_goodbye_sends_none(self, connect):
        watcher = await connect("watcher-1")
        await watcher.subscribe(STATES)
        node = await connect("edge-1", will=self.WILL)
        await node.disconnect()
        await (await connect("edge-2")).publish(
            TOPICS.build(TopicKind.NODE_STATE, node="edge-2"), b"other"
        )
        assert await watcher.payloads(1) == [b"other"]

    async def test_pings_keep_a_client_connected(self, connect):
        node = await connect("edge-1", will=self.WILL, keepalive=1)
        for _ in range(8):
            await node.ping()
            with contextlib.suppress(TimeoutError):
                await node.wait_lost(timeout_s=0.4)
        assert not node.lost.is_set()


class TestSessions:
    async def test_an_absent_client_gets_what_it_missed(self, connect):
        router = await connect("router-1", clean=False)
        assert not router.session_present
        await router.subscribe(TASKS)
        await router.disconnect()
        device = await connect("pump-1")
        for number in range(50):
            await device.publish(TASK, b"%d" % number)
        router = await connect("router-1", clean=False)
        assert router.session_present
        got = await router.expect(50)
        assert [int(message.payload) for message in got] == list(range(50))
        assert not any(message.retain for message in got)

    async def test_a_clean_session_forgets(self, connect):
        router = await connect("router-1", clean=False)
        await router.subscribe(TASKS)
        await router.disconnect()
        router = await connect("router-1", clean=True)
        assert not router.session_present
        await router.disconnect()
        device = await connect("pump-1")
        await device.publish(TASK, b"missed")
        router = await connect("router-1", clean=False)
        assert not router.session_present
        await router.subscribe(STATES)
        await (await connect("edge-1")).publish(STATE, b"new")
        assert await router.payloads(1) == [b"new"]

    async def test_an_unacknowledged_message_comes_again(self, site, connect):
        router = await connect("router-1", clean=False, auto_ack=False)
        await router.subscribe(TASKS)
        device = await connect("pump-1")
        for number in range(5):
            await device.publish(TASK, b"%d" % number)
        first = await router.expect(5)
        await router.abort()
        router = await connect("router-1", clean=False)
        if not site.engine.traits.redelivers_on_connect:
            await _settled(router)
            assert router.got == []  # after its ack_wait, 30 s
            return
        again = await router.expect(5)
        assert [m.payload for m in again] == [m.payload for m in first]
        assert all(message.dup for message in again)

    async def test_the_same_client_id_takes_over(self, connect):
        old = await connect("pump-1", "pump-1-cli")
        await old.subscribe(f"{TOPICS.root}/reply/pump-1/#")
        new = await connect("pump-1", "pump-1-cli")
        await old.wait_lost()
        await new.ping()

    async def test_a_device_may_connect_twice(self, connect):
        first, second = await connect("pump-1", "one"), await connect("pump-1", "two")
        await _settled(first, second)

    async def test_a_node_has_one_client_id(self, site, connect):
        if site.engine.traits.binds_client_id:
            with pytest.raises(Refused) as refusal:
                await connect("edge-1", "edge-1-second")
            assert refusal.value.code in {2, 5}
        else:
            await (await connect("edge-1", "edge-1-second")).ping()

    async def test_nobody_takes_over_the_session_of_another_identity(self, site, connect):
        node = await connect("edge-1")
        if site.engine.traits.guards_sessions:
            with pytest.raises(Refused) as refusal:
                await connect("pump-1", "edge-1")
            assert refusal.value.code == 2
            await node.ping()
        else:
            await connect("pump-1", "edge-1")
            await node.wait_lost()


class TestAdmission:
    @pytest.mark.parametrize(
        "fields",
        [
            {},
            {"username": "pump-1"},
            {"username": "pump-1", "password": "wrong"},
            {"username": "nobody", "password": "wrong"},
            {"username": "", "password": ""},
        ],
        ids=["anonymous", "no password", "wrong password", "unknown", "empty"],
    )
    async def test_without_the_right_password_nobody_gets_in(self, site, fields):
        with pytest.raises((Refused, Lost)) as refusal:
            await Probe.open(site.port, "stranger", **fields)
        if isinstance(refusal.value, Refused):
            assert refusal.value.code in {4, 5}

    async def test_a_wrong_password_does_not_touch_the_session(self, site, connect):
        node = await connect("edge-1", clean=False)
        await node.subscribe(TOPICS.build(TopicKind.INVOKE, node="edge-1"))
        for clean in (True, False):
            with pytest.raises((Refused, Lost)):
                await Probe.open(
                    site.port, "edge-1", username="edge-1", password="wrong", clean=clean
                )
        router = await connect("router-1")
        await router.publish(TOPICS.build(TopicKind.INVOKE, node="edge-1"), b"work")
        assert await node.payloads(1) == [b"work"]

    async def test_mqtt_5_is_spoken_or_refused_at_once(self, site):
        hello = connect_packet(
            "five", username="pump-1", password=site.passwords["pump-1"], level=5
        )
        answer = await raw_answer(site.port, hello)
        assert answer is not None
        if site.engine.traits.mqtt5:
            assert answer[:1] == b"\x20"
            assert answer[3] == 0
        else:
            assert answer[:1] == b"\x20"
            assert answer[3] in {0x01, 0x84}

    async def test_a_packet_above_the_limit_reaches_nobody(self, site, connect):
        router, device = await connect("router-1"), await connect("pump-1")
        await router.subscribe(TASKS)
        body = text(TASK) + b"\0\1" + bytes(site.engine.settings.packet_limit_bytes + 1)
        device.send(packet(0x32, body))
        if not site.engine.traits.limits_packets:
            (message,) = await router.expect(1)
            assert len(message.payload) > site.engine.settings.packet_limit_bytes
            return
        await device.wait_lost()
        other = await connect("pump-2")
        await other.publish(TOPICS.build(TopicKind.TASK, client="pump-2"), b"small")
        assert await router.payloads(1) == [b"small"]

    async def test_nobody_publishes_in_the_name_of_another(self, connect):
        """The whole table is tried in tests/security; this holds on every broker."""
        watcher, router = await connect("watcher-1"), await connect("router-1")
        await watcher.subscribe(STATES)
        await router.subscribe(TASKS)
        device = await connect("pump-1")
        for topic in (STATE, TOPICS.build(TopicKind.TASK, client="pump-2")):
            with contextlib.suppress(Lost):
                await device.publish(topic, b"forged")
        if device.lost.is_set():
            device = await connect("pump-1")
        await device.publish(TASK, b"own")
        await (await connect("edge-1")).publish(STATE, b"own")
        assert await router.payloads(1) == [b"own"]
        assert await watcher.payloads(1) == [b"own"]

    @pytest.mark.parametrize("topic_filter", ["#", f"{TOPICS.root}/reply/pump-2/#", REPLIES])
    async def test_nobody_hears_what_is_meant_for_another(self, site, connect, topic_filter):
        device = await connect("pump-1")
        code = await device.subscribe(topic_filter)
        assert code == (0x80 if site.engine.traits.refuses_forbidden_filter else 1)
        await device.subscribe(f"{TOPICS.root}/reply/pump-1/#")
        router = await connect("router-1")
        for client in ("pump-2", "pump-1"):
            topic = TOPICS.build(TopicKind.REPLY, client=client, task="t", source="router-1")
            await router.publish(topic, client.encode())
        await device.expect(1)
        await _settled(router, device)
        assert {message.payload for message in device.got} == {b"pump-1"}

    async def test_dollar_topics_are_the_brokers_own(self, connect):
        device = await connect("pump-1")
        device.send(packet(0x30, text("$SYS/mine") + b"x"))
        with contextlib.suppress(Lost):
            await device.ping()
        assert await (await connect("pump-1")).subscribe("$SYS/#") in {0x80, 1}
        watcher = await connect("watcher-1")
        await watcher.subscribe(STATES)
        await (await connect("edge-1")).publish(STATE, b"alive")
        assert await watcher.payloads(1) == [b"alive"]


def _state(pid: int) -> str:
    """State letter of a process; Z (dead, waiting for a parent to notice) when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "Z"


@pytest.mark.parametrize("kind", KINDS)
class TestProcess:
    @pytest.fixture
    def folder(self, kind, tmp_path):
        from conftest import require_broker  # noqa: PLC0415  # a helper beside the fixtures

        require_broker(kind)
        return tmp_path

    async def test_a_removed_identity_is_cut_off_and_a_new_one_comes_in(self, kind, folder):
        async with run_site(kind, folder) as site:
            login: dict[str, Any] = {"username": "pump-1", "password": site.passwords["pump-1"]}
            device = await Probe.open(site.port, "pump-1", **login)
            other = await Probe.open(
                site.port, "pump-2", username="pump-2", password=site.passwords["pump-2"]
            )
            store = site.engine.credentials
            store.remove("pump-1")
            site.passwords["pump-9"] = store.add("pump-9", Role.DEVICE)
            await site.engine.reload_access()
            assert site.engine.traits.revokes_at_once
            await device.wait_lost()
            with pytest.raises((Refused, Lost)):
                await Probe.open(site.port, "pump-1", **login)
            newcomer = await _patient_open(
                site, "pump-9", username="pump-9", password=site.passwords["pump-9"]
            )
            await newcomer.ping()
            await other.ping()
            for probe in (newcomer, other, device):
                await probe.abort()

    async def test_a_damaged_credentials_file_changes_nothing(self, kind, folder):
        async with run_site(kind, folder) as site:
            good = site.engine.credentials.path.read_text()
            site.engine.credentials.path.write_text("{")
            with pytest.raises(ConfigurationError, match="is damaged: Invalid JSON"):
                await site.engine.reload_access()
            os.kill(site.engine.pid, signal.SIGHUP)
            login: dict[str, Any] = {"username": "pump-1", "password": site.passwords["pump-1"]}
            async with asyncio.timeout(30):
                while True:  # a reload may cost a connection; nats-server refuses some meanwhile
                    with contextlib.suppress(Lost, Refused):
                        probe = await _patient_open(site, "pump-1", **login)
                        await probe.ping()
                        break
            await probe.abort()
            site.engine.credentials.path.write_text(good)

    async def test_a_port_in_use_is_named(self, kind, folder):
        server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(ConfigurationError, match=f"port {port}"):
            async with run_site(kind, folder, port=port):
                pass
        server.close()
        await server.wait_closed()

    async def test_a_given_port_is_used_and_no_process_stays(self, kind, folder):
        port = free_port()
        async with run_site(kind, folder, port=port) as site:
            assert site.port == port
            pid = site.engine.pid
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
        with pytest.raises(BrokerUnavailable):
            _ = site.url

    async def test_it_dies_with_its_parent(self, kind, folder, eventually):
        tests = Path(__file__).parent.parent
        parent = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            f"""
import asyncio, pathlib, sys
sys.path[:0] = [{str(tests)!r}, {str(tests.parent)!r}]
from support.broker_site import run_site

async def main():
    async with run_site({kind!r}, pathlib.Path({str(folder)!r})) as site:
        print(site.engine.pid, site.port, file=sys.stderr, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
""",
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        assert parent.stderr is not None
        pid, port = map(int, (await parent.stderr.readline()).split())
        assert await speaks_mqtt("127.0.0.1", port)
        parent.kill()
        await parent.communicate()
        await eventually(lambda: _state(pid) == "Z")

    async def test_retained_messages_and_sessions_after_a_restart(self, kind, folder, eventually):
        async with run_site(kind, folder) as site:
            logins: dict[str, dict[str, Any]] = {
                name: {"username": name, "password": site.passwords[name]}
                for name in ("edge-1", "router-1")
            }
            router = await Probe.open(site.port, "router-1", clean=False, **logins["router-1"])
            await router.subscribe(STATES)
            node = await Probe.open(site.port, "edge-1", **logins["edge-1"])
            await node.publish(STATE, b"kept", retain=True)
            await router.expect(1)
            await _settled(router)
            await router.disconnect()
            await node.disconnect()
            engine = type(site.engine)(
                **{
                    "settings": site.engine.settings,
                    "credentials": site.engine.credentials,
                    "topics": TOPICS,
                    **({"passwords": site.passwords} if kind == "nats" else {}),
                }
            )
        async with engine:
            router = await Probe.open(engine.port, "router-1", clean=False, **logins["router-1"])
            await router.subscribe(STATES)
            assert router.session_present is engine.traits.survives_restart
            if engine.traits.keeps_retained:
                await eventually(
                    lambda: (b"kept", True) in [(m.payload, m.retain) for m in router.got]
                )
            await router.abort()

    async def test_entering_twice_is_refused(self, kind, folder):
        async with run_site(kind, folder) as site:
            with pytest.raises(RuntimeError, match="entered already"):
                await site.engine.__aenter__()

    async def test_a_killed_broker_is_noticed(self, kind, folder):
        async with run_site(kind, folder) as site:
            os.kill(site.engine.pid, signal.SIGKILL)
            async with asyncio.timeout(10):
                assert await site.engine.wait() == -signal.SIGKILL


def test_the_embedded_broker_is_always_there():
    assert EmbeddedBroker.available()


@pytest.mark.external_broker
async def test_what_others_told_mosquittos_plugin_is_undone(tmp_path):
    """The table is the truth: whatever else is in the broker goes with the next reload."""
    from conftest import require_broker  # noqa: PLC0415  # a helper beside the fixtures

    require_broker("mosquitto")
    async with run_site("mosquitto", tmp_path) as site:
        engine = site.engine
        device = await Probe.open(
            site.port, "pump-1", username="pump-1", password=site.passwords["pump-1"]
        )
        everything = [
            {"acltype": kind, "topic": "#", "allow": True}
            for kind in ("publishClientSend", "subscribePattern", "publishClientReceive")
        ]
        async with DynamicSecurity(host="127.0.0.1", port=site.port, password=engine._control) as c:
            await c.run(
                [
                    {"command": "createRole", "rolename": "all", "acls": everything},
                    {"command": "createClient", "username": "intruder", "password": "intruder"},
                    {"command": "addClientRole", "username": "intruder", "rolename": "all"},
                    {"command": "addClientRole", "username": "pump-1", "rolename": "all"},
                ]
            )
        login = functools.partial(
            Probe.open, site.port, "intruder", username="intruder", password="intruder"
        )
        intruder = await login()
        assert await intruder.subscribe("#") == 1
        await engine.reload_access()
        for probe in (intruder, device):
            await probe.wait_lost()
            await probe.abort()
        with pytest.raises(Refused):
            await login()
        device = await Probe.open(
            site.port, "pump-1", username="pump-1", password=site.passwords["pump-1"]
        )
        assert await device.subscribe("#") == 0x80
        await device.abort()
