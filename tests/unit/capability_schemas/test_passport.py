"""Passports: what a receiver believes about whose key a key is."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capability_schemas.capability import CapabilityPolicy
from capability_schemas.errors import AccessDenied, BadSignature, FoamError
from capability_schemas.passport import CLOCK_SKEW_MS, Passport, PassportBook, issue
from capability_schemas.signing import SigningKey, sign
from capability_schemas.wire import WireModel, encode

NOW = 1_790_000_000_000
REGISTRY = SigningKey.generate()
ROUTER = SigningKey.generate()


class Clock:
    def __init__(self):
        self.now = NOW

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def book(clock):
    return PassportBook(site="hall-3", registries={"registry-1": REGISTRY.public}, clock=clock)


def passport(key=REGISTRY, **changes):
    fields: dict[str, Any] = {
        "identity": "router-1",
        "role": "router",
        "site": "hall-3",
        "public_key": ROUTER.public,
        "issued_at": NOW - 1000,
        "expires_at": NOW + 1000,
        "registry": "registry-1",
    }
    return issue(Passport(**fields | changes), key)


class Order(WireModel):
    verb: str
    signature: str | None = None


def test_who_shows_a_passport_can_prove_what_it_sends(book):
    book.admit(passport())
    signed = sign(Order(verb="drain"), ROUTER)
    book.verify(encode(signed), "router-1", "router", "registry")
    with pytest.raises(BadSignature):
        book.verify(encode(signed.model_copy(update={"verb": "stop"})), "router-1", "router")
    with pytest.raises(BadSignature, match="not signed"):
        book.verify(encode(Order(verb="drain")), "router-1", "router")


def test_the_role_counts(book):
    book.admit(passport(identity="pump-7", role="node"))
    with pytest.raises(AccessDenied, match="a node, not a router or registry"):
        book.verify(encode(sign(Order(verb="drain"), ROUTER)), "pump-7", "router", "registry")


def test_without_a_passport_nobody_is_believed(book):
    with pytest.raises(AccessDenied, match="no passport"):
        book.key("router-1", "router")


def test_the_registry_needs_none(book):
    signed = sign(Order(verb="drain"), REGISTRY)
    book.verify(encode(signed), "registry-1", "registry")
    with pytest.raises(AccessDenied):
        book.key("registry-1", "router")


@pytest.mark.parametrize(
    ("changes", "error", "complaint"),
    [
        ({"site": "hall-4"}, AccessDenied, "site hall-4"),
        ({"registry": "registry-9"}, AccessDenied, "no registry here"),
        ({"expires_at": NOW - CLOCK_SKEW_MS - 1}, AccessDenied, "ran out"),
        ({"issued_at": NOW + CLOCK_SKEW_MS + 1}, AccessDenied, "valid only in"),
        ({"key": ROUTER}, BadSignature, "not signed by registry"),
    ],
)
def test_what_is_no_passport_of_this_site_is_refused(book, changes, error, complaint):
    with pytest.raises(error, match=complaint):
        book.admit(passport(**changes))
    assert book.passport("router-1") is None


def test_clocks_may_differ_by_some_minutes(book):
    book.admit(passport(expires_at=NOW - CLOCK_SKEW_MS))
    book.admit(passport(issued_at=NOW + CLOCK_SKEW_MS, expires_at=NOW + 2 * CLOCK_SKEW_MS))
    assert book.key("router-1", "router") == ROUTER.public


def test_it_runs_out_while_it_is_known(book, clock):
    book.admit(passport())
    clock.now = NOW + 1000 + CLOCK_SKEW_MS + 1
    with pytest.raises(AccessDenied, match="ran out"):
        book.key("router-1", "router")


def test_of_two_the_later_one_stays(book):
    other = SigningKey.generate()
    newer = passport(public_key=other.public, issued_at=NOW)
    book.admit(newer)
    with pytest.raises(AccessDenied, match="older"):
        book.admit(passport())
    assert book.key("router-1", "router") == other.public


def test_revocation_ends_old_passports_and_not_new_ones(book):
    book.admit(passport())
    book.revoke("router-1", before=NOW)
    with pytest.raises(AccessDenied, match="was revoked"):
        book.key("router-1", "router")
    with pytest.raises(AccessDenied, match="revoked"):
        book.admit(passport())
    book.admit(passport(issued_at=NOW))
    assert book.key("router-1", "router") == ROUTER.public
    book.revoke("router-1", before=NOW - 5)  # an earlier revocation, told late
    assert book.passport("router-1") is not None


def test_the_book_is_bounded(book, monkeypatch):
    monkeypatch.setattr("capability_schemas.passport._KEPT", 3)
    for number in range(5):
        book.admit(passport(identity=f"node-{number}", role="node"))
    assert [book.passport(f"node-{number}") is not None for number in range(5)] == [
        False,
        False,
        True,
        True,
        True,
    ]


FIELDS = {
    "identity": st.just("router-2"),
    "role": st.sampled_from(["admin", "registry"]),
    "public_key": st.just(SigningKey.generate().public),
    "attested": st.just(CapabilityPolicy(zones=("vault",), grants=("root",))),
    "issued_at": st.integers(NOW - 500, NOW),
    "expires_at": st.integers(NOW + 1001, NOW + 10**9),
}


@given(st.sampled_from(sorted(FIELDS)).flatmap(lambda name: st.tuples(st.just(name), FIELDS[name])))
def test_no_field_can_be_changed_by_its_owner(change):
    book = PassportBook(
        site="hall-3", registries={"registry-1": REGISTRY.public}, clock=lambda: NOW
    )
    name, value = change
    with pytest.raises(FoamError):
        book.admit(passport().model_copy(update={name: value}))
    assert book.passport("router-1") is None


SECOND = SigningKey.generate()


def second(key=REGISTRY, **changes):
    """The passport of a registry that nobody's papers name."""
    given = {"identity": "registry-2", "role": "registry", "public_key": SECOND.public}
    return passport(key, **given | changes)


def test_a_registry_is_believed_that_a_root_vouches_for(book, clock):
    with pytest.raises(AccessDenied, match="no registry here"):
        book.admit(passport(SECOND, registry="registry-2"))
    book.admit(second())
    assert book.registries == {"registry-1": REGISTRY.public, "registry-2": SECOND.public}
    book.admit(passport(SECOND, registry="registry-2"))
    book.verify(encode(sign(Order(verb="drain"), ROUTER)), "router-1", "router")
    book.verify(encode(sign(Order(verb="drain"), SECOND)), "registry-2", "registry")
    clock.now += CLOCK_SKEW_MS + 2_000
    assert "registry-2" not in book.registries  # its passport has run out


def test_a_registry_does_not_make_registries_unless_it_is_a_root(book):
    book.admit(second())
    third = SigningKey.generate()
    with pytest.raises(AccessDenied, match="no registry here"):
        book.admit(
            second(SECOND, identity="registry-3", public_key=third.public, registry="registry-2")
        )
    with pytest.raises(AccessDenied, match="no registry here"):
        book.admit(second(SECOND, registry="registry-2"))


def test_a_router_is_no_registry_by_its_passport(book):
    book.admit(passport())
    assert set(book.registries) == {"registry-1"}


def test_a_revoked_registry_is_believed_no_more(book):
    book.admit(second())
    book.revoke("registry-2", before=NOW)
    assert set(book.registries) == {"registry-1"}
    with pytest.raises(AccessDenied, match="revoked"):
        book.admit(second())
    book.admit(second(issued_at=NOW + 1))  # it was let in anew
    assert "registry-2" in book.registries


def test_a_revoked_root_is_believed_no_more_until_papers_name_another_key(book):
    book.believe({"registry-2": SECOND.public})
    book.revoke("registry-1", before=NOW)
    assert book.registries == {"registry-2": SECOND.public}
    with pytest.raises(AccessDenied, match="no registry here"):
        book.admit(passport())
    book.believe({"registry-1": REGISTRY.public})
    assert "registry-1" not in book.registries
    again = SigningKey.generate()
    book.believe({"registry-1": again.public})
    assert book.registries["registry-1"] == again.public
