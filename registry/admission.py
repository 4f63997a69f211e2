"""Whether a claim becomes part of the catalogue.

Pure: bytes and what is known go in, a verdict comes out. Gate order, cheapest first: topic, size,
decoding, version, signature, order, lease, schemas. A refusal names its gate and says what to do.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

from capability_schemas.capability import CapabilityClaim, CapabilityPolicy, EncoderSpace
from capability_schemas.errors import (
    BadSignature,
    ConfigurationError,
    MalformedPayload,
    TooLarge,
)
from capability_schemas.functions import check_schema
from capability_schemas.signing import canonical_bytes, verify
from capability_schemas.wire import decode, parse_json
from registry.encoders.base import Vectors
from registry.vectors import unpack_vector

Key = tuple[str, str]
"""``(node, function)``."""

ALL_DATA: Final = CapabilityPolicy()


class Reason(StrEnum):
    """Why a claim was refused."""

    TOPIC = "topic"
    TOO_LARGE = "too_large"
    MALFORMED = "malformed"
    VERSION = "version"
    UNKNOWN_NODE = "unknown_node"
    SIGNATURE = "signature"
    STALE = "stale"
    CONFLICT = "conflict"
    EXPIRED = "expired"
    SCHEMA = "schema"
    EMBEDDING = "embedding"
    OVERLOADED = "overloaded"


@dataclass(frozen=True, slots=True)
class Identity:
    """What the directory knows about a node.

    Attributes:
        public_key: Ed25519 key that its claims are signed with, base64.
        attested: zones, data classes and grants that an operator vouches for. By default an
            enrolled node may see every class of data, stands in no zone and holds no grant.
    """

    public_key: str
    attested: CapabilityPolicy = ALL_DATA


Identities = Callable[[str], Identity | str | None]
"""Looks a node up: its entry, its bare public key, or None when it is not enrolled."""


@dataclass(frozen=True, slots=True)
class Standing:
    """What the catalogue last heard about a key.

    Attributes:
        order: ``(epoch, revision)`` of the newest claim.
        digest: of that claim.
        withdrawn: whether it has since been withdrawn or has expired.
    """

    order: tuple[int, int]
    digest: str
    withdrawn: bool = False


@dataclass(frozen=True, slots=True)
class Admitted:
    """The claim may enter the catalogue once it is embedded.

    Attributes:
        claim: as decoded.
        digest: ``sha256:`` and the hex digest of its canonical bytes.
        policy: what of its policy is attested.
    """

    claim: CapabilityClaim
    digest: str
    policy: CapabilityPolicy


@dataclass(frozen=True, slots=True)
class Unchanged:
    """The very claim that the catalogue holds already.

    Attributes:
        claim: as decoded.
    """

    claim: CapabilityClaim


@dataclass(frozen=True, slots=True)
class Refused:
    """The claim does not enter the catalogue.

    Attributes:
        reason: the gate that refused it.
        message: what was wrong and what to do.
        detail: fields for programs.
    """

    reason: Reason
    message: str
    detail: dict[str, Any] = field(default_factory=dict)


Verdict = Admitted | Unchanged | Refused


def judge(
    payload: bytes,
    *,
    key: Key,
    standing: Standing | None,
    identity: Identity | str | None,
    now: int,
    limit_bytes: int,
) -> Verdict:
    """Pass a claim through the gates.

    Args:
        payload: as received, not empty.
        key: node and function as the topic names them.
        standing: what the catalogue holds or last held under this key.
        identity: the node's entry in the directory.
        now: UTC milliseconds.
        limit_bytes: longest payload to look at.
    """
    claim = _decoded(payload, limit_bytes)
    if isinstance(claim, Refused):
        return claim
    if claim.key != key:
        return Refused(
            Reason.TOPIC,
            f"the claim names {claim.node}/{claim.function}, its topic {key[0]}/{key[1]}",
        )
    refused = _unproven(payload, key[0], identity)
    if refused is not None:
        return refused
    digest = claim_digest(payload)
    if standing is not None:
        if claim.order < standing.order:
            return Refused(
                Reason.STALE,
                f"order {claim.order} is older than {standing.order}: publish a greater epoch "
                "or revision (is the node's clock right?)",
                {"order": list(claim.order), "known": list(standing.order)},
            )
        if claim.order == standing.order:
            if digest != standing.digest:
                return Refused(
                    Reason.CONFLICT,
                    f"order {claim.order} already stands for other content: two processes act as "
                    "this node, or it did not raise its revision",
                    {"order": list(claim.order), "known": standing.digest, "claimed": digest},
                )
            if not standing.withdrawn:
                return Unchanged(claim)
    return _lasting(claim, now) or Admitted(claim, digest, attested_policy(claim.policy, identity))


def claim_digest(payload: bytes) -> str:
    """``sha256:`` and the hex digest of the canonical bytes of a claim as received.

    Raises:
        MalformedPayload: not JSON.
    """
    return "sha256:" + hashlib.sha256(canonical_bytes(parse_json(payload))).hexdigest()


def attested_policy(wished: CapabilityPolicy, identity: Identity | str | None) -> CapabilityPolicy:
    """Intersect what a claim wishes for with what the directory vouches for.

    That a function hands tasks to a service outside is a restriction: either side may state it.
    """
    attested = identity.attested if isinstance(identity, Identity) else ALL_DATA
    return CapabilityPolicy(
        zones=tuple(zone for zone in wished.zones if zone in attested.zones),
        data=tuple(kind for kind in wished.data if kind in attested.data),
        grants=tuple(grant for grant in wished.grants if grant in attested.grants),
        external=wished.external or attested.external,
        tenant=attested.tenant,
    )


def check_given(
    claim: CapabilityClaim, own: Vectors, space: EncoderSpace, *, similarity: float
) -> Refused | None:
    """Compare an embedding that a claim brings with our own, which alone is ever published.

    A vector of another space says nothing and is ignored; one of our space must be sound and mean
    the same, for otherwise the node's encoder is broken or somebody tries to poison the catalogue.

    Args:
        claim: the claim.
        own: our vector of its texts, length 1.
        space: our space.
        similarity: least cosine.
    """
    if claim.embedding is None or claim.space != space:
        return None
    try:
        given = unpack_vector(claim.embedding, space.dimension)
    except ValueError as exc:
        return Refused(Reason.EMBEDDING, f"embedding: {exc}")
    cosine = float(given @ own)
    if cosine < similarity:
        return Refused(
            Reason.EMBEDDING,
            f"embedding: cosine {cosine:.3f} to the registry's own of the same texts, at least "
            f"{similarity} is needed: leave it out, or mend the node's encoder",
            {"cosine": round(cosine, 4)},
        )
    return None


def _decoded(payload: bytes, limit_bytes: int) -> CapabilityClaim | Refused:
    try:
        return decode(CapabilityClaim, payload, limit_bytes=limit_bytes)
    except TooLarge as exc:
        return Refused(Reason.TOO_LARGE, exc.message, exc.detail)
    except MalformedPayload as exc:
        reason = Reason.VERSION if exc.detail.get("field") == "v" else Reason.MALFORMED
        return Refused(reason, exc.message, exc.detail)


def _unproven(payload: bytes, node: str, identity: Identity | str | None) -> Refused | None:
    public = identity.public_key if isinstance(identity, Identity) else identity
    if public is None:
        return Refused(
            Reason.UNKNOWN_NODE, f"node {node} has no signing key on record: enroll it first"
        )
    try:
        verify(payload, public)
    except (BadSignature, MalformedPayload) as exc:
        return Refused(Reason.SIGNATURE, exc.message)
    return None


def _lasting(claim: CapabilityClaim, now: int) -> Refused | None:
    if claim.expires_at is not None and claim.expires_at <= now:
        return Refused(
            Reason.EXPIRED,
            f"the lease ended {now - claim.expires_at} ms ago: renew it with a new revision",
            {"expires_at": claim.expires_at},
        )
    for name, schema in (
        ("input_schema", claim.input_schema),
        ("output_schema", claim.output_schema),
    ):
        if schema is None:
            continue
        try:
            check_schema(schema)
        except ConfigurationError as exc:
            return Refused(Reason.SCHEMA, f"{name}: {exc.message}")
    return None
