"""Every role tries every topic, with real connections, and gets exactly what the table says.

Judged by what is delivered: Mosquitto with access files grants every subscription and confirms
every publish, and then does nothing. Payloads say who published what, so that all roles are tried
at once over few connections.
"""

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from broker.access import AccessPolicy, Action, CredentialStore, Role
from broker.access.authority import Authority, make_key_and_request, read_request
from broker.access.dynamic_security import CONTROL_TOPIC
from broker.embedded import EmbeddedBroker
from broker.engine import ChildEngine, EngineSettings
from broker.mosquitto import MosquittoBroker
from broker.nats import NatsBroker
from broker.tls import TlsListener
from capability_schemas.topics import TOPICS, TopicKind, Topics
from conftest import require_broker
from mqtt_probe import DEADLINE_S, Lost, Probe, Refused, Will

pytestmark = [pytest.mark.broker, pytest.mark.asyncio(loop_scope="module")]

T = Topics()
POLICY = AccessPolicy(T)
NAMES = {role: f"x-{role}" for role in Role}
OWNERS = {
    "client": NAMES[Role.DEVICE],
    "node": NAMES[Role.NODE],
    "member": NAMES[Role.NODE],
    "router": NAMES[Role.ROUTER],
    "target": NAMES[Role.ROUTER],
    "source": NAMES[Role.NODE],
    "request": NAMES[Role.ENROLLEE],
}


class Site:
    """One broker with a member of each role."""

    def __init__(self, kind: str, folder: Any, *, tls: TlsListener | None = None) -> None:
        self.kind = kind
        self.folder = folder
        self.store = CredentialStore(folder / "credentials.json")
        self.passwords = {name: self.store.add(name, role) for role, name in NAMES.items()}
        access: Any = {"mosquitto": "dynamic", "mosquitto_static": "static"}.get(kind)
        parts: dict[str, Any] = {
            "settings": EngineSettings(data_dir=folder / "broker", access=access, tls=tls),
            "credentials": self.store,
            "topics": T,
        }
        if kind == "nats":
            self.engine: ChildEngine = NatsBroker(**parts, passwords=self.passwords)
        else:
            engine = EmbeddedBroker if kind == "embedded" else MosquittoBroker
            self.engine = engine(**parts)

    @property
    def qos(self) -> int:
        """Of subscriptions: nats-server makes a consumer, slowly, for each of QoS 1."""
        return 0 if self.kind == "nats" else 1

    async def open(self, name: str, client_id: str | None = None, **fields: Any) -> Probe:
        """Connect a member; nats-server wants a second between two connections of one id."""
        login = {"username": name, "password": self.passwords[name], **fields}
        for _ in range(20):
            try:
                return await Probe.open(self.engine.port, client_id or name, **login)
            except Lost:
                await asyncio.sleep(0.25)
        pytest.fail("the broker never answered CONNECT")

    async def add(self, name: str, role: Role) -> None:
        """Make a member, and wait until the broker has heard of it."""
        self.passwords[name] = self.store.add(name, role)
        await self.engine.reload_access()
        async with asyncio.timeout(DEADLINE_S):
            while True:
                try:
                    return await (await self.open(name, f"{name}-trial")).disconnect()
                except Refused:
                    await asyncio.sleep(0.05)

    async def remove(self, name: str) -> None:
        self.store.remove(name)
        self.passwords.pop(name)
        await self.engine.reload_access()


class Crowd:
    """A connection for each role, closed at the end."""

    def __init__(self, site: Site, stack: contextlib.AsyncExitStack) -> None:
        self._site = site
        self._stack = stack
        self.probes: dict[Role, Probe] = {}

    async def join(self) -> None:
        for role, name in NAMES.items():
            self.probes[role] = await self._site.open(name)
            self._stack.push_async_callback(self.probes[role].abort)

    async def publish(self, role: Role, topic: str, *, retain: bool = False) -> None:
        """Say who says what where."""
        await self.probes[role].publish(
            topic, json.dumps([role, topic]).encode(), retain=retain, qos=self._site.qos
        )

    async def subscribe(self, role: Role, topic_filter: str) -> int:
        return await self.probes[role].subscribe(topic_filter, self._site.qos)

    async def settled(self) -> None:
        for _ in range(2):
            for probe in self.probes.values():
                await probe.ping()

    async def heard(self) -> set[tuple[Role, str, str]]:
        """Return who heard what from whom: (listener, author, topic)."""
        await self.settled()
        said = [
            (role, json.loads(message.payload))
            for role, probe in self.probes.items()
            for message in probe.got
            if message.payload
        ]
        # The embedded broker has events of its own to tell, of what it refused.
        return {(role, *words) for role, words in said if isinstance(words, list)}

    async def forget(self, topics: set[str]) -> None:
        """Clear what is kept, by whoever may."""
        for topic in sorted(topics):
            author = _someone(Action.PUBLISH, topic)
            if author is not None:
                await self.probes[author].publish(topic, b"", retain=True, qos=self._site.qos)
        await self.settled()


@pytest_asyncio.fixture(
    scope="module",
    loop_scope="module",
    params=[
        "embedded",
        pytest.param("mosquitto", marks=pytest.mark.external_broker),
        pytest.param("mosquitto_static", marks=pytest.mark.external_broker),
        pytest.param("nats", marks=pytest.mark.external_broker),
    ],
)
async def site(request, tmp_path_factory) -> AsyncIterator[Site]:
    """A running broker, shared: tests leave nothing behind."""
    require_broker(request.param)
    made = Site(request.param, tmp_path_factory.mktemp(request.param))
    async with made.engine:
        yield made


@pytest_asyncio.fixture(loop_scope="module")
async def crowd(site) -> AsyncIterator[Crowd]:
    async with contextlib.AsyncExitStack() as stack:
        made = Crowd(site, stack)
        await made.join()
        yield made


def _topics(subject: str) -> set[str]:
    """Every kind of topic: with its natural owners, and with ``subject`` at each level."""
    found = set()
    for kind in TopicKind:
        names = TOPICS[kind].variables
        for replaced in (None, *names):
            levels = {name: OWNERS.get(name, name) for name in names}
            if replaced is not None:
                levels[replaced] = subject
            found.add(T.build(kind, **levels))
    return found


ALL_TOPICS = sorted(set().union(*(_topics(name) for name in NAMES.values())))


def _filters(subject: str) -> list[str]:
    """Filters of every width over those topics, and far too wide ones."""
    found = {"#", "+/#", f"{T.root}/#", f"{T.prefix}/#", "$SYS/#", "$CONTROL/#", *_topics(subject)}
    found |= {f"{T.prefix}/+/task/#", f"{T.root}/+", f"{T.root}/+/+/#", "+/+/+/+/+"}
    for kind in TopicKind:
        names = TOPICS[kind].variables
        found |= {T.filter(kind), T.filter(kind).partition("/+")[0] + "/#"}
        found |= {T.filter(kind, **{name: subject}) for name in names}
        found |= {T.filter(kind, **{name: subject}).partition("/+")[0] + "/#" for name in names}
    return sorted(found)


def _may(role: Role, action: Action, topic: str) -> bool:
    return POLICY.allows(role, NAMES[role], action, topic)


def _someone(action: Action, topic: str) -> Role | None:
    """Return a role whose member here may do ``action`` on ``topic``, if any."""
    return next((role for role in Role if _may(role, action, topic)), None)


class TestTheTable:
    async def test_what_is_published_is_heard_when_the_table_allows_it(self, crowd):
        listened = {t: _someone(Action.RECEIVE, t) for t in ALL_TOPICS}
        for topic, listener in listened.items():
            if listener is not None:
                await crowd.subscribe(listener, topic)
        tried = [(role, t) for role in Role for t in ALL_TOPICS if listened[t] is not None]
        for role, topic in tried:
            await crowd.publish(role, topic)
        allowed = {(r, t) for r, t in tried if _may(r, Action.PUBLISH, t)}
        assert {(author, topic) for _, author, topic in await crowd.heard()} == allowed
        assert 0 < len(allowed) < len(tried)
        assert {role for role, _ in allowed} == set(Role) - {Role.OBSERVER}

    async def test_what_is_kept_was_published_by_somebody_who_may(self, crowd):
        forbidden = [
            (role, t) for role in Role for t in ALL_TOPICS if not _may(role, Action.PUBLISH, t)
        ]
        for role, topic in forbidden:
            await crowd.publish(role, topic, retain=True)
        await crowd.settled()
        for topic in ALL_TOPICS:
            listener = _someone(Action.RECEIVE, topic)
            if listener is not None:
                await crowd.subscribe(listener, topic)
        assert await crowd.heard() == set()

    @pytest.mark.parametrize("retained", [False, True], ids=["live", "retained"])
    async def test_what_is_received_the_table_allows(self, site, crowd, retained):
        said = {t: author for t in ALL_TOPICS if (author := _someone(Action.PUBLISH, t))}

        async def say_everything() -> None:
            for topic, author in said.items():
                await crowd.publish(author, topic, retain=retained)
            await crowd.settled()

        if retained:
            await say_everything()
        for role in Role:
            for topic_filter in _filters(NAMES[role]):
                code = await crowd.subscribe(role, topic_filter)
                if site.engine.traits.refuses_forbidden_filter:
                    allowed = _may(role, Action.SUBSCRIBE, topic_filter)
                    assert (code != 0x80) is allowed, (role, topic_filter)
        if not retained:
            await say_everything()
        # The filters of a role are those over its own name and the natural owners.
        asked = {role: _topics(NAMES[role]) for role in Role}
        heard = {(reader, topic) for reader, _, topic in await crowd.heard()}
        receivable = {(r, t) for r in Role for t in said if _may(r, Action.RECEIVE, t)}
        assert heard <= receivable
        assert {(r, t) for r, t in heard if t in asked[r]} == {
            (r, t) for r, t in receivable if t in asked[r]
        }
        if retained:
            await crowd.forget(set(said))

    async def test_a_shared_subscription_opens_nothing(self, crowd):
        """Whether a broker knows shared subscriptions or not: the same rights count."""
        for role in Role:
            for wide in ("#", f"{T.root}/#", f"{T.root}/reply/#", f"{T.root}/task/#"):
                await crowd.subscribe(role, f"$share/{role}/{wide}")
        for topic in ALL_TOPICS:
            author = _someone(Action.PUBLISH, topic)
            if author is not None:
                await crowd.publish(author, topic)
        heard = await crowd.heard()
        assert [entry for entry in heard if not _may(entry[0], Action.RECEIVE, entry[2])] == []

    async def test_the_brokers_own_topics_are_out_of_reach(self, site, crowd):
        for role in Role:
            for own in ("$SYS/#", "$SYS/broker/uptime", f"{CONTROL_TOPIC}/#", "$CONTROL/#"):
                await crowd.subscribe(role, own)
        create = {
            "commands": [
                {"command": "createClient", "username": "intruder", "password": "guessed"},
                {"command": "addClientRole", "username": NAMES[Role.DEVICE], "rolename": "$foam"},
            ]
        }
        for probe in [*crowd.probes.values()]:
            with contextlib.suppress(Lost):  # hanging up is an answer too
                await probe.publish(CONTROL_TOPIC, json.dumps(create).encode())
                await probe.publish("$SYS/broker/uptime", b"0")
                await probe.ping()
        assert [m.topic for probe in crowd.probes.values() for m in probe.got] == []
        with pytest.raises((Refused, Lost)):
            await Probe.open(site.engine.port, "i", username="intruder", password="guessed")


class TestWills:
    FORBIDDEN = T.build(TopicKind.NODE_STATE, node=NAMES[Role.NODE])
    OWN = T.build(TopicKind.TASK, client=NAMES[Role.DEVICE])

    async def test_a_will_has_the_rights_of_who_left_it(self, site):
        watcher = await site.open(NAMES[Role.OBSERVER])
        await watcher.subscribe(self.FORBIDDEN, site.qos)
        router = await site.open(NAMES[Role.ROUTER])
        await router.subscribe(self.OWN, site.qos)
        for topic, retain in ((self.FORBIDDEN, False), (self.FORBIDDEN, True), (self.OWN, False)):
            will = Will(topic, b"last words", qos=0, retain=retain)
            try:
                device = await site.open(NAMES[Role.DEVICE], f"will-{retain}", will=will)
            except Refused:  # for the will's sake: no less good
                assert topic == self.FORBIDDEN
                continue
            await device.abort()
        await router.expect(1)
        for probe in (router, watcher):
            await probe.ping()
            await probe.ping()
        late = await site.open(NAMES[Role.ADMIN])
        await late.subscribe(self.FORBIDDEN, site.qos)
        await late.ping()
        assert (watcher.got, late.got) == ([], [])
        for probe in (watcher, router, late):
            await probe.abort()


class TestPretenders:
    async def test_a_password_opens_one_name(self, site):
        for role in (Role.NODE, Role.ROUTER, Role.REGISTRY, Role.ADMIN):
            for client_id in (NAMES[role], NAMES[Role.DEVICE]):
                with pytest.raises((Refused, Lost)):
                    await Probe.open(
                        site.engine.port,
                        client_id,
                        username=NAMES[role],
                        password=site.passwords[NAMES[Role.DEVICE]],
                    )

    async def test_the_client_id_of_another_gives_none_of_its_rights(self, site):
        """Where it can be taken at all, a device is a device still."""
        node, router = NAMES[Role.NODE], await site.open(NAMES[Role.ROUTER])
        invoke, state = T.build(TopicKind.INVOKE, node=node), T.filter(TopicKind.NODE_STATE)
        own = T.build(TopicKind.REPLY, client=NAMES[Role.DEVICE], task="t", source="x-router")
        there = await site.open(node, clean=False)
        await there.subscribe(invoke, site.qos)
        await there.disconnect()
        await router.subscribe(state, site.qos)
        try:
            device = await site.open(NAMES[Role.DEVICE], node, clean=False)
        except Refused:
            assert site.engine.traits.guards_sessions
        else:
            assert not site.engine.traits.guards_sessions
            with contextlib.suppress(Lost):
                await device.publish(T.build(TopicKind.NODE_STATE, node=node), b"{}", qos=site.qos)
                await device.subscribe(own, site.qos)
                await device.ping()
            if device.lost.is_set():
                device = await site.open(NAMES[Role.DEVICE], node, clean=False)
                await device.subscribe(own, site.qos)
            await router.publish(invoke, b"for the node")
            await router.publish(own, b"for the device")
            await device.expect(1)
            await device.ping()
            assert {message.payload for message in device.got} == {b"for the device"}
            await device.abort()
        await router.ping()
        assert router.got == []
        await router.abort()
        await (await site.open(node)).disconnect()  # ends the session that was kept

    async def test_a_session_outlives_no_right(self, site):
        """What was subscribed to, or kept by the broker, before the right to it was lost."""
        told = T.build(TopicKind.EVENT, source=NAMES[Role.NODE], kind="lifecycle")
        own = T.build(TopicKind.REPLY, client="turncoat", task="t", source=NAMES[Role.ROUTER])
        await site.add("turncoat", Role.OBSERVER)
        watcher = await site.open("turncoat", clean=False)
        await watcher.subscribe(T.filter(TopicKind.EVENT), 1)
        node, router = await site.open(NAMES[Role.NODE]), await site.open(NAMES[Role.ROUTER])
        await node.publish(told, b"kept", retain=True)
        await watcher.expect(1)
        await watcher.disconnect()
        await node.publish(told, b"kept as well", retain=True)
        await site.remove("turncoat")
        await site.add("turncoat", Role.DEVICE)
        if node.lost.is_set() or router.lost.is_set():  # a reload may cost a connection (NATS)
            node, router = await site.open(NAMES[Role.NODE]), await site.open(NAMES[Role.ROUTER])
        device = await site.open("turncoat", clean=False)
        await node.publish(told, b"kept too", retain=True)
        for topic_filter in (T.filter(TopicKind.EVENT), told):
            await device.subscribe(topic_filter, 1)
        await device.subscribe(own, 1)
        await router.publish(own, b"own")
        await device.expect(1)
        for _ in range(2):
            await node.ping()
            await device.ping()
        assert [message.payload for message in device.got] == [b"own"]
        await node.publish(told, b"", retain=True)
        await node.ping()
        for probe in (device, node, router):
            await probe.abort()
        await site.remove("turncoat")


class Papers:
    """A site's authority on disk, and certificates of its members."""

    def __init__(self, folder: Any) -> None:
        self.folder = folder
        folder.mkdir()
        self.authority = Authority.create(folder / "authority", site="local")
        key, made = self.authority.issue_server(["127.0.0.1"])
        for name, text in (
            ("server.key", key),
            ("server.crt", made.pem),
            ("ca.pem", self.authority.bundle),
        ):
            (folder / name).write_text(text)
        self.revoke(set())

    def listener(self) -> TlsListener:
        return TlsListener(
            host="127.0.0.1",
            port=0,
            cert_file=self.folder / "server.crt",
            key_file=self.folder / "server.key",
            ca_file=self.folder / "ca.pem",
            crl_file=self.folder / "crl.pem",
        )

    def certify(self, name: str, role: Role) -> tuple[str, ssl.SSLContext]:
        key, csr = make_key_and_request(name)
        made = self.authority.issue_client(read_request(csr, name), identity=name, role=role)
        (self.folder / f"{made.serial}.pem").write_text(key + made.pem)
        context = self.trusting()
        context.load_cert_chain(self.folder / f"{made.serial}.pem")
        return made.serial, context

    def trusting(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.folder / "ca.pem"))

    def revoke(self, on_record: set[str]) -> None:
        gone = self.authority.not_on_record(on_record)
        (self.folder / "crl.pem").write_text(self.authority.revocation_list(gone))


NODE, DEVICE = "c-node", "c-device"
STATE = T.build(TopicKind.NODE_STATE, node=NODE)
TASK = T.build(TopicKind.TASK, client=DEVICE)
REPLY = T.build(TopicKind.REPLY, client=DEVICE, task="t", source=NAMES[Role.ROUTER])


class Certified:
    """A broker with TLS, two members with certificates, and two who listen."""

    def __init__(self, kind: str, folder: Any, stack: contextlib.AsyncExitStack) -> None:
        self._stack = stack
        self.papers = Papers(folder / "papers")
        self.site = Site(kind, folder, tls=self.papers.listener())
        self.engine = self.site.engine
        self.contexts: dict[str, ssl.SSLContext] = {}
        self.serials: dict[str, str] = {}
        for name, role in ((NODE, Role.NODE), (DEVICE, Role.DEVICE)):
            self.serials[name], self.contexts[name] = self.papers.certify(name, role)
            self.site.store.add(name, role, serial=self.serials[name])
        _, self.contexts["stray"] = self.papers.certify(NODE, Role.NODE)  # not on record
        self.papers.revoke(set(self.serials.values()))

    async def start(self) -> None:
        await self._stack.enter_async_context(self.engine)
        self.watcher = await self.site.open(NAMES[Role.ADMIN])
        self.router = await self.site.open(NAMES[Role.ROUTER])
        await self.watcher.subscribe(T.filter(TopicKind.NODE_STATE))
        await self.router.subscribe(T.filter(TopicKind.TASK))
        for probe in (self.watcher, self.router):
            self._stack.push_async_callback(probe.abort)

    async def come(self, name: str, client_id: str | None = None, **fields: Any) -> Probe:
        """Connect with a certificate."""
        port, context = self.engine.members_port, self.contexts[name]
        probe = await Probe.open(port, client_id or name, tls=context, **fields)
        self._stack.push_async_callback(probe.abort)
        return probe

    async def refused(self, name: str) -> None:
        """Wait until a certificate opens nothing: a broker told by a signal needs a moment."""
        async with asyncio.timeout(DEADLINE_S):
            while True:
                try:
                    await (await self.come(name, "again")).abort()
                except (Lost, Refused):
                    return

    async def settled(self) -> None:
        for probe in (self.watcher, self.router) * 2:
            await probe.ping()


@pytest_asyncio.fixture(
    loop_scope="module",
    params=[
        "embedded",
        pytest.param("mosquitto", marks=pytest.mark.external_broker),
        pytest.param("mosquitto_static", marks=pytest.mark.external_broker),
    ],
)
async def certified(request, tmp_path) -> AsyncIterator[Certified]:
    require_broker(request.param)
    async with contextlib.AsyncExitStack() as stack:
        made = Certified(request.param, tmp_path, stack)
        await made.start()
        yield made


class TestCertificates:
    async def test_a_certificate_opens_what_its_name_may(self, certified):
        assert certified.engine.traits.certificates
        members = [await certified.come(NODE), await certified.come(DEVICE)]
        for name, probe in zip((NODE, DEVICE), members, strict=True):
            for topic in (STATE, TASK):
                await probe.publish(topic, name.encode())
            await probe.subscribe(REPLY)
        await certified.router.publish(REPLY, b"to the device")
        await members[1].expect(1)
        await certified.settled()
        for probe in members:
            await probe.ping()
        assert [m.payload for m in certified.watcher.got] == [NODE.encode()]
        assert [m.payload for m in certified.router.got] == [DEVICE.encode()]
        assert [m.payload for m in members[0].got] == []

    async def test_only_the_certificate_on_record_counts(self, certified):
        with pytest.raises((Lost, Refused)):
            await certified.come("stray", NODE)
        trusting = certified.papers.trusting()
        with pytest.raises((Lost, Refused)):  # none at all, and no password
            await Probe.open(certified.engine.members_port, DEVICE, username=DEVICE, tls=trusting)
        with contextlib.suppress(Lost, Refused):  # a user name beside it makes nobody another
            liar = await certified.come(DEVICE, "liar", username=NODE, password="x")
            await liar.publish(STATE, b"liar")
            await liar.ping()
        with contextlib.suppress(Lost, Refused):
            liar = await certified.come(DEVICE, "liar", username=NAMES[Role.REGISTRY])
            await liar.publish(T.build(TopicKind.CONTROL, node=NODE), b"liar")
            await liar.publish(STATE, b"liar")
            await liar.ping()
        await certified.settled()
        assert certified.watcher.got == []

    async def test_passwords_have_a_listener_with_tls_as_well(self, certified):
        name = NAMES[Role.DEVICE]
        device = await Probe.open(
            certified.engine.tls_port,
            name,
            username=name,
            password=certified.site.passwords[name],
            tls=certified.papers.trusting(),
        )
        await device.publish(T.build(TopicKind.TASK, client=name), b"by password")
        assert await certified.router.payloads(1) == [b"by password"]
        await device.abort()

    async def test_what_is_revoked_has_no_rights_from_then_on(self, certified):
        node, device = await certified.come(NODE), await certified.come(DEVICE)
        certified.site.store.remove(NODE)
        certified.papers.revoke({certified.serials[DEVICE]})
        await certified.engine.reload_access()
        await certified.refused(NODE)
        if certified.engine.traits.cuts_certificates:
            await node.wait_lost()
        else:
            await node.publish(STATE, b"ghost")
            await node.ping()
        await device.publish(TASK, b"still here")
        assert await certified.router.payloads(1) == [b"still here"]
        await certified.settled()
        assert certified.watcher.got == []
