"""Decides for the embedded broker: who comes in, and what each may do."""

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from enum import IntEnum
from typing import Final

import structlog

from broker.access.credentials import Credential, CredentialStore, VerifiedCache
from broker.access.policy import AccessPolicy, Action
from broker.embedded.line import Line, neighbourhood
from broker.tls import PeerCertificate
from capability_schemas.errors import ConfigurationError, Overloaded
from capability_schemas.ids import now_ms

_log = structlog.get_logger(__name__)

_ANSWERS_LIMIT: Final = 32_768
_FREE_TRIES: Final = 5
_FIRST_PAUSE_MS: Final = 500
_MOST_DOUBLINGS: Final = 7  # a minute
_FORGIVEN_MS: Final = 10 * 60_000
_GUESSERS: Final = 10_000
_HASHERS: Final = 2
# A check takes some 20 ms: the whole line is through it well before admissions time out (30 s).
_WAITING: Final = 1024
_WAITING_OF_ADDRESS: Final = 512


class Admission(IntEnum):
    """CONNACK return codes (MQTT 3.1.1 table 3.1)."""

    ACCEPTED = 0
    IDENTIFIER_REJECTED = 2
    UNAVAILABLE = 3
    NOT_AUTHORIZED = 5


class Patience:
    """How much guessing is allowed: each wrong password in a row doubles the pause before the next.

    Counted by address and identity together: neither can somebody lock an identity out for others,
    nor a guesser its neighbours behind the same address.

    Args:
        clock: UTC milliseconds.
    """

    def __init__(self, clock: Callable[[], int]) -> None:
        self._clock = clock
        self._wrong: OrderedDict[tuple[str, str], tuple[int, int]] = OrderedDict()

    def is_out(self, address: str, identity: str) -> bool:
        """Whether an address has to wait before it may try this identity again."""
        _, until = self._wrong.get((address, identity), (0, 0))
        return self._clock() < until

    def wrong(self, address: str, identity: str) -> None:
        """Count a wrong password; the first few cost nothing."""
        now = self._clock()
        count, until = self._wrong.pop((address, identity), (0, 0))
        if now - until > _FORGIVEN_MS:
            count = 0
        count += 1
        excess = min(count - _FREE_TRIES, _MOST_DOUBLINGS)
        pause_ms = _FIRST_PAUSE_MS * 2**excess if excess >= 0 else 0
        self._wrong[(address, identity)] = (count, now + pause_ms)
        if len(self._wrong) > _GUESSERS:
            self._wrong.popitem(last=False)
        if excess >= 0:
            _log.warning(
                "password.guessing",
                address=address,
                identity=identity[:64],
                wrong=count,
                pause_ms=pause_ms,
            )


class Gate:
    """Checks passwords off the loop and rights on it.

    One loop owns it. Hashing happens in two threads of its own behind a line that is fair to each
    address, and a password that was right once is recognised without hashing or waiting, so
    reconnection storms are cheap and somebody who guesses delays himself. Rights are remembered per
    (identity, action, topic) until the credentials change.

    Life cycle: ``close`` ends its threads.

    Args:
        credentials: Who exists.
        policy: What each role may.
        clock: UTC milliseconds.
    """

    def __init__(
        self,
        *,
        credentials: CredentialStore,
        policy: AccessPolicy,
        clock: Callable[[], int] = now_ms,
    ) -> None:
        self._credentials = credentials
        self._policy = policy
        self._clock = clock
        self._patience = Patience(clock)
        self._known = credentials.identities()
        self._verified = VerifiedCache()
        self._answers: OrderedDict[tuple[str, Action, str], bool] = OrderedDict()
        self._line = Line(places=_HASHERS, limit=_WAITING, party_limit=_WAITING_OF_ADDRESS)
        self._threads = ThreadPoolExecutor(_HASHERS, thread_name_prefix="foam-password")

    async def admit(
        self,
        identity: str | None,
        password: str | None,
        client_id: str,
        *,
        certificate: PeerCertificate | None = None,
        address: str = "",
    ) -> Admission:
        """Decide on a CONNECT; cancellation is safe.

        A certificate decides alone: beside one that does not count no password helps.

        Args:
            identity: Its username, if any.
            password: Its password, if any.
            client_id: Its client id.
            certificate: What its certificate says, if it has shown one; its chain is checked.
            address: Where it comes from; wrong passwords are counted by it (of IPv6 its network of
                64 bits) and the identity.

        Returns:
            ``NOT_AUTHORIZED`` without a right password or certificate, or while its address has
            guessed at this identity too often; ``IDENTIFIER_REJECTED`` for a client id that belongs
            to another identity; ``UNAVAILABLE``, at once, while too many wait for the check.
        """
        if certificate is not None:
            found = await self._certified(identity, certificate)
        elif identity is not None and password is not None:
            try:
                found = await self._authenticated(identity, password, neighbourhood(address))
            except Overloaded as error:
                _log.info("password.line_full", address=address, reason=error.message)
                return Admission.UNAVAILABLE
        else:
            return Admission.NOT_AUTHORIZED
        if identity is None or found is None or self._known.get(identity) != found:
            return Admission.NOT_AUTHORIZED
        if client_id != identity:
            owner = self._known.get(client_id)
            if found.role.binds_client_id or (owner is not None and owner.role.binds_client_id):
                return Admission.IDENTIFIER_REJECTED
        return Admission.ACCEPTED

    async def _certified(
        self, identity: str | None, certificate: PeerCertificate
    ) -> Credential | None:
        if identity != certificate.identity:
            return None
        found = await self._look_up(identity)
        if found is None:
            return None
        known = certificate.serial in found.serials and found.counts(self._clock())
        return found if known else None

    async def _authenticated(self, identity: str, password: str, party: str) -> Credential | None:
        found = self._known.get(identity)
        if found is not None and self._verified.knows(identity, found, password):
            return found if found.counts(self._clock()) else None
        if self._patience.is_out(party, identity):
            return None
        async with self._line.turn(party):
            if self._patience.is_out(party, identity):  # it guessed wrong while this one waited
                return None
            await self._look_up(identity)
            found = await asyncio.get_running_loop().run_in_executor(
                self._threads, self._credentials.verify, identity, password
            )
            if found is None:
                self._patience.wrong(party, identity)
            else:
                self._verified.remember(identity, found, password)
            return found

    async def _look_up(self, identity: str) -> Credential | None:
        """Find an identity; one written into the file since the last reload need not wait for it.

        Only newcomers: what changed of a known identity counts from the reload on, which ends the
        connections that the change forbids.
        """
        if identity not in self._known:
            try:
                await asyncio.to_thread(self._credentials.refresh)
            except ConfigurationError as error:
                _log.error("access.reload_failed", reason=error.message)
            newcomer = self._credentials.identities().get(identity)
            if newcomer is not None and identity not in self._known:
                self._known = {**self._known, identity: newcomer}
                self._answers.clear()
        return self._known.get(identity)

    def may(self, identity: str, action: Action, topic: str) -> bool:
        """Tell whether an identity may do something now.

        Args:
            identity: Authenticated name.
            action: What it wants.
            topic: Topic, or the filter for ``SUBSCRIBE``.
        """
        question = (identity, action, topic)
        known = self._answers.get(question)
        if known is not None:
            return known
        holder = self._known.get(identity)
        answer = (
            holder is not None
            and not holder.disabled
            and self._policy.allows(holder.role, identity, action, topic, apart=holder.apart)
        )
        if len(self._answers) >= _ANSWERS_LIMIT:
            self._answers.popitem(last=False)
        self._answers[question] = answer
        return answer

    async def reload(self) -> frozenset[str]:
        """Read the credentials again; cancellation is safe.

        Returns:
            Identities whose connections must end: removed, disabled, or of another role,
            password or certificate.

        Raises:
            ConfigurationError: The file cannot be read; the old rules stay.
        """
        before = self._known
        await asyncio.to_thread(self._credentials.refresh)
        self._known = self._credentials.identities()
        self._answers.clear()
        gone = frozenset(
            identity
            for identity, credential in before.items()
            if _is_gone(credential, self._known.get(identity))
        )
        _log.info("access.reloaded", identities=len(self._known), revoked=len(gone))
        return gone

    def close(self) -> None:
        """End the threads without waiting for them."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _is_gone(before: Credential, after: Credential | None) -> bool:
    """Whether connections that the credential let in have to end."""
    if before.disabled:
        return False
    if after is None or after.disabled:
        return True
    if (before.role, before.argon2) != (after.role, after.argon2):
        return True
    # A renewal keeps the certificate before it; with none in common it is another enrollment.
    return bool(before.serials) and not set(before.serials) & set(after.serials)
