"""What the registry thinks of a member at the moment, and what a node shows to be trusted.

A passport says who somebody is for weeks; a ``TrustState`` says what became of that since: thrown
out, lapsed because its evidence ran out, or in good standing. The registry signs it and keeps it
retained on ``trust/{member}``, so that a receiver applies it whatever the broker's own access rules
do. ``Evidence`` is the other direction: what a node measured of itself, signed with its key, on
``evidence/{node}``. What may be concluded from it, the registry's operator decides (ADR 23).
"""

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import Field, StringConstraints

from capability_schemas.errors import AccessDenied, MalformedPayload
from capability_schemas.ids import Identifier
from capability_schemas.signing import verify
from capability_schemas.wire import Count, WireModel, WirePart, decode

TRUST_LIMIT_BYTES: Final = 16 * 1024
EVIDENCE_LIMIT_BYTES: Final = 256 * 1024
MAX_MEASUREMENTS: Final = 1_024
"""Most digests in one piece of evidence; whoever has more files measures folders."""

_MAX_STATEMENTS: Final = 16

Standing = Literal["trusted", "lapsed", "revoked"]
Challenge = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32,64}$")]
"""Random bytes of the registry, hexadecimal, that prove that evidence was made after it."""

Measured = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._:@/+ -]{1,200}$")]
"""What a digest is of: ``code/node_agent``, ``function/NAME``, ``model/NAME``."""

Sha256 = Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]


class TrustState(WireModel):
    """What a registry says of a member; retained on ``trust/{member}``.

    Attributes:
        member: Whom it is about; the level of the topic.
        state: ``trusted``; ``lapsed`` when what its rights rest on is missing, wrong or too old:
            the rights that need it are taken from it, it remains a member; ``revoked`` when it was
            thrown out.
        at: When this was so, UTC milliseconds; of two states the later one counts.
        until: When this ends by itself, UTC milliseconds; None: as long as its passport.
        void_before: Passports of this member that were issued earlier count for nothing, in every
            state: after a new enrollment the member is trusted, and its old passport is void.
        reason: Why, for people.
        challenge: What the member's next evidence has to answer; None where none is asked for.
        renew_from: Papers of this member that were issued earlier should be renewed now: the
            site's authority has another root.
        role: What it is in the mesh, where the registry tells.
        tenant: Whose it is, where it is anybody's.
        registry: Who says so.
        term: In which term that registry leads; what was said in a later term counts, whatever
            the clocks of the registries say.
        signature: Of the registry, Ed25519 over the canonical bytes.
    """

    member: Identifier
    state: Standing
    at: Count
    until: Count | None = None
    void_before: Count | None = None
    reason: Annotated[str, StringConstraints(max_length=2_000)] = ""
    challenge: Challenge | None = None
    renew_from: Count | None = None
    role: Annotated[str, StringConstraints(pattern=r"^[a-z]{1,16}$")] | None = None
    tenant: Identifier | None = None
    registry: Identifier
    term: Count | None = None
    signature: str | None = None


def read_trust(payload: bytes, *, member: str, registries: Mapping[str, str]) -> TrustState:
    """Decode and check a trust state as received.

    Args:
        payload: As received, not empty.
        member: The level of its topic.
        registries: Public keys of the site's registries by id.

    Raises:
        TooLarge: It is longer than ``TRUST_LIMIT_BYTES``.
        MalformedPayload: It is none, or names another member than its topic.
        AccessDenied: It is of a registry that is not known here.
        BadSignature: That registry did not sign it.
    """
    state: TrustState = decode(TrustState, payload, limit_bytes=TRUST_LIMIT_BYTES)
    if state.member != member:
        raise MalformedPayload(
            f"member: the state is of {state.member}, its topic of {member}", field="member"
        )
    key = registries.get(state.registry)
    if key is None:
        raise AccessDenied(
            f"trust state of {member} is signed by {state.registry}, which is no registry here",
            identity=state.registry,
        )
    verify(payload, key)
    return state


class Statement(WirePart):
    """What a further source of evidence says: a TPM, a security module, a scanner.

    Attributes:
        source: Which source; the name of its entry point.
        data: Its fields, JSON; binary ones in base64.
    """

    source: Identifier
    data: dict[str, Any]


class Evidence(WireModel):
    """What a node measured of itself; retained on ``evidence/{node}``.

    Software measures itself here: that shows mistakes, stale versions and honest drift, and not a
    machine that lies. What a TPM signs (a ``Statement``) goes further.

    Attributes:
        node: Whose it is.
        epoch: Start of the node agent, UTC milliseconds.
        at: When it was made, UTC milliseconds.
        challenge: The registry's that it answers; None before the node has seen one.
        boot: Identifier of the machine's boot, where the system tells.
        platform: Facts of machine and interpreter, by name.
        measurements: Digests by what they are of.
        statements: Of further sources.
        signature: Of the node, Ed25519 over the canonical bytes.
    """

    node: Identifier
    epoch: Count
    at: Count
    challenge: Challenge | None = None
    boot: Annotated[str, StringConstraints(max_length=64)] | None = None
    platform: Annotated[
        dict[Identifier, Annotated[str, StringConstraints(max_length=200)]], Field(max_length=32)
    ] = Field(default_factory=dict)
    measurements: Annotated[dict[Measured, Sha256], Field(max_length=MAX_MEASUREMENTS)] = Field(
        default_factory=dict
    )
    statements: Annotated[tuple[Statement, ...], Field(max_length=_MAX_STATEMENTS)] = ()
    signature: str | None = None
