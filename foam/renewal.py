"""A member gets new papers before the old ones run out: over its session, or from its folder."""

import asyncio
import contextlib
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

import structlog

from broker.session.base import Message, Session
from capability_schemas.errors import AccessDenied, FoamError, ProtocolError, Unavailable
from capability_schemas.ids import now_ms
from capability_schemas.passport import PassportBook
from capability_schemas.signing import SigningKey
from capability_schemas.topics import TopicKind, Topics
from capability_schemas.trust import read_trust
from capability_schemas.wire import encode
from foam.enrolling import Papers, renewal_request, renewed, store_renewal
from foam.mesh import Identity, MeshFolder

__all__ = ["Renewal"]

_LOOK_S: Final = 60.0
_SPREAD_S: Final = 10.0
"""Over how long members spread their requests when the registry asks all of them at once."""

_ANSWER_S: Final = 20.0
_AGAIN_S: Final = 300.0
_QUEUE: Final = 20_000
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
        home: The data folder, where that can vouch for the member itself.
        book: Knows registries that the member's papers do not name.
        shown: Called with the identity that has the new papers, for who shows or uses them.
        chance: Spreads the requests of many; the system's when None.
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
        home: MeshFolder | None = None,
        book: PassportBook | None = None,
        shown: Callable[[Identity], None] = lambda _: None,
        chance: random.Random | None = None,
        clock: Callable[[], int] = now_ms,
    ) -> None:
        self.identity = identity
        self._folder = folder
        self._key = key
        self._session = session
        self._topics = topics
        self._home = home
        self._book = book
        self._shown = shown
        self._clock = clock
        self._asked = asyncio.Event()
        self._thrown_out = asyncio.Event()
        self._refusal: AccessDenied | None = None
        self._chance = chance or random.SystemRandom()

    async def keep(self) -> None:
        """Renew whenever it is time, or the registry asks for it, until cancelled.

        A failure is tried again, and logged.

        Raises:
            AccessDenied: The registry has thrown the member out, and papers are of no use any more.
                Not every broker cuts the session then, or says so when it refuses the next one.
        """
        due = self.identity.renew_at
        if due is None:
            return
        await self._session.subscribe(
            self._topics.filter(TopicKind.TRUST), self._on_trust, queue_limit=_QUEUE
        )
        while due is not None:
            if self._clock() < due and not await self._is_asked():
                continue
            self._asked.clear()
            try:
                await self.renew()
            except FoamError as error:
                _log.warning("papers.not_renewed", id=self.identity.id, error=error.message)
                await self._pause(_AGAIN_S)
                self._asked.set()  # whoever asked for it, it is not done
            else:
                due = self.identity.renew_at
                _log.info("papers.renewed", id=self.identity.id, renew_at=due)

    async def _is_asked(self) -> bool:
        """Wait for the registry's wish, in short steps, for clocks are set."""
        try:
            async with asyncio.timeout(_LOOK_S):
                await self._asked.wait()
        except TimeoutError:
            return False
        await self._pause(self._chance.uniform(0, _SPREAD_S))
        return True

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._thrown_out.wait()
        if self._refusal is not None:
            raise self._refusal

    async def _on_trust(self, message: Message) -> None:
        """Hear the registry ask for a renewal, or that the member is none any more."""
        own = self.identity.id
        if not message.payload or message.topic != self._topics.build(TopicKind.TRUST, member=own):
            return
        try:
            known = self._book.registries if self._book else self.identity.registries
            state = read_trust(message.payload, member=own, registries=known)
        except FoamError as error:
            _log.warning("papers.wish_ignored", id=own, error=error.message)
            return
        passport = self.identity.passport
        issued_at = passport.issued_at if passport is not None else 0
        if state.state == "revoked" and issued_at < (state.void_before or state.at):
            reason = f": {state.reason}" if state.reason else ""
            self._refusal = AccessDenied(
                f"{own} was revoked{reason}; it has to enroll again: foam enroll", identity=own
            )
            self._thrown_out.set()
            self._asked.set()
            return
        if state.renew_from is not None and issued_at < state.renew_from:
            self._asked.set()

    async def renew(self) -> None:
        """Get new papers once, write and show them.

        Raises:
            AccessDenied: The registry refused.
            Unavailable: It did not answer.
            ConfigurationError: The papers cannot be written.
        """
        before = self.identity.renew_at
        if self._home is not None:
            vouch = partial(
                self._home.vouch, self.identity, site=self._topics.site, clock=self._clock
            )
            self.identity = await asyncio.to_thread(vouch)
        if self.identity.renew_at == before:
            self.identity = await self._ask()
        self._shown(self.identity)

    async def _ask(self) -> Identity:
        """Ask the registry, and write what it granted."""
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
        return await asyncio.to_thread(store_renewal, papers, self.identity, self._folder)
