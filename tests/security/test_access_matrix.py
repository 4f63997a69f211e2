"""Every role tries every topic, with real connections, and gets exactly what the table says."""

import contextlib

import pytest

from broker.access import AccessPolicy, Action, CredentialStore, Role
from broker.embedded import EmbeddedBroker
from broker.engine import EngineSettings
from broker.mosquitto import MosquittoBroker
from capability_schemas.topics import TOPICS, TopicKind, Topics, matches
from mqtt_probe import Probe

pytestmark = pytest.mark.broker

T = Topics()
POLICY = AccessPolicy(T)
ENGINES = {"embedded": EmbeddedBroker, "mosquitto": MosquittoBroker}
NAMES = {role: f"x-{role}" for role in Role}
OWNERS = {
    "client": NAMES[Role.DEVICE],
    "node": NAMES[Role.NODE],
    "router": NAMES[Role.ROUTER],
    "target": NAMES[Role.ROUTER],
    "source": NAMES[Role.NODE],
    "request": NAMES[Role.ENROLLEE],
}


def _topics(subject: str) -> list[str]:
    """Every kind of topic: with its natural owners, and with ``subject`` at each level."""
    found = set()
    for kind in TopicKind:
        names = TOPICS[kind].variables
        for replaced in (None, *names):
            levels = {name: OWNERS.get(name, name) for name in names}
            if replaced is not None:
                levels[replaced] = subject
            found.add(T.build(kind, **levels))
    return sorted(found)


def _filters(subject: str) -> list[str]:
    """Filters of every width over those topics, and far too wide ones."""
    found = {"#", "+/#", f"{T.root}/#", "$SYS/#", f"{T.prefix}/+/task/#", *_topics(subject)}
    for kind in TopicKind:
        names = TOPICS[kind].variables
        found |= {T.filter(kind), T.filter(kind).partition("/+")[0] + "/#"}
        found |= {T.filter(kind, **{name: subject}) for name in names}
        found |= {T.filter(kind, **{name: subject}).partition("/+")[0] + "/#" for name in names}
    return sorted(found)


def _someone(action: Action, topic: str) -> Role | None:
    """Return a role whose member here may do ``action`` on ``topic``, if any."""
    return next((r for r in Role if POLICY.allows(r, NAMES[r], action, topic)), None)


@pytest.fixture(params=ENGINES)
async def people(request, tmp_path):
    """A broker, and one connection for each role."""
    from conftest import require_broker  # noqa: PLC0415  # a helper beside the fixtures

    require_broker(request.param)
    store = CredentialStore(tmp_path / "credentials.json")
    passwords = {role: store.add(NAMES[role], role) for role in Role}
    settings = EngineSettings(data_dir=tmp_path / "broker")
    async with contextlib.AsyncExitStack() as stack:
        engine = await stack.enter_async_context(
            ENGINES[request.param](settings=settings, credentials=store, topics=T)
        )
        probes = {}
        for role, name in NAMES.items():
            probes[role] = await Probe.open(
                engine.port, name, username=name, password=passwords[role]
            )
            stack.push_async_callback(probes[role].abort)
        yield engine, probes


async def _settled(probes: dict[Role, Probe]) -> None:
    for _ in range(2):
        for probe in probes.values():
            await probe.ping()


@pytest.mark.parametrize("role", Role)
async def test_what_a_role_publishes_is_heard_when_the_table_allows_it(people, role):
    _, probes = people
    tried = [t for t in _topics(NAMES[role]) if _someone(Action.SUBSCRIBE, t) is not None]
    for topic in tried:
        listener = _someone(Action.SUBSCRIBE, topic)
        assert listener is not None
        await probes[listener].subscribe(topic)
    for topic in tried:
        await probes[role].publish(topic, b"x")
    await _settled(probes)
    heard = {message.topic for probe in probes.values() for message in probe.got}
    assert heard == {t for t in tried if POLICY.allows(role, NAMES[role], Action.PUBLISH, t)}
    assert len(tried) > len(heard)


@pytest.mark.parametrize("retained", [False, True], ids=["live", "retained"])
@pytest.mark.parametrize("role", Role)
async def test_a_role_receives_what_the_table_allows_and_nothing_else(people, role, retained):
    engine, probes = people
    subject = probes[role]
    said = {t: _someone(Action.PUBLISH, t) for t in _topics(NAMES[role])}

    async def say_everything() -> None:
        for topic, speaker in said.items():
            if speaker is not None:
                await probes[speaker].publish(topic, b"x", retain=retained)

    if retained:
        await say_everything()
    for topic_filter in _filters(NAMES[role]):
        code = await subject.subscribe(topic_filter)
        allowed = POLICY.allows(role, NAMES[role], Action.SUBSCRIBE, topic_filter)
        if engine.traits.refuses_forbidden_filter:
            assert (code != 0x80) is allowed, topic_filter
    if not retained:
        await say_everything()
    await _settled(probes)
    receivable = {
        topic
        for topic, speaker in said.items()
        if speaker is not None and POLICY.allows(role, NAMES[role], Action.RECEIVE, topic)
    }
    assert {message.topic for message in subject.got} == receivable
    held = POLICY.filters(role, NAMES[role]).subscribe
    assert all(any(matches(f, message.topic) for f in held) for message in subject.got)
