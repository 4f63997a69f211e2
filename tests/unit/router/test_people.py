"""A router knows its people by the registry's word, and by nobody else's."""

import asyncio

import pytest

from broker.access.policy import Role
from broker.session.base import Message
from capability_schemas.errors import AccessDenied
from capability_schemas.passport import PassportBook
from capability_schemas.signing import SigningKey, sign
from capability_schemas.topics import TopicKind, Topics
from capability_schemas.trust import TrustState
from capability_schemas.wire import encode
from router.people import People
from support.members import passport_of

KEY = SigningKey.generate()
T = Topics()


def said(member="olga", key=KEY, topic=None, **fields):
    state = TrustState.model_validate(
        {"member": member, "state": "trusted", "at": 1_000, "registry": "registry-1", **fields}
    )
    return Message(T.build(TopicKind.TRUST, member=topic or member), encode(sign(state, key)))


def cleared(member="olga"):
    return Message(T.build(TopicKind.TRUST, member=member), b"")


@pytest.fixture
def book():
    return PassportBook(site="local", registries={"registry-1": KEY.public}, clock=lambda: 2_000)


@pytest.fixture
def people(book):
    return People(topics=T, book=book)


async def role_of(people, member):
    return (await people.requester(member)).role


async def test_the_registry_says_who_is_an_administrator(people):
    await people.hear(said("anna", role="admin"))
    await people.hear(said("olga", role="operator"))
    assert await role_of(people, "anna") is Role.ADMIN
    assert await role_of(people, "olga") is Role.OPERATOR


async def test_who_is_unknown_is_the_least_that_may_order_at_all(people):
    assert await role_of(people, "anna") is Role.OPERATOR
    await people.hear(said("anna", role="admin"))
    await people.hear(cleared("anna"))
    assert await role_of(people, "anna") is Role.OPERATOR


async def test_a_member_of_another_role_may_order_nothing(people):
    await people.hear(said("pump-7", role="device"))
    requester = await people.requester("pump-7")
    with pytest.raises(AccessDenied):
        requester.check_order("nodes", {})


async def test_nobody_else_says_it(people):
    await people.hear(said("olga", role="operator"))
    for forged in (
        said("olga", role="admin", at=5_000, key=SigningKey.generate()),
        said("olga", role="admin", at=5_000, registry="registry-2"),
        said("anna", role="admin", at=5_000, topic="olga"),
        Message(T.build(TopicKind.TRUST, member="olga"), b'{"role": "admin"}'),
        Message("foam/v1/local/trust", b"{}"),
    ):
        await people.hear(forged)
    assert await role_of(people, "olga") is Role.OPERATOR
    assert people.refused == 5


async def test_what_was_true_once_is_not_brought_back(people):
    await people.hear(said("olga", role="operator", at=2_000))
    await people.hear(said("olga", role="admin", at=1_999))
    assert await role_of(people, "olga") is Role.OPERATOR


async def test_who_was_thrown_out_orders_nothing(people, book):
    await people.hear(said("olga", role="admin", at=1_000))
    await people.hear(said("olga", state="revoked", at=1_500, void_before=1_500, reason="left us"))
    with pytest.raises(AccessDenied, match="olga was revoked: left us"):
        await people.requester("olga")
    assert people.role("olga") is None


async def test_a_revocation_counts_though_the_registrys_clock_was_set_back(people, book):
    anna = SigningKey.generate()
    book.admit(passport_of("anna", "admin", anna, now=1_500, registry_key=KEY))
    await people.hear(said("anna", role="admin", at=6_000))
    gone = said("anna", role="admin", state="revoked", at=1_600, void_before=1_600)
    await people.hear(gone)
    assert people.role("anna") is None
    with pytest.raises(AccessDenied, match="revoked"):
        book.key("anna", "admin")
    await people.hear(said("anna", role="operator", at=1_700, void_before=1_600))
    await people.hear(gone)  # again, after she has been let in anew
    await people.hear(said("anna", role="admin", at=6_000))
    assert people.role("anna") is Role.OPERATOR


async def test_the_word_is_waited_for_where_it_decides(people):
    async def say():
        await people.hear(said("somebody", role="admin"))
        await people.hear(said("anna", role="admin"))

    waiting = asyncio.ensure_future(people.requester("anna", wait_s=30))
    await asyncio.sleep(0)
    await say()
    assert (await waiting).role is Role.ADMIN
    assert (await people.requester("otto", wait_s=0.01)).role is Role.OPERATOR


async def test_without_a_registry_the_brokers_word_counts():
    people = People(topics=T, book=None)
    await people.hear(said("olga", role="operator"))
    assert await role_of(people, "olga") is Role.ADMIN


async def test_the_registry_says_whose_a_client_is(people):
    assert people.tenant("pump-7") is None
    await people.hear(said("pump-7", role="device", tenant="acme"))
    assert people.tenant("pump-7") == "acme"
    await people.hear(said("pump-7", role="device", tenant="bolt", at=999))
    await people.hear(said("pump-7", tenant="bolt", at=9_000, key=SigningKey.generate()))
    assert people.tenant("pump-7") == "acme"


async def test_the_registry_of_the_later_term_counts_whatever_the_clocks_say(people, book):
    second = SigningKey.generate()
    book.believe({"registry-2": second.public})
    await people.hear(said("anna", role="operator", at=9_000, term=4))
    await people.hear(
        said("anna", role="admin", at=1_000, term=5, registry="registry-2", key=second)
    )
    assert people.role("anna") is Role.ADMIN
    await people.hear(said("anna", role="operator", at=10_000, term=4))  # it was replaced
    assert people.role("anna") is Role.ADMIN
    await people.hear(said("anna", role="operator", at=11_000))  # of a version without terms
    assert people.role("anna") is Role.ADMIN
