"""A running broker with a set of identities, for tests."""

import contextlib
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from broker.access.credentials import CredentialStore
from broker.access.policy import Role
from broker.embedded import EmbeddedBroker
from broker.engine import ChildEngine, EngineSettings, WebSocketListener
from broker.mosquitto import MosquittoBroker, find_plugin
from broker.nats import NatsBroker
from broker.session.settings import SessionSettings
from capability_schemas.topics import Topics
from support.ports import free_port

IDENTITIES = {
    "pump-1": Role.DEVICE,
    "pump-2": Role.DEVICE,
    "edge-1": Role.NODE,
    "edge-2": Role.NODE,
    "router-1": Role.ROUTER,
    "router-2": Role.ROUTER,
    "registry-1": Role.REGISTRY,
    "registry-2": Role.REGISTRY,
    "admin-1": Role.ADMIN,
    "watcher-1": Role.OBSERVER,
}


@dataclass(frozen=True)
class BrokerSite:
    """One broker, its identities and their passwords."""

    kind: str
    engine: Any
    topics: Topics = field(default_factory=Topics)
    passwords: dict[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return str(self.engine.url)

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def settings(self, identity: str, *, url: str | None = None, **more: Any) -> SessionSettings:
        """Settings with which ``identity`` gets in."""
        role = IDENTITIES[identity]
        client_id = f"{identity}-{secrets.token_hex(4)}"
        if role.binds_client_id and self.engine.traits.binds_client_id:
            client_id = identity
        fields: dict[str, Any] = {
            "urls": (url or self.url,),
            "client_id": client_id,
            "username": identity,
            "password": SecretStr(self.passwords[identity]),
            **more,
        }
        return SessionSettings(**fields)


def is_available(kind: str) -> bool:
    """Whether this machine can run the broker."""
    if kind == "mosquitto":
        return MosquittoBroker.available() and find_plugin() is not None
    if kind == "mosquitto_static":
        return MosquittoBroker.available()
    return kind != "nats" or NatsBroker.available()


def make_site(kind: str, folder: Path, *, port: int = 0) -> BrokerSite:
    """Make a broker with ``IDENTITIES``, not started: embedded, mosquitto(_static), nats."""
    topics = Topics()
    store = CredentialStore(folder / "credentials.json")
    passwords = {name: store.add(name, role) for name, role in IDENTITIES.items()}
    site = BrokerSite(kind=kind, engine=None, topics=topics, passwords=passwords)
    return replace(site, engine=make_engine(site, store, folder, port))


def make_engine(
    site: BrokerSite, store: CredentialStore, folder: Path, port: int, **more: Any
) -> ChildEngine:
    """Make an engine over the credentials and the data of a site, not started."""
    access: Any = {"mosquitto": "dynamic", "mosquitto_static": "static"}.get(site.kind)
    settings = EngineSettings(
        data_dir=folder / "broker",
        port=port or free_port(),
        access=access,
        websocket=WebSocketListener(port=free_port()),
        **more,
    )
    if site.kind == "embedded":
        return EmbeddedBroker(settings=settings, credentials=store, topics=site.topics)
    if site.kind.startswith("mosquitto"):
        return MosquittoBroker(settings=settings, credentials=store, topics=site.topics)
    return NatsBroker(
        settings=settings, credentials=store, topics=site.topics, passwords=site.passwords
    )


@contextlib.asynccontextmanager
async def run_site(kind: str, folder: Path, *, port: int = 0) -> AsyncIterator[BrokerSite]:
    """Run a broker of a kind with ``IDENTITIES``."""
    site = make_site(kind, folder, port=port)
    async with site.engine:
        yield site


@contextlib.asynccontextmanager
async def run_again(
    site: BrokerSite, folder: Path, *, port: int, **more: Any
) -> AsyncIterator[BrokerSite]:
    """Run a broker that has ended again: same data, same identities; more settings on demand."""
    store = CredentialStore(folder / "credentials.json")
    async with make_engine(site, store, folder, port, **more) as engine:
        yield replace(site, engine=engine)
