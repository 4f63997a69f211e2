"""What many identities cost the embedded broker, and how fast one joins and is thrown out."""

import asyncio
import contextlib
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from benchmarks.measure import p50
from broker.access import AccessPolicy, Action, CredentialStore, Role
from broker.access.authority import Authority
from broker.access.credentials import Credential
from broker.access.orders import Requester
from broker.embedded import EmbeddedBroker
from broker.embedded.gate import Gate
from broker.engine import EngineSettings
from broker.session.mqtt import MqttSession
from broker.session.settings import SessionSettings
from broker.tls import TlsListener
from capability_schemas.enrollment import JoinToken
from capability_schemas.errors import AccessDenied, BrokerUnavailable
from capability_schemas.signing import SigningKey
from capability_schemas.topics import TopicKind, Topics
from foam.enrolling import enroll, store_papers
from foam.mesh import Identity, tls_files
from registry.enrollment import EnrollmentDesk, EnrollmentService
from registry.store.audit import AuditLog

TOPICS = Topics()
JOINS = 5


def fill(store: CredentialStore, count: int) -> None:
    """Write many members with certificates at once; one by one costs an fsync each."""
    with store._change() as identities:
        for number in range(count):
            identities[f"edge-{number}"] = Credential(
                role=Role.NODE, serials=(f"{number:040x}",), created_at=1
            )


def milliseconds(once: Callable[[], object]) -> float:
    started = time.perf_counter()
    once()
    return round((time.perf_counter() - started) * 1e3, 2)


def check_us(store: CredentialStore) -> tuple[float, float]:
    """Return what a question costs when it was asked before, and when it was not, microseconds."""
    gate = Gate(credentials=store, policy=AccessPolicy(TOPICS))
    topics = [
        TOPICS.build(TopicKind.REPLY, client="c", task=f"t{number}", source="edge-0")
        for number in range(20_000)
    ]
    asked = [("edge-0", Action.PUBLISH, topic) for topic in topics]
    try:
        cold = milliseconds(lambda: [gate.may(*question) for question in asked]) / len(asked)
        again = asked[-1000:]
        warm = milliseconds(lambda: [gate.may(*question) for question in again]) / len(again)
    finally:
        gate.close()
    return round(warm * 1e3, 2), round(cold * 1e3, 2)


async def of_size(count: int) -> dict[str, Any]:
    """Measure a broker with so many members."""
    with tempfile.TemporaryDirectory(prefix="foam-bench-") as folder:
        store = CredentialStore(Path(folder) / "credentials.json")
        fill(store, count)
        password = store.add("pump", Role.DEVICE)
        warm_us, cold_us = check_us(store)
        engine = EmbeddedBroker(
            settings=EngineSettings(data_dir=Path(folder) / "broker"),
            credentials=store,
            topics=TOPICS,
        )
        started = time.perf_counter()
        async with engine:
            start_ms = (time.perf_counter() - started) * 1e3
            settings = SessionSettings(
                urls=(engine.url,), client_id="pump", username="pump", password=SecretStr(password)
            )
            async with MqttSession(settings=settings) as session:
                await session.wait_connected(20)
                add_ms = milliseconds(lambda: store.add("new", Role.NODE, serial="ab"))
                await asyncio.to_thread(store.remove, "pump")
                started = time.perf_counter()
                await engine.reload_access()
                with contextlib.suppress(AccessDenied):
                    await session.wait()
                cut_ms = (time.perf_counter() - started) * 1e3
        return {
            "members": count,
            "broker starts in ms": round(start_ms, 1),
            "one member more, file ms": add_ms,
            "revoked to refused ms": round(cut_ms, 1),
            "right asked again us": warm_us,
            "right asked first us": cold_us,
        }


async def joining() -> dict[str, Any]:
    """Measure how long newcomers take from a token to a connection with their certificate."""
    with tempfile.TemporaryDirectory(prefix="foam-bench-") as name:
        folder = Path(name)
        store = CredentialStore(folder / "credentials.json")
        authority = Authority.create(folder / "authority", site=TOPICS.site)
        key, made = authority.issue_server(["127.0.0.1"])
        for file, text in (("key", key), ("crt", made.pem), ("ca", authority.bundle)):
            (folder / file).write_text(text)
        listener = TlsListener(
            host="127.0.0.1",
            port=0,
            cert_file=folder / "crt",
            key_file=folder / "key",
            ca_file=folder / "ca",
        )
        password = store.add("registry-1", Role.REGISTRY)
        engine = EmbeddedBroker(
            settings=EngineSettings(data_dir=folder / "broker", tls=listener),
            credentials=store,
            topics=TOPICS,
        )
        async with engine:
            registry = MqttSession(
                settings=SessionSettings(
                    urls=(engine.url,),
                    client_id="registry-1",
                    username="registry-1",
                    password=SecretStr(password),
                )
            )
            signing = SigningKey.generate()
            desk = EnrollmentDesk(
                path=folder / "enrollment.json",
                site=TOPICS.site,
                registry_id="registry-1",
                key=signing,
                credentials=store,
                authority=authority,
                brokers=lambda: (),
            )
            with AuditLog(folder / "audit.sqlite", key=signing) as trail:
                service = EnrollmentService(
                    session=registry,
                    topics=TOPICS,
                    desk=desk,
                    trail=trail,
                    emit=lambda _kind, _data: None,
                    registry_id="registry-1",
                )
                async with registry, service:
                    await registry.wait_connected(20)
                    return await _join_some(engine, service, folder)


async def _join_some(
    engine: EmbeddedBroker, service: EnrollmentService, folder: Path
) -> dict[str, Any]:
    made = await service.verbs["token_create"]({"uses": JOINS}, Requester("bench", Role.ADMIN))
    await engine.reload_access()
    token, url = JoinToken.parse(made["token"]), f"mqtts://127.0.0.1:{engine.tls_port}"
    asked, connected = [], []
    for number in range(JOINS):
        started = time.perf_counter()
        papers = await enroll(
            url=url,
            token=token,
            identity=f"edge-{number}",
            role=Role.NODE,
            site=TOPICS.site,
            timeout_s=20,
        )
        path = store_papers(papers, folder / f"edge-{number}")
        asked.append((time.perf_counter() - started) * 1e3)
        await engine.reload_access()
        member = Identity.read(path)
        settings = SessionSettings(
            urls=(url,),
            client_id=member.id,
            username=member.id,
            tls=tls_files(path.parent, member),
        )
        while True:
            try:
                async with MqttSession(settings=settings) as session:
                    await session.wait_connected(20)
            except (AccessDenied, BrokerUnavailable):  # the broker has not read it yet
                continue
            break
        connected.append((time.perf_counter() - started) * 1e3)
    return {
        "joins": JOINS,
        "papers after ms, p50": p50(asked),
        "connected after ms": p50(connected),
    }


async def _sizes() -> list[dict[str, Any]]:
    return [await of_size(count) for count in (5, 100, 1_000)]


def measure() -> list[dict[str, Any]]:
    """Measure brokers with few and with a thousand members."""
    return asyncio.run(_sizes())


def measure_joining() -> list[dict[str, Any]]:
    """Measure newcomers."""
    return [asyncio.run(joining())]
