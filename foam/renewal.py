"""A member asks for new papers before the old ones run out, over the session it has."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Final

import structlog

from broker.session.base import Message, Session
from capability_schemas.errors import AccessDenied, FoamError, ProtocolError, Unavailable
from capability_schemas.ids import now_ms
from capability_schemas.signing import SigningKey
from capability_schemas.topics import TopicKind, Topics
from capability_schemas.wire import encode
from foam.enrolling import Papers, renewal_request, renewed, store_renewal
from foam.mesh import Identity

__all__ = ["Renewal"]

_LOOK_S: Final = 60.0
_ANSWER_S: Final = 20.0
_AGAIN_S: Final = 300.0
_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class Renewal:
    """Keeps the papers of one member fresh.

    What is renewed stands in the files beside the identity file: the session reads certificates at
    each connection.

    Args:
        identity: The member.
        folder: Folder of its identity file.
        key: Its signing key.
        session: Its session.
        topics: Topics of its site.
        clock: UTC milliseconds.
    """

    def __init__(
        self,
        *,
        identity: Identity,
        folder: Path,
        key: SigningKey,
        session: Session,
        topics: Topics,
        clock: Callable[[], int] = now_ms,
    ) -> None:
        self.identity = identity
        self._folder = folder
        self._key = key
        self._session = session
        self._topics = topics
        self._clock = clock

    async def keep(self) -> None:
        """Renew whenever it is time, until cancelled; a failure is tried again, and logged."""
        while True:
            due = self.identity.renew_at
            if due is None:
                return
            if self._clock() < due:
                await asyncio.sleep(_LOOK_S)  # in short steps, for clocks are set
                continue
            try:
                await self.renew()
            except FoamError as error:
                _log.warning("papers.not_renewed", id=self.identity.id, error=error.message)
                await asyncio.sleep(_AGAIN_S)
            else:
                _log.info("papers.renewed", id=self.identity.id, renew_at=self.identity.renew_at)

    async def renew(self) -> None:
        """Ask once, and write what was granted.

        Raises:
            AccessDenied: The registry refused.
            Unavailable: It did not answer.
            ConfigurationError: The papers cannot be written.
        """
        request, tls_key = renewal_request(
            self.identity, self._key, site=self._topics.site, clock=self._clock
        )
        answered: asyncio.Future[Papers] = asyncio.get_running_loop().create_future()

        async def on_reply(message: Message) -> None:
            try:
                papers = renewed(message.payload, request, tls_key, self.identity)
            except AccessDenied as error:
                if not answered.done():
                    answered.set_exception(error)
            except ProtocolError as error:
                _log.warning("papers.answer_ignored", error=error.message)
            else:
                if papers is not None and not answered.done():
                    answered.set_result(papers)

        own = self.identity.id
        subscription = await self._session.subscribe(
            self._topics.build(TopicKind.ENROLL_REPLY, request=own), on_reply
        )
        try:
            self._session.post(self._topics.build(TopicKind.ENROLL, request=own), encode(request))
            async with asyncio.timeout(_ANSWER_S):
                papers = await answered
        except TimeoutError as error:
            raise Unavailable("the registry did not answer the request for new papers") from error
        finally:
            await self._session.unsubscribe(subscription)
        self.identity = await asyncio.to_thread(store_renewal, papers, self.identity, self._folder)
