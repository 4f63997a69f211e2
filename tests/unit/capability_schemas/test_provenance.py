"""Orders that are believed, and every way in which one is not."""

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capability_schemas.admin import AdminRequest, decode_admin_request
from capability_schemas.errors import (
    AccessDenied,
    BadSignature,
    ConfigurationError,
    FoamError,
    MalformedPayload,
    Repeated,
)
from capability_schemas.invocation import Control, Invocation
from capability_schemas.node import NodeState
from capability_schemas.passport import CLOCK_SKEW_MS
from capability_schemas.provenance import (
    ADMIN_ROLES,
    ORDER_ROLES,
    AdminCheck,
    Provenance,
    ReplayWindow,
    Signer,
    check_result,
    sign_result,
)
from capability_schemas.reply import Result
from capability_schemas.signing import SigningKey, canonical_bytes, digest, sign, verify
from capability_schemas.task import Task
from capability_schemas.wire import decode, encode, parse_json
from support.members import DAY_MS, REGISTRY_KEY, make_book, make_signer, passport_of

NOW = 1_790_000_000_000
ROUTER = make_signer("router-1", "router", now=NOW)
ADMIN = make_signer("admin-1", "admin", now=NOW)
NODE = make_signer("edge-1", "node", now=NOW)


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
    book = make_book(clock)
    book.admit(ROUTER.passport)
    return book


@pytest.fixture
def provenance(book, clock):
    return Provenance(own="edge-1", book=book, clock=clock)


def invocation(**fields):
    return Invocation.model_validate(
        {
            "task": "t1", "client": "pump-7", "router": "router-1", "node": "edge-1", "epoch": 7,
            "function": "add", "version": "1.0.0", "deadline": NOW + 1, "text": "\u2028\U0001f600",
            "input": {"a": 1.5, "b": [None, 2**60, "x"], "ä": {}},
            "reply": "foam/v1/local/reply/pump-7/t1", "sent_at": NOW, **fields,
        }
    )  # fmt: skip


def check(provenance, payload):
    order = decode(Invocation, payload)
    return provenance.check(
        payload,
        sender=order.router,
        roles=ORDER_ROLES,
        target=order.node,
        sent_at=order.sent_at,
        nonce=(order.client, order.task, order.attempt, order.sent_at),
    )


def test_what_the_router_signed_is_believed_once(provenance):
    payload = encode(ROUTER.sign(invocation()))
    assert check(provenance, payload) is True
    assert check(provenance, payload) is False
    assert check(provenance, encode(ROUTER.sign(invocation(attempt=2)))) is True


@pytest.mark.parametrize(
    ("message", "error", "words"),
    [
        (invocation(), BadSignature, "not signed"),
        (sign(invocation(), SigningKey.generate()), BadSignature, "does not fit"),
        (ROUTER.sign(invocation(node="edge-2")), AccessDenied, "for edge-2, not for edge-1"),
        (ROUTER.sign(invocation(node=None)), AccessDenied, "nobody in particular"),
        (
            ROUTER.sign(invocation(router="router-2")),
            AccessDenied,
            "router-2 has shown no passport",
        ),
        (
            ROUTER.sign(invocation(sent_at=NOW - CLOCK_SKEW_MS - 1000)),
            AccessDenied,
            "301 s behind ours",
        ),
        (
            ROUTER.sign(invocation(sent_at=NOW + CLOCK_SKEW_MS + 1000)),
            AccessDenied,
            "301 s ahead of ours",
        ),
    ],
)
def test_refusals(provenance, message, error, words):
    with pytest.raises(error, match=words):
        check(provenance, encode(message))


def test_clocks_may_differ_by_five_minutes(provenance):
    for skew in (-CLOCK_SKEW_MS, CLOCK_SKEW_MS):
        assert check(provenance, encode(ROUTER.sign(invocation(sent_at=NOW + skew))))


def test_one_from_the_future_is_remembered_as_long_as_it_counts(provenance, clock):
    payload = encode(ROUTER.sign(invocation(sent_at=NOW + CLOCK_SKEW_MS)))
    assert check(provenance, payload)
    clock.now += 2 * CLOCK_SKEW_MS - 1
    assert check(provenance, payload) is False
    clock.now += 3
    with pytest.raises(AccessDenied, match="behind ours"):
        check(provenance, payload)


@pytest.mark.parametrize("role", ["node", "admin", "device"])
def test_only_routers_and_registries_order(book, provenance, role):
    other = make_signer("mallory", role, now=NOW)
    book.admit(other.passport)
    with pytest.raises(AccessDenied, match=f"mallory is a {role}, not a router or registry"):
        check(provenance, encode(other.sign(invocation(router="mallory"))))


def test_the_registry_orders_with_its_own_key(provenance):
    order = sign(invocation(router="registry-1"), REGISTRY_KEY)
    assert check(provenance, encode(order))


def test_a_passport_that_ran_out_or_was_revoked(book, provenance, clock):
    clock.now += 30 * DAY_MS + CLOCK_SKEW_MS + 1
    with pytest.raises(AccessDenied, match="ran out"):
        check(provenance, encode(ROUTER.sign(invocation(sent_at=clock.now))))
    clock.now = NOW
    book.revoke("router-1", before=NOW)
    with pytest.raises(AccessDenied, match="revoked"):
        check(provenance, encode(ROUTER.sign(invocation())))


def test_a_renewed_passport_takes_over_and_an_older_key_cannot_come_back(book, provenance):
    newer = passport_of("router-1", "router", ROUTER.key, now=NOW, issued_at=NOW)
    book.admit(newer)
    assert check(provenance, encode(ROUTER.sign(invocation())))
    book.admit(ROUTER.passport)  # of the same key, kept by somebody in another place
    assert book.passport("router-1") == newer
    with pytest.raises(AccessDenied, match="older"):
        book.admit(make_signer("router-1", "router", now=NOW).passport)


@given(st.data())
def test_no_change_of_content_passes(data):
    """Flip any byte: what still passes says the same, key by key."""
    payload = encode(ROUTER.sign(invocation()))
    at = data.draw(st.integers(0, len(payload) - 1))
    bent = bytearray(payload)
    bent[at] ^= 1 << data.draw(st.integers(0, 7))
    book = make_book(lambda: NOW)
    book.admit(ROUTER.passport)
    try:
        check(Provenance(own="edge-1", book=book, clock=lambda: NOW), bytes(bent))
    except FoamError:
        return
    assert canonical_bytes(parse_json(bytes(bent))) == canonical_bytes(parse_json(payload))


@given(
    st.sampled_from(["function", "text", "input", "client", "node", "sent_at", "reply", "new"]),
    st.one_of(st.none(), st.integers(), st.text(), st.lists(st.integers(), max_size=2)),
    st.booleans(),
)
def test_a_name_that_stands_twice_deceives_nobody(name, value, first):
    """The reader that checks and the one that obeys take the same one of two."""
    payload = encode(ROUTER.sign(invocation())).decode()
    extra = f"{json.dumps(name)}:{json.dumps(value)}"
    bent = f"{{{extra},{payload[1:]}" if first else f"{payload[:-1]},{extra}}}"
    book = make_book(lambda: NOW)
    book.admit(ROUTER.passport)
    try:
        check(Provenance(own="edge-1", book=book, clock=lambda: NOW), bent.encode())
    except FoamError:
        return
    assert decode(Invocation, bent.encode()) == decode(Invocation, payload.encode())


def test_signed_messages_of_one_kind_are_none_of_another():
    key = SigningKey.generate()
    result = Result(
        task="t1", at=NOW, seq=0, output=1, node="edge-1", function="add", version="1.0.0",
        digest=digest(1),
    )  # fmt: skip
    messages = [
        sign(invocation(), key),
        sign(Control(verb="drain", sender="r", node="edge-1", sent_at=NOW, nonce="n"), key),
        sign(AdminRequest(id="a1", verb="nodes", sender="a", target="r", sent_at=NOW), key),
        sign(NodeState(node="n", state="birth", epoch=1, at=1), key),
    ]
    for message, other in itertools.permutations(messages, 2):
        with pytest.raises(MalformedPayload):
            decode(type(other), encode(message))
    signed = sign_result(result, client="c", signer=NODE, show_passport=False)
    claims = {"signature": signed.signature} | json.loads(
        canonical_bytes({"kind": "result", "client": "c", "task": "t1"})
    )
    for message in messages:
        with pytest.raises(MalformedPayload):
            decode(type(message), json.dumps(claims).encode())


# ---- memory of what was sent


def test_a_full_window_refuses_what_it_can_no_longer_know(clock):
    window = ReplayWindow(clock=clock, limit=3)
    for number in range(5):
        assert window.take(number, NOW + number)
    assert len(window) == 3
    with pytest.raises(AccessDenied, match="longer than its receiver can remember"):
        window.take(1, NOW + 1)
    assert window.take(4, NOW + 4) is False
    assert window.take("late", NOW + 2)


def test_what_was_forgotten_for_its_age_is_not_new_when_the_clock_is_set_back(clock):
    window = ReplayWindow(clock=clock)
    assert window.take("a", NOW)
    clock.now += 2 * CLOCK_SKEW_MS
    assert window.take("b", clock.now)
    clock.now = NOW
    with pytest.raises(AccessDenied, match="longer than its receiver can remember"):
        window.take("a", NOW)
    assert window.take("c", NOW + 1)


def test_a_sender_that_was_forgotten_cannot_repeat_when_the_clock_is_set_back(
    book, clock, monkeypatch
):
    monkeypatch.setattr("capability_schemas.provenance._SENDER_LIMIT", 1)
    provenance = Provenance(own="edge-1", book=book, clock=clock)
    other = make_signer("router-2", "router", now=NOW)
    book.admit(other.passport)
    recorded = encode(ROUTER.sign(invocation()))
    assert check(provenance, recorded)
    clock.now += CLOCK_SKEW_MS + 1
    assert check(provenance, encode(other.sign(invocation(router="router-2", sent_at=clock.now))))
    clock.now += CLOCK_SKEW_MS + 1
    provenance._forget_idle()
    clock.now = NOW
    with pytest.raises(AccessDenied, match="before its receiver started"):
        check(provenance, recorded)


def test_nothing_counts_from_before_the_start(clock):
    window = ReplayWindow(clock=clock, since=NOW)
    with pytest.raises(AccessDenied, match="before its receiver started"):
        window.take("a", NOW - 1)
    assert window.take("b", NOW)


def test_senders_are_kept_apart_and_bounded(book, clock, monkeypatch):
    monkeypatch.setattr("capability_schemas.provenance._SENDER_LIMIT", 2)
    provenance = Provenance(own="edge-1", book=book, clock=clock)
    others = [make_signer(f"router-{n}", "router", now=NOW) for n in range(2, 5)]
    for other in others:
        book.admit(other.passport)
    for other in others[:2]:
        assert check(provenance, encode(other.sign(invocation(router=other.identity))))
    last = others[2]
    with pytest.raises(AccessDenied, match="2 senders are busy"):
        check(provenance, encode(last.sign(invocation(router=last.identity))))
    clock.now += CLOCK_SKEW_MS + 1
    order = last.sign(invocation(router=last.identity, sent_at=clock.now))
    assert check(provenance, encode(order))


# ---- administrators


def request(signer=ADMIN, **fields):
    made = AdminRequest.model_validate(
        {
            "id": "q1", "verb": "drain", "args": {"node": "edge-1"}, "sender": "admin-1",
            "target": "router-1", "sent_at": NOW, "passport": signer.passport, **fields,
        }
    )  # fmt: skip
    return encode(signer.sign(made))


@pytest.fixture
def admin_check(book, clock):
    return AdminCheck(
        target="router-1",
        provenance=Provenance(own="router-1", book=book, clock=clock, since=NOW - 10),
        unsigned=False,
    )


def ask(admin_check, payload, client="admin-1"):
    return admin_check.verify(client, payload, decode_admin_request(payload))


def test_an_administrator_is_known_by_its_passport(admin_check):
    assert ask(admin_check, request()) == ADMIN.passport
    operator = make_signer("ann", "operator", now=NOW)
    assert ask(admin_check, request(operator, sender="ann"), "ann").role == "operator"


@pytest.mark.parametrize(
    ("payload", "client", "words"),
    [
        (b'{"id":"q1","verb":"drain","args":{}}', "admin-1", "takes signed requests only"),
        (request(target="router-2"), "admin-1", "is for router-2, not for router-1"),
        (request(), "mallory", "not meant to be published as mallory"),
        (request(sender="admin-2"), "admin-2", "shows no passport of its sender"),
        (request(passport=None), "admin-1", "shows no passport"),
        (request(sent_at=NOW - 11), "admin-1", "before its receiver started"),
        (request(sent_at=None), "admin-1", "names no sent_at"),
        (request(ROUTER, sender="router-1"), "router-1", "is a router, not a admin or operator"),
        (
            request().replace(b'"drain"', b'"undrain"'),
            "admin-1",
            "request of admin-1: signature does not fit",
        ),
        (
            request(passport=passport_of(
                "admin-1", "admin", ADMIN.key, now=NOW, registry_key=SigningKey.generate()
            )),
            "admin-1",
            "not signed by registry registry-1",
        ),
    ],
)  # fmt: skip
def test_requests_that_are_refused(admin_check, payload, client, words):
    with pytest.raises(AccessDenied, match=words) as caught:
        ask(admin_check, payload, client)
    assert not isinstance(caught.value, Repeated)


def test_a_request_counts_once(admin_check):
    ask(admin_check, request())
    with pytest.raises(Repeated):
        ask(admin_check, request())


def test_another_name_at_the_broker_has_to_be_signed_for(admin_check):
    assert ask(admin_check, request(client="guest"), "guest") == ADMIN.passport


def test_where_the_broker_is_trusted_the_unsigned_pass_and_the_signed_are_checked(book, clock):
    lenient = AdminCheck(
        target="router-1",
        provenance=Provenance(own="router-1", book=book, clock=clock),
        unsigned=True,
    )
    plain = b'{"id":"q1","verb":"drain","args":{}}'
    assert ask(lenient, plain) is None
    with pytest.raises(AccessDenied, match="router-2"):
        ask(lenient, request(target="router-2"))
    blind = AdminCheck(target="router-1", provenance=None, unsigned=True)
    assert ask(blind, request()) is None
    strict = AdminCheck(target="router-1", provenance=None, unsigned=False)
    with pytest.raises(AccessDenied, match="knows no registry"):
        ask(strict, request())


# ---- results


def result(**fields):
    made = Result.model_validate(
        {
            "task": "t1", "at": NOW, "seq": 3, "output": {"litres": 1.5}, "node": "edge-1",
            "function": "tank", "version": "1.0.0", "digest": digest({"litres": 1.5}), **fields,
        }
    )  # fmt: skip
    return sign_result(made, client="pump-7", signer=NODE, show_passport=True)


def test_a_result_proves_who_answered_what(clock):
    proven = decode(Result, encode(result()))
    assert check_result(proven, client="pump-7", book=make_book(clock)) == NODE.passport
    book = make_book(clock)
    book.admit(NODE.passport)
    bare = proven.model_copy(update={"passport": None})
    assert check_result(bare, client="pump-7", book=book) == NODE.passport
    with pytest.raises(AccessDenied, match="no passport"):
        check_result(bare, client="pump-7", book=make_book(clock))


@pytest.mark.parametrize(
    "change",
    [
        {"output": {"litres": 2.5}},
        {"output": {"litres": 2.5}, "digest": digest({"litres": 2.5})},
        {"task": "t2"},
        {"function": "other"},
        {"version": "2.0.0"},
        {"node": "edge-2"},
        {"signature": None},
        {"passport": make_signer("edge-2", "node", now=NOW).passport, "node": "edge-2"},
    ],
)
def test_a_result_that_was_changed_proves_nothing(clock, change):
    changed = result().model_copy(update=change)
    with pytest.raises(BadSignature):
        check_result(changed, client="pump-7", book=make_book(clock))


@pytest.mark.parametrize("number", [b"NaN", b"-Infinity", b"1e999"])
def test_an_output_that_is_no_json_is_refused_as_such(clock, number):
    payload = encode(result()).replace(b'{"litres":1.5}', b'{"litres":%s}' % number)
    with pytest.raises(MalformedPayload, match="no canonical form"):
        check_result(decode(Result, payload), client="pump-7", book=make_book(clock))


def test_a_result_of_another_client_or_of_a_router(clock):
    with pytest.raises(BadSignature):
        check_result(result(), client="pump-8", book=make_book(clock))
    made = Result(task="t1", at=NOW, seq=0, output=1, node="router-1", digest=digest(1))
    forged = sign_result(made, client="pump-7", signer=ROUTER, show_passport=True)
    with pytest.raises(AccessDenied, match="is a router, not a node"):
        check_result(forged, client="pump-7", book=make_book(clock))


# ---- signing


def test_a_signer_holds_a_passport_of_its_own():
    with pytest.raises(ConfigurationError, match="another key"):
        Signer(identity="router-1", key=SigningKey.generate(), passport=ROUTER.passport)
    with pytest.raises(ConfigurationError):
        Signer(identity="router-2", key=ROUTER.key, passport=ROUTER.passport)


def test_what_has_no_canonical_form_is_not_signed():
    with pytest.raises(MalformedPayload, match="cannot be signed"):
        ROUTER.sign(invocation(input="\ud800"))


def test_every_task_that_is_taken_can_be_signed():
    """Numbers too large for a double, deep nesting and odd text come through intact."""
    odd: list[Any] = [2**63, -(2**70), 1e300, "\u0000\uffff", [[[]]], {"": None, "\U0001f600": 1}]
    for value in odd:
        task = Task.model_validate({"text": "x", "input": value})
        payload = encode(ROUTER.sign(invocation(input=task.input)))
        verify(payload, ROUTER.key.public)


def test_roles():
    assert set(ADMIN_ROLES).isdisjoint(ORDER_ROLES)
