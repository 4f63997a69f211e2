"""Claims and records for tests."""

from typing import Any

from capability_schemas.capability import CapabilityClaim, CatalogRecord
from capability_schemas.signing import SigningKey, sign
from capability_schemas.wire import encode
from registry.encoders import Encoder
from registry.vectors import capability_texts, record_vectors


def make_claim(node: str = "edge-1", function: str = "echo", **more: Any) -> CapabilityClaim:
    fields: dict[str, Any] = {
        "node": node,
        "function": function,
        "version": "1.0.0",
        "epoch": 10,
        "revision": 1,
        "description": "repeats what it was told",
        "examples": ("say it again", "echo this text"),
    }
    return CapabilityClaim(**{**fields, **more})


def signed(claim: CapabilityClaim, key: SigningKey) -> bytes:
    return encode(sign(claim, key))


def bare_record(node: str = "edge-1", function: str = "echo", **more: Any) -> CatalogRecord:
    """Make a record that no encoder has seen."""
    admitted = {"registry": "registry-1", "admitted_at": 1, "claim_digest": "sha256:0"}
    fields = make_claim(node, function).model_dump(exclude={"embedding", "space"})
    return CatalogRecord(**{**fields, **admitted, **more})


def make_record(
    encoder: Encoder, node: str = "edge-1", function: str = "echo", **more: Any
) -> CatalogRecord:
    claim = make_claim(node, function, **more)
    texts = capability_texts(claim.function, claim.description, claim.examples, claim.input_schema)
    vectors = record_vectors(encoder.encode(texts), len(claim.examples))
    fields = claim.model_dump(exclude={"embedding", "space"})
    return CatalogRecord(
        **{
            **fields,
            **vectors._asdict(),
            "space": encoder.space,
            "registry": "registry-1",
            "admitted_at": 1,
            "claim_digest": "sha256:0",
        }
    )
