"""Papers of members: certificate, passport, and the replies they travel in. Pure but for keys."""

from collections.abc import Callable, Mapping, Sequence
from typing import Final, Literal

from broker.access.authority import Authority, Certificate, read_request
from broker.access.policy import Role
from capability_schemas.capability import CapabilityPolicy
from capability_schemas.enrollment import EnrollReply, EnrollRequest
from capability_schemas.errors import AccessDenied, ProtocolError
from capability_schemas.passport import Passport, issue
from capability_schemas.signing import SigningKey

PAPERS_DAYS: Final = 30.0
RENEW_SHARE: Final = 2 / 3
"""Papers are renewed when this share of their time has passed, which leaves days for retries."""

SIGNING_ROLES: Final = frozenset({Role.NODE, Role.ROUTER, Role.REGISTRY, Role.ADMIN, Role.OPERATOR})
"""Roles whose messages are signed, so that they have to bring a key."""

_DAY_MS: Final = 86_400_000


class PaperOffice:
    """Makes papers; decides nothing.

    Args:
        site: The site.
        registry_id: Who vouches.
        key: Signs passports.
        authority: Signs certificates; None where the site has no TLS.
        brokers: Tells where members connect to.
        member_brokers: Tells where those with a certificate do; empty: at the same place.
        certificates: Whether the broker takes certificates; else everybody gets a password.
        registries: Returns the public keys of all registries that members may believe.
        clock: UTC milliseconds.
    """

    def __init__(
        self,
        *,
        site: str,
        registry_id: str,
        key: SigningKey,
        authority: Authority | None,
        brokers: Callable[[], Sequence[str]],
        member_brokers: Callable[[], Sequence[str]] = tuple,
        certificates: bool = True,
        registries: Callable[[], Mapping[str, str]] = dict,
        clock: Callable[[], int],
    ) -> None:
        self._site = site
        self._registry_id = registry_id
        self._key = key
        self._authority = authority
        self._brokers = brokers
        self._member_brokers = member_brokers
        self._certificates = certificates
        self._registries = registries
        self._clock = clock

    def certify(self, request: EnrollRequest, role: Role) -> Certificate | None:
        """Check the keys of a request, and certify the one for TLS.

        Returns:
            The certificate; None when the request asks for none.

        Raises:
            ProtocolError: A key is missing or weak, or the signing request asks for too much.
            AccessDenied: The site signs no certificates.
        """
        if role in SIGNING_ROLES and request.public_key is None:
            raise ProtocolError(f"a {role.value} needs a signing key: public_key is missing")
        if request.csr is None or not self._certificates:
            return None
        if self._authority is None:
            raise AccessDenied("this site signs no certificates: leave the signing request out")
        public = read_request(request.csr, request.id)
        return self._authority.issue_client(public, identity=request.id, role=role)

    def granted(
        self,
        request: EnrollRequest,
        role: Role,
        attested: CapabilityPolicy | None,
        certificate: Certificate | None,
        sealed: str | None,
    ) -> EnrollReply:
        """Write the reply to a request that is granted.

        Args:
            request: The request.
            role: Role granted.
            attested: What is vouched for.
            certificate: As ``certify`` made it.
            sealed: Secrets, sealed.
        """
        now = self._clock()
        until = now + round(PAPERS_DAYS * _DAY_MS)
        if certificate is not None:
            until = min(until, certificate.not_after)
        passport = None
        if request.public_key is not None:
            passport = issue(
                Passport(
                    identity=request.id,
                    role=role.value,
                    site=self._site,
                    public_key=request.public_key,
                    attested=attested,
                    issued_at=now,
                    expires_at=until,
                    registry=self._registry_id,
                ),
                self._key,
            )
        brokers = (self._member_brokers() if certificate is not None else ()) or self._brokers()
        return self.reply(request, "granted").model_copy(
            update={
                "id": request.id,
                "role": role.value,
                "site": self._site,
                "certificate": certificate.pem if certificate is not None else None,
                "authority": self._authority.bundle if self._authority is not None else None,
                "brokers": tuple(brokers),
                "passport": passport,
                "registries": {**self._registries(), self._registry_id: self._key.public},
                "sealed": sealed,
                "renew_at": now + round((until - now) * RENEW_SHARE),
            }
        )

    def reply(
        self,
        request: EnrollRequest,
        status: Literal["granted", "pending", "refused"],
        *,
        reason: str = "",
        retryable: bool = False,
    ) -> EnrollReply:
        """Write a reply without papers."""
        return EnrollReply(
            nonce=request.nonce,
            status=status,
            at=self._clock(),
            reason=reason,
            retryable=retryable,
        )
