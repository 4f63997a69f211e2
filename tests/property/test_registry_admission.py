"""Whatever order claims arrive in, the newest one stands; whatever bytes arrive, nothing raises."""

from hypothesis import given, settings
from hypothesis import strategies as st

from capability_schemas.signing import SigningKey
from registry.admission import Admitted, Reason, Refused, Standing, Unchanged, judge
from support.capabilities import make_claim, signed

KEY = SigningKey.generate()
ORDERS = st.tuples(st.integers(0, 3), st.integers(0, 3))


@settings(max_examples=60, deadline=None)
@given(st.lists(ORDERS, min_size=1, max_size=12))
def test_the_newest_order_wins_in_any_sequence(orders: list[tuple[int, int]]) -> None:
    standing: Standing | None = None
    for epoch, revision in orders:
        payload = signed(make_claim(epoch=epoch, revision=revision), KEY)
        verdict = judge(
            payload,
            key=("edge-1", "echo"),
            standing=standing,
            identity=KEY.public,
            now=1,
            limit_bytes=10_000,
        )
        if standing is None or (epoch, revision) > standing.order:
            assert isinstance(verdict, Admitted)
            standing = Standing(verdict.claim.order, verdict.digest)
        elif (epoch, revision) == standing.order:
            assert isinstance(verdict, Unchanged)
        else:
            assert isinstance(verdict, Refused)
            assert verdict.reason is Reason.STALE
    assert standing is not None
    assert standing.order == max(orders)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_refused_not_raised(payload: bytes) -> None:
    verdict = judge(
        payload,
        key=("edge-1", "echo"),
        standing=None,
        identity=KEY.public,
        now=1,
        limit_bytes=256,
    )
    assert isinstance(verdict, Refused)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_claim_with_one_byte_changed_is_never_admitted(data: st.DataObject) -> None:
    payload = bytearray(signed(make_claim(), KEY))
    at = data.draw(st.integers(0, len(payload) - 1))
    payload[at] ^= data.draw(st.integers(1, 255))
    verdict = judge(
        bytes(payload),
        key=("edge-1", "echo"),
        standing=None,
        identity=KEY.public,
        now=1,
        limit_bytes=10_000,
    )
    assert isinstance(verdict, Refused)
