"""Passports: whose key a key is, proven by the registry and carried by its owner.

A receiver that wants to know whether a router really sent an invocation needs the router's key.
Nobody hands out a directory of keys; each member shows its passport: identity, role and public key,
signed by the registry of the site at enrollment (the same idea as a certificate, in the form of
all other signed messages). Whoever knows the registry's key, as every member does from its own
enrollment, can check it. Routers and nodes show theirs with their state, administrators with each
request.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Annotated, Final

from pydantic import Field, StringConstraints

from capability_schemas.capability import CapabilityPolicy
from capability_schemas.errors import AccessDenied, BadSignature
from capability_schemas.ids import Identifier, now_ms
from capability_schemas.signing import SigningKey, sign, verify
from capability_schemas.wire import WireModel

CLOCK_SKEW_MS: Final = 5 * 60_000
"""How far the clocks of two members may differ, milliseconds."""

_KEPT: Final = 4_096


class Passport(WireModel):
    """What the registry vouches for.

    Attributes:
        identity: Who it is.
        role: What it is in the mesh (PROTOCOL section 6).
        site: Where it is valid.
        public_key: Its Ed25519 key, base64.
        attested: Zones, grants and data classes of a node.
        issued_at: UTC milliseconds.
        expires_at: UTC milliseconds.
        registry: Who vouches.
        signature: Of the registry, Ed25519 over the canonical bytes.
    """

    identity: Identifier
    role: Annotated[str, StringConstraints(pattern=r"^[a-z]{1,16}$")]
    site: Identifier
    public_key: Annotated[str, StringConstraints(min_length=44, max_length=44)]
    attested: CapabilityPolicy | None = None
    issued_at: Annotated[int, Field(ge=0)]
    expires_at: Annotated[int, Field(ge=0)]
    registry: Identifier
    signature: str | None = None


def issue(passport: Passport, key: SigningKey) -> Passport:
    """Sign a passport.

    Args:
        passport: What to vouch for.
        key: Key of the registry it names.
    """
    return sign(passport, key)


class PassportBook:
    """The passports a member has been shown, as far as they are worth anything.

    Bounded: the passport looked at longest ago is forgotten first, and shown again by its owner.
    Owned by one loop.

    Args:
        site: The own site.
        registries: Public keys of its registries by id: the root of all trust in signatures.
        clock: UTC milliseconds.
    """

    def __init__(
        self, *, site: str, registries: Mapping[str, str], clock: Callable[[], int] = now_ms
    ) -> None:
        self._site = site
        self._roots = dict(registries)
        self._clock = clock
        self._known: OrderedDict[str, Passport] = OrderedDict()
        self._revoked: dict[str, int] = {}
        self._voided_roots: set[str] = set()
        self._vouched: dict[str, Passport] = {}
        """Passports of registries; few, and kept whatever else is forgotten."""

    def admit(self, passport: Passport) -> None:
        """Take note of a passport.

        One that is known costs nothing; of two for one identity the one issued later stays. The
        earlier one may still be shown where it says the same of the same key, for a member may
        have its papers in two places.

        Raises:
            AccessDenied: It is of another site, run out, not yet valid, revoked, or signed by a
                registry that is not known here.
            BadSignature: Its signature is not the registry's.
        """
        known = self._known.get(passport.identity)
        if known != passport:
            self._check(passport)
            if known is not None and known.issued_at > passport.issued_at:
                if (known.public_key, known.role) == (passport.public_key, passport.role):
                    return
                raise AccessDenied(
                    f"passport of {passport.identity} is older than the one known",
                    identity=passport.identity,
                )
            self._known[passport.identity] = passport
            if passport.role == "registry":
                self._vouched[passport.identity] = passport
        self._known.move_to_end(passport.identity)
        if len(self._known) > _KEPT:
            self._known.popitem(last=False)

    def key(self, identity: str, *roles: str) -> str:
        """Return the public key of a member.

        Args:
            identity: Who.
            roles: What it has to be, one of these.

        Raises:
            AccessDenied: No valid passport of such a member is known.
        """
        if "registry" in roles and (registry := self.registries.get(identity)) is not None:
            return registry
        passport = self._known.get(identity)
        if passport is None:
            gone = identity in self._revoked
            raise AccessDenied(
                f"the passport of {identity} was revoked: it has to enroll again"
                if gone
                else f"{identity} has shown no passport",
                identity=identity,
            )
        self._check_time(passport)
        if passport.role not in roles:
            raise AccessDenied(
                f"{identity} is a {passport.role}, not a {' or '.join(roles)}", identity=identity
            )
        return passport.public_key

    @property
    def registries(self) -> Mapping[str, str]:
        """Public keys of the registries that are believed, by id.

        Those are the roots, which the member's own papers name, and registries whose passport is
        signed by a root; none that was revoked.
        """
        now = self._clock()
        vouched = {
            name: passport.public_key
            for name, passport in self._vouched.items()
            if now <= passport.expires_at + CLOCK_SKEW_MS
        }
        return {**self._good_roots(), **vouched}

    def believe(self, registries: Mapping[str, str]) -> None:
        """Believe further registries, as the member's own new papers name them."""
        for name, key in registries.items():
            if self._roots.get(name) != key:
                self._roots[name] = key
                self._voided_roots.discard(name)

    def _good_roots(self) -> dict[str, str]:
        return {name: key for name, key in self._roots.items() if name not in self._voided_roots}

    def knows(self, identity: str) -> bool:
        """Tell whether a member has shown a passport, valid or not, or is a registry."""
        return identity in self._known or identity in self._roots

    def passport(self, identity: str) -> Passport | None:
        """Return what is known of a member, valid or not."""
        return self._known.get(identity)

    def revoke(self, identity: str, *, before: int) -> None:
        """Let every passport of a member that was issued before a time count for nothing.

        Args:
            identity: Who.
            before: UTC milliseconds; a passport issued later (a new enrollment) counts.
        """
        self._revoked[identity] = max(before, self._revoked.get(identity, 0))
        known = self._known.get(identity)
        if known is not None and known.issued_at < before:
            del self._known[identity]
        vouched = self._vouched.get(identity)
        if vouched is not None and vouched.issued_at < before:
            del self._vouched[identity]
        if identity in self._roots:
            # Its key is told in papers, which say not when it was made: only new papers, or a
            # later passport by another root, bring it back.
            self._voided_roots.add(identity)

    def verify(self, message: bytes | WireModel, sender: str, *roles: str) -> None:
        """Check that a message is signed by a member in one of these roles.

        Args:
            message: Payload as received (preferred), or a message made here.
            sender: Who says to have sent it.
            roles: What the sender has to be.

        Raises:
            AccessDenied: The sender has no valid passport of such a role.
            BadSignature: It did not sign this.
            MalformedPayload: The payload is not JSON.
        """
        verify(message, self.key(sender, *roles))

    def _check(self, passport: Passport) -> None:
        who = passport.identity
        if passport.site != self._site:
            raise AccessDenied(
                f"passport of {who} is of site {passport.site}, not {self._site}", identity=who
            )
        self._check_time(passport)
        if passport.issued_at < self._revoked.get(who, 0):
            raise AccessDenied(f"passport of {who} was revoked: enroll again", identity=who)
        roots = self._good_roots()
        root = roots.get(passport.registry)
        if root is None and passport.role != "registry":
            root = self.registries.get(passport.registry)
        if root is None:
            raise AccessDenied(
                f"passport of {who} is signed by {passport.registry}, which is no registry here",
                identity=who,
            )
        try:
            verify(passport, root)
        except BadSignature as exc:
            raise BadSignature(
                f"passport of {who} is not signed by registry {passport.registry}", identity=who
            ) from exc

    def _check_time(self, passport: Passport) -> None:
        now, who = self._clock(), passport.identity
        if now > passport.expires_at + CLOCK_SKEW_MS:
            raise AccessDenied(
                f"passport of {who} ran out {now - passport.expires_at} ms ago: renew it (are the "
                "clocks right?)",
                identity=who,
            )
        if now < passport.issued_at - CLOCK_SKEW_MS:
            raise AccessDenied(
                f"passport of {who} is valid only in {passport.issued_at - now} ms: are the clocks "
                "right?",
                identity=who,
            )
