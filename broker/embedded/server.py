"""The broker process from inside: the service that runs it."""

import asyncio
import os
import signal
from typing import Final

import structlog
from amqtt.errors import BrokerError

from broker.access.credentials import CredentialStore
from broker.access.policy import AccessPolicy
from broker.audit import BROKER_SOURCE, AuditVoice, Tally
from broker.embedded.gate import Gate
from broker.embedded.hardened import HardenedBroker
from broker.embedded.order import ServerOrder
from broker.embedded.refusals import Refusals
from broker.embedded.store import BrokerStore, Found
from broker.events import EventSource
from broker.lifecycle import Service
from capability_schemas.errors import ConfigurationError
from capability_schemas.ids import now_ms
from capability_schemas.topics import Topics

_SYNC_PERIOD_S: Final = 1.0
_log = structlog.get_logger(__name__)


class EmbeddedServer(Service):
    """Runs the hardened broker in this process and reloads access on SIGHUP.

    Args:
        order: What to run.

    Raises:
        ConfigurationError: The credentials cannot be read, or amqtt is of another release.
    """

    def __init__(self, *, order: ServerOrder) -> None:
        super().__init__(service_id=order.site)
        self._topics = Topics(site=order.site, prefix=order.prefix)
        self._gate = Gate(
            credentials=CredentialStore(order.credentials), policy=AccessPolicy(self._topics)
        )
        self._order = order
        self._store = BrokerStore(order.settings.data_dir / "retained.store")
        self._broker: HardenedBroker | None = None
        self._reload_asked = asyncio.Event()

    @property
    def port(self) -> int:
        """TCP port it listens on, 0 when it does not run."""
        return self._broker.port if self._broker is not None else 0

    @property
    def tls_port(self) -> int:
        """TCP port it listens on with TLS, 0 without, or when it does not run."""
        return self._broker.tls_port if self._broker is not None else 0

    @property
    def websocket_port(self) -> int:
        """TCP port it listens on for WebSocket, 0 without, or when it does not run."""
        return self._broker.websocket_port if self._broker is not None else 0

    async def _on_start(self) -> None:
        """Listen.

        Raises:
            ConfigurationError: The address is taken, or the store cannot be used.
        """
        tally = Tally(now_ms)
        found = self._store.open()
        broker = HardenedBroker(
            settings=self._order.settings,
            gate=self._gate,
            refusals=Refusals(tally=tally, topics=self._topics),
            store=self._store,
        )
        broker.remember(found)
        try:
            await broker.start()
        except BrokerError as exc:
            raise ConfigurationError(f"the embedded broker cannot listen: {exc}") from exc
        self._broker = broker
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGHUP, self._reload_asked.set)
        self.spawn(self._reload(broker), name="reload")
        events = EventSource(
            session=broker,
            topics=self._topics,
            source=BROKER_SOURCE,
            component="broker",
            clock=now_ms,
        )
        voice = AuditVoice(emit=events.emit, epoch=now_ms(), clock=now_ms, tally=tally)
        self.spawn(voice.keep_telling(), name="audit")
        self.spawn(self._keep_on_disk(), name="store")
        self.spawn(self._settle(broker, found, events), name="settle")

    async def _on_stopped(self) -> None:
        asyncio.get_running_loop().remove_signal_handler(signal.SIGHUP)
        if self._broker is not None:
            await self._broker.shutdown()
        self._gate.close()
        self._store.close()

    async def _keep_on_disk(self) -> None:
        while True:
            await asyncio.sleep(_SYNC_PERIOD_S)
            file = self._store.unsynced()
            if file is not None:
                await asyncio.to_thread(_sync, file)

    async def _settle(self, broker: HardenedBroker, found: Found, events: EventSource) -> None:
        """Once those who were here are back, speak for those who are not, and of what was lost."""
        await asyncio.sleep(self._order.settings.return_s)
        broker.publish_orphans()
        if found.aside is not None:
            told = {"aside": str(found.aside), "read": len(found.retained)}
            events.emit("store_damaged", told)

    async def _reload(self, broker: HardenedBroker) -> None:
        while True:
            await self._reload_asked.wait()
            self._reload_asked.clear()
            try:
                await broker.revoke(await self._gate.reload())
                broker.renew_tls()
            except ConfigurationError as exc:  # the old rules stay until the file is mended
                _log.error("access.reload_failed", reason=exc.message)


def _sync(file: int) -> None:
    """Have the disk hold a file, and close the descriptor."""
    try:
        os.fsync(file)
    except OSError as error:  # what is written next is told to fail, too
        _log.warning("store.not_synced", reason=error.strerror or str(error))
    finally:
        os.close(file)
