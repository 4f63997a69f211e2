import json
from typing import Any

import numpy as np
import pytest

from capability_schemas.capability import CapabilityClaim, CapabilityPolicy
from capability_schemas.signing import SigningKey, canonical_bytes
from registry.admission import (
    Admitted,
    Identity,
    Reason,
    Refused,
    Standing,
    Unchanged,
    Verdict,
    attested_policy,
    check_given,
    claim_digest,
    judge,
)
from registry.encoders import unit
from registry.vectors import pack_vector
from support.capabilities import make_claim, signed
from support.encoders import WordEncoder

KEY = SigningKey.generate()
NOW = 1_000_000


def ask(payload: bytes, **more: Any) -> Verdict:
    given: dict[str, Any] = {
        "key": ("edge-1", "echo"),
        "standing": None,
        "identity": Identity(KEY.public),
        "now": NOW,
        "limit_bytes": 10_000,
    }
    return judge(payload, **{**given, **more})


def refusal(verdict: Verdict) -> Reason:
    assert isinstance(verdict, Refused), verdict
    assert verdict.message
    return verdict.reason


def altered(payload: bytes, **fields: Any) -> bytes:
    return json.dumps({**json.loads(payload), **fields}).encode()


def test_a_sound_claim_is_admitted() -> None:
    payload = signed(make_claim(), KEY)
    verdict = ask(payload)
    assert isinstance(verdict, Admitted)
    assert verdict.claim.function == "echo"
    assert verdict.digest == claim_digest(payload)


def test_a_bare_public_key_is_an_identity() -> None:
    assert isinstance(ask(signed(make_claim(), KEY), identity=KEY.public), Admitted)


def test_a_claim_of_a_newer_peer_with_more_fields_is_admitted() -> None:
    fields = {**json.loads(signed(make_claim(), KEY)), "later": {"x": 1}}
    fields["signature"] = KEY.sign_bytes(canonical_bytes(fields))
    assert isinstance(ask(json.dumps(fields).encode()), Admitted)


@pytest.mark.parametrize(
    ("payload", "more", "reason"),
    [
        (signed(make_claim(node="edge-2"), KEY), {}, Reason.TOPIC),
        (signed(make_claim(function="other"), KEY), {}, Reason.TOPIC),
        (signed(make_claim(description="x" * 1_500), KEY), {"limit_bytes": 500}, Reason.TOO_LARGE),
        (b"\xff\xfe", {}, Reason.MALFORMED),
        (b"not json", {}, Reason.MALFORMED),
        (b"[]", {}, Reason.MALFORMED),
        (b'{"v": 1}', {}, Reason.MALFORMED),
        (altered(signed(make_claim(), KEY), epoch=-1), {}, Reason.MALFORMED),
        (altered(signed(make_claim(), KEY), epoch=2**53), {}, Reason.MALFORMED),
        (altered(signed(make_claim(), KEY), v=2), {}, Reason.VERSION),
        (signed(make_claim(), KEY), {"identity": None}, Reason.UNKNOWN_NODE),
        (signed(make_claim(), SigningKey.generate()), {}, Reason.SIGNATURE),
        (altered(signed(make_claim(), KEY), revision=2), {}, Reason.SIGNATURE),
        (altered(signed(make_claim(), KEY), signature=None), {}, Reason.SIGNATURE),
        (signed(make_claim(expires_at=NOW), KEY), {}, Reason.EXPIRED),
        (signed(make_claim(input_schema={"type": 7}), KEY), {}, Reason.SCHEMA),
        (signed(make_claim(output_schema={"required": "x"}), KEY), {}, Reason.SCHEMA),
    ],
)
def test_refusals_name_their_gate(payload: bytes, more: dict[str, Any], reason: Reason) -> None:
    assert refusal(ask(payload, **more)) is reason


class TestOrder:
    payload = signed(make_claim(epoch=10, revision=5), KEY)
    digest = claim_digest(payload)

    @pytest.mark.parametrize("order", [(10, 6), (11, 0)])
    def test_an_older_claim_is_stale(self, order: tuple[int, int]) -> None:
        assert refusal(ask(self.payload, standing=Standing(order, "sha256:x"))) is Reason.STALE

    @pytest.mark.parametrize("order", [(10, 4), (9, 99)])
    def test_a_newer_claim_is_admitted(self, order: tuple[int, int]) -> None:
        assert isinstance(ask(self.payload, standing=Standing(order, "sha256:x")), Admitted)

    def test_the_same_claim_changes_nothing(self) -> None:
        verdict = ask(self.payload, standing=Standing((10, 5), self.digest))
        assert isinstance(verdict, Unchanged)

    def test_the_same_order_with_other_content_is_a_conflict(self) -> None:
        verdict = ask(self.payload, standing=Standing((10, 5), "sha256:other"))
        assert refusal(verdict) is Reason.CONFLICT

    def test_withdrawal_keeps_the_order_but_the_same_claim_may_return(self) -> None:
        gone = Standing((10, 5), self.digest, withdrawn=True)
        assert isinstance(ask(self.payload, standing=gone), Admitted)
        older = signed(make_claim(epoch=10, revision=4), KEY)
        assert refusal(ask(older, standing=gone)) is Reason.STALE


def test_policy_holds_only_what_is_attested() -> None:
    claim = make_claim(
        policy=CapabilityPolicy(
            zones=("hall-1", "hall-2"), data=("public", "private"), grants=("actuate", "root")
        )
    )
    attested = CapabilityPolicy(
        zones=("hall-2", "hall-3"), data=("public", "internal"), grants=("actuate",), external=True
    )
    policy = attested_policy(claim.policy, Identity(KEY.public, attested))
    assert policy == CapabilityPolicy(
        zones=("hall-2",), data=("public",), grants=("actuate",), external=True
    )


@pytest.mark.parametrize("wished", [None, "acme", "bolt", "*"])
@pytest.mark.parametrize("attested", [None, "acme", "*"])
def test_nobody_chooses_its_tenant(wished: str | None, attested: str | None) -> None:
    identity = Identity(KEY.public, CapabilityPolicy(tenant=attested))
    assert attested_policy(CapabilityPolicy(tenant=wished), identity).tenant == attested
    assert attested_policy(CapabilityPolicy(tenant=wished), KEY.public).tenant is None


def test_nothing_is_attested_without_an_entry_but_data_classes() -> None:
    claim = make_claim(policy=CapabilityPolicy(zones=("hall-1",), grants=("root",)))
    policy = attested_policy(claim.policy, KEY.public)
    assert policy.zones == policy.grants == ()
    assert policy.data == claim.policy.data


class TestGivenEmbedding:
    encoder = WordEncoder()
    own = encoder.encode(["repeats what it was told"])[0]

    def check(self, claim: CapabilityClaim) -> Refused | None:
        return check_given(claim, self.own, self.encoder.space, similarity=0.95)

    def with_vector(self, packed: str, **more: Any) -> CapabilityClaim:
        return make_claim(**{"embedding": packed, "space": self.encoder.space, **more})

    def test_none_and_one_of_another_space_are_ignored(self) -> None:
        other = WordEncoder(revision="2").space
        assert self.check(make_claim()) is None
        assert self.check(self.with_vector("junk", space=other)) is None
        assert self.check(self.with_vector("junk", space=None)) is None

    def test_our_own_vector_is_fine(self) -> None:
        assert self.check(self.with_vector(pack_vector(self.own))) is None

    @pytest.mark.parametrize(
        "packed",
        [
            "junk",
            pack_vector(2 * own),
            pack_vector(own[:-1]),
            pack_vector(np.full_like(own, np.nan)),
            pack_vector(unit(own + encoder.encode(["poison"])[0])),
        ],
    )
    def test_an_unsound_or_foreign_vector_is_refused(self, packed: str) -> None:
        refused = self.check(self.with_vector(packed))
        assert refused is not None
        assert refused.reason is Reason.EMBEDDING
