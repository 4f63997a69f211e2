"""The rotation of the site's authority, as operators see it: who follows, and who has not yet."""

from collections.abc import Callable, Mapping
from typing import Any, Final

from broker.access.authority import SETTLE_MS, Authority
from broker.access.credentials import Credential, CredentialStore
from capability_schemas.errors import Conflict, NotFound
from capability_schemas.ids import now_ms
from registry.enrollment.book import Token

_SHOWN: Final = 20


class Rotation:
    """Rotates the authority of a site, and knows who has a certificate of the newest root.

    Blocking but for ``due``; for one thread at a time.

    Args:
        authority: Of the site; None where it has no TLS.
        credentials: Whose certificates count.
        tokens: Returns the join tokens that may still be used.
        clock: UTC milliseconds.
    """

    def __init__(
        self,
        *,
        authority: Authority | None,
        credentials: CredentialStore,
        tokens: Callable[[], Mapping[str, Token]],
        clock: Callable[[], int] = now_ms,
    ) -> None:
        self._authority = authority
        self._credentials = credentials
        self._tokens = tokens
        self._clock = clock
        self._due: tuple[object, int, Mapping[str, int]] = (None, 0, {})

    def facts(self) -> dict[str, Any]:
        """Return roots, members that have not renewed, and tokens that go with the old root.

        ``bundle`` is the certificates to trust, PEM.

        Raises:
            NotFound: The site has no authority.
        """
        authority = self._present()
        since = self._since(authority)
        waiting = self._waiting(authority) if authority.rotating else []
        return {
            "roots": [
                {
                    "number": root.number,
                    "fingerprint": root.fingerprint,
                    "made_at": root.made_at,
                    "not_after": root.not_after,
                    "signing": root.signing,
                }
                for root in authority.roots()
            ],
            "bundle": authority.bundle,
            "rotating": authority.rotating,
            "not_renewed": waiting,
            "old_tokens": sorted(
                name
                for name, token in self._tokens().items()
                if authority.rotating and token.created_at < since
            ),
        }

    def rotate(self) -> dict[str, Any]:
        """Make a new root; returns the facts after it.

        Raises:
            NotFound: The site has no authority.
            Conflict: A rotation is under way.
            ConfigurationError: The folder cannot be written.
        """
        self._present().rotate()
        return self.facts()

    def retire(self, *, force: bool) -> dict[str, Any]:
        """Drop the old root; returns the facts after it, and who is locked out by that.

        Args:
            force: Also when members would be locked out.

        Raises:
            NotFound: The site has no authority.
            Conflict: No rotation is under way, the new root is too young, or members have not
                renewed.
        """
        authority = self._present()
        waiting = self._waiting(authority)
        if authority.rotating and self._clock() < self._since(authority):
            raise Conflict("the new root was made just now: the brokers may not have read it yet")
        if authority.rotating and waiting and not force:
            more = f" and {len(waiting) - _SHOWN} more" if len(waiting) > _SHOWN else ""
            raise Conflict(
                f"{len(waiting)} have not renewed yet: {', '.join(waiting[:_SHOWN])}{more}; those "
                "that run do so within a minute; with --force the others have to enroll again"
            )
        authority.retire()
        return {**self.facts(), "locked_out": waiting}

    def due(self) -> Mapping[str, int]:
        """Return the members that should renew now, and since when new papers are to be had.

        The same object as long as nothing has changed.
        """
        authority = self._authority
        if authority is None or not authority.rotating:
            since = 0
        else:
            since = self._since(authority)
            since = since if self._clock() >= since else 0
        identities = self._credentials.identities()
        if identities is not self._due[0] or since != self._due[1]:
            found = self._waiting(authority) if since and authority is not None else []
            self._due = (identities, since, dict.fromkeys(found, since))
        return self._due[2]

    def _present(self) -> Authority:
        if self._authority is None:
            raise NotFound("this site has no authority: its broker listens without TLS")
        return self._authority

    @staticmethod
    def _since(authority: Authority) -> int:
        return authority.roots()[0].made_at + SETTLE_MS

    def _waiting(self, authority: Authority) -> list[str]:
        """Return the members whose newest certificate is not by the newest root."""

        def lags(known: Credential) -> bool:
            return bool(known.serials) and not authority.is_by_newest(known.serials[0])

        now = self._clock()
        return sorted(
            name
            for name, known in self._credentials.identities().items()
            if known.counts(now) and lags(known)
        )
