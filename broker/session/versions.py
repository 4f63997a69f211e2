"""Which version of MQTT to speak to which broker."""

from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

import structlog

from broker.session.settings import BrokerUrl, SessionSettings, Version
from capability_schemas.errors import BrokerUnavailable, ConfigurationError

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)
_L = TypeVar("_L")


class VersionRefused(BrokerUnavailable):
    """The broker does not speak this version of MQTT, or gave a CONNECT of it no answer."""


class VersionChoice(Generic[_L]):
    """Opens connections in the version asked for, or finds out which one a broker takes.

    Args:
        settings: Version and time limits.
        open_link: Opens a connection to a broker, in a version, within seconds.
    """

    def __init__(
        self,
        *,
        settings: SessionSettings,
        open_link: Callable[[BrokerUrl, Version, float], Awaitable[_L]],
    ) -> None:
        self._settings = settings
        self._open = open_link
        self._known: dict[BrokerUrl, Version] = {}

    async def open(self, url: BrokerUrl) -> _L:
        """Make one try to connect.

        Raises:
            ConfigurationError: The broker says that it does not speak the version asked for.
            FoamError: As of ``open_link``.
        """
        wanted, limit_s = self._settings.version, self._settings.connect_timeout_s
        if wanted != "auto":
            try:
                return await self._open(url, wanted, limit_s)
            except VersionRefused as error:
                if error.detail["said_so"]:
                    raise ConfigurationError(f'{error.message}: set version to "auto"') from error
                raise
        known = self._known.get(url)
        if known is None:
            return await self._probe(url)
        try:
            return await self._open(url, known, limit_s)
        except VersionRefused:
            del self._known[url]  # perhaps another broker by now: probe again next time
            raise

    async def _probe(self, url: BrokerUrl) -> _L:
        limit_s = self._settings.connect_timeout_s
        version: Version = "5"
        try:
            link = await self._open(url, version, min(limit_s, self._settings.probe_timeout_s))
        except VersionRefused as error:
            _log.info("session.version_fallback", broker=str(url), reason=error.message)
            version = "3.1.1"
            link = await self._open(url, version, limit_s)
        self._known[url] = version
        return link
