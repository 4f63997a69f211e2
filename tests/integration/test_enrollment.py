"""Enrollment for real: a broker with TLS, a registry, and newcomers that know only a token."""

import asyncio
import contextlib
import json
import stat

import pytest
from pydantic import SecretStr

from broker.access import CredentialStore, Role
from broker.access.authority import Authority
from broker.access.orders import Requester
from broker.embedded import EmbeddedBroker
from broker.engine import EngineSettings
from broker.session.mqtt import MqttSession
from broker.session.settings import SessionSettings
from broker.tls import TlsListener, TlsSettings
from capability_schemas.capability import CapabilityPolicy
from capability_schemas.enrollment import JoinToken
from capability_schemas.errors import (
    AccessDenied,
    BrokerUnavailable,
    ConfigurationError,
    Conflict,
    Unavailable,
)
from capability_schemas.signing import SigningKey
from capability_schemas.topics import TopicKind, Topics
from foam import enrolling
from foam.enrolling import enroll, is_still_member, store_papers
from foam.mesh import Identity, load_key, tls_files
from foam.renewal import Renewal
from registry.enrollment import EnrollmentDesk, EnrollmentService
from registry.store.audit import AuditLog, verify_trail
from support.ports import free_port

ADMIN = Requester("admin-1", Role.ADMIN)
pytestmark = pytest.mark.broker

SITE = "hall-3"
TOPICS = Topics(site=SITE)
KEY = SigningKey.generate()


class Mesh:
    """The parts of a site that newcomers meet."""

    def __init__(self, folder, engine, credentials, authority, desk, service, events):
        self.folder = folder
        self.engine = engine
        self.credentials = credentials
        self.authority = authority
        self.desk = desk
        self.service = service
        self.events = events
        self.desk_brokers = []

    @property
    def url(self):
        return f"mqtts://127.0.0.1:{self.engine.tls_port}"

    async def token(self, **args):
        made = await self.service.verbs["token_create"](args, ADMIN)
        await self.engine.reload_access()
        return JoinToken.parse(made["token"])

    async def join(self, token, name="edge-1", role=Role.NODE, **changes):
        given = {"url": self.url, "site": SITE, "timeout_s": 30.0}
        papers = await enroll(token=token, identity=name, role=role, **given | changes)
        await self.engine.reload_access()
        return papers

    def session(self, path, **changes):
        """A session of an enrolled member, made from its files alone."""
        member = Identity.read(path)
        fields = {
            "urls": (self.url,),
            "client_id": member.id,
            "username": member.username,
            "password": member.password,
            "tls": tls_files(path.parent, member),
        }
        return MqttSession(settings=SessionSettings(**fields | changes))


@pytest.fixture
async def mesh(tmp_path):
    credentials = CredentialStore(tmp_path / "credentials.json")
    authority = Authority.create(tmp_path / "authority", site=SITE)
    key, made = authority.issue_server(["127.0.0.1", "localhost"])
    (tmp_path / "server.key").write_text(key)
    (tmp_path / "server.crt").write_text(made.pem)
    (tmp_path / "ca.pem").write_text(authority.bundle)
    listener = TlsListener(
        host="127.0.0.1",
        port=0,
        cert_file=tmp_path / "server.crt",
        key_file=tmp_path / "server.key",
        ca_file=tmp_path / "ca.pem",
    )
    password = credentials.add("registry-1", Role.REGISTRY)
    events = []
    brokers = ["mqtts://broker.test:8883"]
    async with contextlib.AsyncExitStack() as stack:
        engine = await stack.enter_async_context(
            EmbeddedBroker(
                settings=EngineSettings(data_dir=tmp_path / "broker", tls=listener),
                credentials=credentials,
                topics=TOPICS,
            )
        )
        session = await stack.enter_async_context(
            MqttSession(
                settings=SessionSettings(
                    urls=(engine.url,),
                    client_id="registry-1",
                    username="registry-1",
                    password=SecretStr(password),
                )
            )
        )
        await session.wait_connected(20)
        desk = EnrollmentDesk(
            path=tmp_path / "enrollment.json",
            site=SITE,
            registry_id="registry-1",
            key=KEY,
            credentials=credentials,
            authority=authority,
            brokers=lambda: brokers,
        )
        trail = stack.enter_context(AuditLog(tmp_path / "audit.sqlite", key=KEY))
        service = EnrollmentService(
            session=session,
            topics=TOPICS,
            desk=desk,
            trail=trail,
            emit=lambda kind, data: events.append((kind, data)),
            registry_id="registry-1",
        )
        await stack.enter_async_context(service)
        mesh = Mesh(tmp_path, engine, credentials, authority, desk, service, events)
        mesh.desk_brokers = brokers
        yield mesh


async def test_a_node_joins_with_a_token_and_logs_on_with_its_certificate(mesh):
    token = await mesh.token(role="node", zones=["hall-3"])
    papers = await mesh.join(token)
    path = store_papers(papers, mesh.folder / "new")
    for file in path.parent.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
    member = Identity.read(path)
    assert member.password is None
    assert member.attested == CapabilityPolicy(zones=("hall-3",))
    async with mesh.session(path) as session:
        await session.wait_connected(20)
        await session.publish(TOPICS.build(TopicKind.NODE_STATE, node="edge-1"), b"{}")
    actions = [data["action"] for _, data in mesh.events]
    assert actions == ["enrollment_token_created", "enrollment_granted"]
    assert verify_trail(mesh.folder / "audit.sqlite", KEY.public).entries == 2


async def test_a_device_joins_with_a_password_over_tls(mesh):
    token = await mesh.token(role="device")
    papers = await mesh.join(token, "pump-7", Role.DEVICE, certificate=False)
    path = store_papers(papers, mesh.folder / "new")
    assert papers.password not in repr(papers)
    async with mesh.session(path) as session:
        await session.wait_connected(20)


async def test_a_revoked_member_is_cut_off_and_stays_out(mesh, eventually):
    path = store_papers(await mesh.join(await mesh.token()), mesh.folder / "new")
    async with mesh.session(path) as session:
        await session.wait_connected(20)
        await mesh.service.verbs["revoke"]({"id": "edge-1"}, ADMIN)
        await mesh.engine.reload_access()
        with pytest.raises(AccessDenied):
            async with asyncio.timeout(20):
                await session.wait()
    async with mesh.session(path) as session:
        with pytest.raises(AccessDenied):
            await session.wait_connected(20)


@pytest.mark.parametrize("certificate", [True, False], ids=["certificate", "password"])
async def test_papers_are_tried_without_cutting_off_who_uses_them(mesh, certificate):
    joined = await mesh.join(await mesh.token(), certificate=certificate)
    path = store_papers(joined, mesh.folder / "new")
    where = {"folder": path.parent, "url": mesh.url, "site": SITE}
    member = Identity.read(path).model_copy(update={"broker": None})
    async with mesh.session(path) as session:
        await session.wait_connected(20)
        assert await is_still_member(member, **where)
        assert session.connected
        assert session.stats.connects == 1
    await mesh.service.verbs["revoke"]({"id": "edge-1"}, ADMIN)
    await mesh.engine.reload_access()
    assert not await is_still_member(member, **where)


async def test_what_the_mesh_runs_with_is_thrown_out_by_force_only(mesh):
    mesh.credentials.add("admin-1", Role.ADMIN)
    revoke = mesh.service.verbs["revoke"]
    with pytest.raises(Conflict, match="last administrator"):
        await revoke({"id": "admin-1"}, ADMIN)
    with pytest.raises(Conflict, match="cannot throw itself out"):
        await revoke({"id": "registry-1", "force": True}, ADMIN)
    assert {"admin-1", "registry-1"} <= mesh.credentials.identities().keys()
    await revoke({"id": "admin-1", "force": True}, ADMIN)
    assert "admin-1" in mesh.desk.revoked


async def test_a_certificate_is_good_for_one_name_only(mesh):
    path = store_papers(await mesh.join(await mesh.token()), mesh.folder / "new")
    mesh.credentials.add("edge-2", Role.NODE)
    await mesh.engine.reload_access()
    async with mesh.session(path, username="edge-2", client_id="edge-2") as session:
        with pytest.raises(AccessDenied):
            await session.wait_connected(20)


async def test_an_operator_lets_a_newcomer_in(mesh, eventually):
    token = await mesh.token(approve=True)
    told: list[str] = []
    joining = asyncio.create_task(mesh.join(token, waiting=told.append))
    await eventually(lambda: bool(mesh.desk.waiting))
    waiting = (await mesh.service.verbs["enrollments"]({}, ADMIN))["enrollments"]
    assert [row["id"] for row in waiting] == ["edge-1"]
    assert waiting[0]["facts"]["host"]
    await eventually(lambda: bool(told))
    await mesh.service.verbs["approve"]({"id": "edge-1"}, ADMIN)
    papers = await joining
    assert papers.reply.status == "granted"


async def test_an_operator_keeps_a_newcomer_out(mesh, eventually):
    token = await mesh.token(approve=True)
    joining = asyncio.create_task(mesh.join(token))
    await eventually(lambda: bool(mesh.desk.waiting))
    await mesh.service.verbs["deny"]({"id": "edge-1", "reason": "not ours"}, ADMIN)
    with pytest.raises(AccessDenied, match="not ours"):
        await joining


async def test_refusals_reach_the_newcomer_in_words(mesh):
    token = await mesh.token(role="router")
    with pytest.raises(AccessDenied, match="for a router, not a node"):
        await mesh.join(token)
    stranger = JoinToken.make(authority=token.authority)
    with pytest.raises(AccessDenied, match="does not know the join token"):
        await mesh.join(stranger)
    await mesh.service.verbs["token_revoke"]({"token": token.id}, ADMIN)
    await mesh.engine.reload_access()
    with pytest.raises(AccessDenied, match="does not know the join token"):
        await mesh.join(token)


async def test_a_newcomer_tells_its_token_to_the_right_broker_only(mesh, tmp_path):
    token = await mesh.token()
    other = Authority.create(tmp_path / "elsewhere", site=SITE)
    wrong = JoinToken(id=token.id, secret=token.secret, authority=other.server_root())
    with pytest.raises(BrokerUnavailable, match="nobody we trust") as caught:
        await mesh.join(wrong)
    assert not caught.value.retryable  # it was said at once, after the first try
    with pytest.raises(ConfigurationError, match="mqtts://"):
        await mesh.join(token, url=mesh.engine.url)


async def test_the_token_opens_nothing_but_its_own_enrollment(mesh):
    token, other = await mesh.token(), await mesh.token()
    (mesh.folder / "root.pem").write_text(mesh.authority.bundle)
    settings = SessionSettings(
        urls=(mesh.url,),
        client_id="curious",
        username=token.id,
        password=token.password,
        tls=TlsSettings(ca_file=mesh.folder / "root.pem"),
    )

    async def ignore(message):
        raise AssertionError(message)

    async with MqttSession(settings=settings) as session:
        await session.wait_connected(20)
        for forbidden in (
            "#",
            TOPICS.filter(TopicKind.CATALOG),
            TOPICS.filter(TopicKind.ENROLL_REPLY),
            TOPICS.build(TopicKind.ENROLL_REPLY, request=other.id),
            TOPICS.build(TopicKind.ENROLL, request=token.id),
        ):
            with pytest.raises(AccessDenied):
                await session.subscribe(forbidden, ignore)


async def test_a_half_written_enrollment_can_be_repeated(mesh):
    papers = await mesh.join(await mesh.token())
    folder = mesh.folder / "new"
    folder.mkdir()
    (folder / "edge-1.key").write_text("cut off")
    path = store_papers(papers, folder)
    assert json.loads(path.read_text())["id"] == "edge-1"
    with pytest.raises(ConfigurationError, match="exists"):
        store_papers(papers, folder)


async def test_a_member_renews_its_papers_over_the_session_it_has(mesh, monkeypatch):
    path = store_papers(await mesh.join(await mesh.token(zones=["hall-3"])), mesh.folder / "new")
    before = Identity.read(path)
    serials = mesh.credentials.identities()["edge-1"].serials
    async with mesh.session(path) as session:
        await session.wait_connected(20)
        renewal = Renewal(
            identity=before,
            folder=path.parent,
            key=load_key(before, path.parent),
            session=session,
            topics=TOPICS,
        )
        await renewal.renew()
        await mesh.engine.reload_access()
        await session.publish(TOPICS.build(TopicKind.NODE_STATE, node="edge-1"), b"{}")
    after = Identity.read(path)
    assert after == renewal.identity
    assert after.passport != before.passport
    assert after.attested == before.attested
    mesh.credentials.refresh()
    assert mesh.credentials.identities()["edge-1"].serials[1:] == serials
    async with mesh.session(path) as session:  # with the new certificate
        await session.wait_connected(20)
        thief = Renewal(
            identity=after,
            folder=path.parent,
            key=SigningKey.generate(),
            session=session,
            topics=TOPICS,
        )
        monkeypatch.setattr("foam.renewal._ANSWER_S", 1.0)
        with pytest.raises(Unavailable, match="did not answer"):
            await thief.renew()  # another key than the known one: nobody answers
    assert Identity.read(path) == after


async def test_a_token_the_broker_has_not_heard_of_yet_is_tried_again(mesh, monkeypatch):
    """Mosquitto hears of a new login up to a second after it was made."""
    token = await mesh.token()
    mesh.credentials.update(token.id, disabled=True)
    await mesh.engine.reload_access()
    ask, refusals = enrolling._ask, []

    async def ask_and_listen(*arguments):
        try:
            return await ask(*arguments)
        except AccessDenied:
            refusals.append(token.id)
            mesh.credentials.update(token.id, disabled=False)
            await mesh.engine.reload_access()
            raise

    monkeypatch.setattr(enrolling, "_ask", ask_and_listen)
    papers = await mesh.join(token, "edge-9")
    assert (papers.reply.status, refusals) == ("granted", [token.id])


async def test_a_refusal_is_believed_in_the_end(monkeypatch):
    monkeypatch.setattr(enrolling, "_DOUBT_S", 0.2)
    monkeypatch.setattr(enrolling, "_DOUBT_AGAIN_S", 0.05)
    tries: list[None] = []

    async def refused():
        tries.append(None)
        raise AccessDenied("no")

    with pytest.raises(AccessDenied, match="no"):
        await enrolling._patiently(refused)
    assert 1 < len(tries) <= 5


LAN = "mqtts://10.0.0.5:8883"
NAMED = "mqtts://broker.test:8883"
LOOPBACK = "mqtts://127.0.0.1:8883"


@pytest.mark.parametrize(
    ("brokers", "reached", "known"),
    [
        ((NAMED, LOOPBACK, LAN), ["10.0.0.5"], [LAN, NAMED]),
        ((NAMED, LOOPBACK, LAN), ["127.0.0.1"], [LOOPBACK, NAMED, LAN]),
        ((f"{NAMED},{LAN}",), ["elsewhere.test"], [NAMED, LAN]),
        ((LOOPBACK,), ["10.0.0.5"], [LOOPBACK]),
        ((), ["10.0.0.5"], []),
    ],
)
def test_a_newcomer_knows_every_broker_that_it_can_reach(brokers, reached, known):
    assert enrolling._nearest_first(brokers, reached) == (",".join(known) or None)


async def test_a_newcomer_joins_by_whichever_broker_of_a_list_is_there(mesh, tmp_path):
    down = f"mqtts://127.0.0.1:{free_port()}"
    mesh.desk_brokers[:] = [down, mesh.url]
    papers = await mesh.join(await mesh.token(role="node"), url=f"{down},{mesh.url}")
    path = store_papers(papers, tmp_path / "newcomer")
    assert Identity.read(path).broker == f"{down},{mesh.url}"
    assert await enrolling.is_still_member(
        Identity.read(path), path.parent, url=f"{down},{mesh.url}", site=SITE
    )
