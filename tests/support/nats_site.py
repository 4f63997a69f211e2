"""Three nats-servers that are one broker, each of which can be killed and started again."""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from broker.access.credentials import CredentialStore
from broker.engine import EngineSettings
from broker.nats import NatsBroker
from broker.nats_cluster import ClusterPlan, ClusterServer
from broker.session.settings import SessionSettings
from support.broker_site import BrokerSite, make_site
from support.ports import free_port

HOST = "127.0.0.1"


class NatsCluster:
    """A cluster of three; server numbers count from 0."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._site: BrokerSite = make_site("nats", folder)
        self.plan = ClusterPlan.of(
            tuple(
                ClusterServer(name=f"foam-{number}", host=HOST, port=free_port())
                for number in (1, 2, 3)
            )
        )
        self.ports = [free_port() for _ in self.plan.servers]
        self._engines: dict[int, NatsBroker] = {}

    @property
    def urls(self) -> tuple[str, ...]:
        return tuple(f"mqtt://{HOST}:{port}" for port in self.ports)

    def settings(self, identity: str, *, first: int = 0, **more: Any) -> SessionSettings:
        """Settings of a session that knows all servers, beginning with one of them."""
        more = {"version": "3.1.1", "keepalive_s": 5, **more}
        found = replace(self._site, engine=self._any()).settings(identity, **more)
        return found.model_copy(update={"urls": self.urls[first:] + self.urls[:first]})

    async def start(self, *numbers: int) -> None:
        """Start servers together and wait until each lets somebody in."""
        store = CredentialStore(self._folder / "credentials.json")
        for number in numbers:
            self._engines[number] = NatsBroker(
                settings=EngineSettings(
                    data_dir=self._folder / f"nats-{number}", port=self.ports[number]
                ),
                credentials=store,
                topics=self._site.topics,
                passwords=self._site.passwords,
                seat=self.plan.seat(number + 1),
            )
        async with asyncio.TaskGroup() as group:
            for number in numbers:
                group.create_task(self._engines[number].__aenter__(), name=f"start {number}")

    async def kill(self, *numbers: int) -> None:
        """Kill servers at once and wait until they are gone."""
        for number in numbers:
            os.kill(self._engines[number].pid, signal.SIGKILL)
        for number in numbers:
            await self._engines.pop(number).wait()

    async def stop(self) -> None:
        """Stop what runs."""
        for engine in self._engines.values():
            await engine.__aexit__(None, None, None)
        self._engines.clear()

    def number_of(self, url: str) -> int:
        """Return which server has a URL."""
        return self.urls.index(url)

    def _any(self) -> NatsBroker:
        return next(iter(self._engines.values()))


@contextlib.asynccontextmanager
async def nats_cluster(folder: Path) -> AsyncIterator[NatsCluster]:
    """Run three servers."""
    cluster = NatsCluster(folder)
    try:
        await cluster.start(0, 1, 2)
        yield cluster
    finally:
        await cluster.stop()
