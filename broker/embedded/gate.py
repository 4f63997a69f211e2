"""Decides for the embedded broker: who comes in, and what each may do."""

import asyncio
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from enum import IntEnum
from typing import Final

import structlog

from broker.access.credentials import Credential, CredentialStore, VerifiedCache
from broker.access.policy import AccessPolicy, Action

_log = structlog.get_logger(__name__)

_ANSWERS_LIMIT: Final = 32_768


class Admission(IntEnum):
    """CONNACK return codes (MQTT 3.1.1 table 3.1)."""

    ACCEPTED = 0
    IDENTIFIER_REJECTED = 2
    UNAVAILABLE = 3
    NOT_AUTHORIZED = 5


class Gate:
    """Checks passwords off the loop and rights on it.

    One loop owns it. Hashing happens in two threads of its own, and a password that was right once
    is recognised without hashing, so reconnection storms are cheap. Rights are remembered per
    (identity, action, topic) until the credentials change.

    Life cycle: ``close`` ends its threads.

    Args:
        credentials: Who exists.
        policy: What each role may.
    """

    def __init__(self, *, credentials: CredentialStore, policy: AccessPolicy) -> None:
        self._credentials = credentials
        self._policy = policy
        self._known = credentials.identities()
        self._verified = VerifiedCache()
        self._answers: OrderedDict[tuple[str, Action, str], bool] = OrderedDict()
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="foam-password")

    async def admit(self, identity: str | None, password: str | None, client_id: str) -> Admission:
        """Decide on a CONNECT; cancellation is safe.

        Args:
            identity: Its username, if any.
            password: Its password, if any.
            client_id: Its client id.

        Returns:
            ``NOT_AUTHORIZED`` without a right password, ``IDENTIFIER_REJECTED`` for a client id
            that belongs to another identity.
        """
        if identity is None or password is None:
            return Admission.NOT_AUTHORIZED
        found = self._known.get(identity)
        if found is None or not self._verified.knows(identity, found, password):
            found = await asyncio.get_running_loop().run_in_executor(
                self._threads, self._credentials.verify, identity, password
            )
            if found is not None:
                self._verified.remember(identity, found, password)
        if found is None or found.disabled or self._known.get(identity) != found:
            return Admission.NOT_AUTHORIZED
        if client_id != identity:
            owner = self._known.get(client_id)
            if found.role.binds_client_id or (owner is not None and owner.role.binds_client_id):
                return Admission.IDENTIFIER_REJECTED
        return Admission.ACCEPTED

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
            and self._policy.allows(holder.role, identity, action, topic)
        )
        if len(self._answers) >= _ANSWERS_LIMIT:
            self._answers.popitem(last=False)
        self._answers[question] = answer
        return answer

    async def reload(self) -> frozenset[str]:
        """Read the credentials again; cancellation is safe.

        Returns:
            Identities whose connections must end: removed, disabled, or of another role or
            password.

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
            if _access(credential) != _access(self._known.get(identity))
        )
        _log.info("access.reloaded", identities=len(self._known), revoked=len(gone))
        return gone

    def close(self) -> None:
        """End the threads without waiting for them."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _access(credential: Credential | None) -> tuple[object, ...] | None:
    if credential is None or credential.disabled:
        return None
    return (credential.role, credential.argon2)
