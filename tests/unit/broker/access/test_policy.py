"""The access table: what each role may, and when one filter covers another."""

import itertools

import pytest

from broker.access.policy import AccessPolicy, Action, Role, covers, grants
from capability_schemas.errors import ProtocolError
from capability_schemas.topics import TopicKind, Topics, matches

T = Topics(site="hall-3", prefix="plant/v1")
POLICY = AccessPolicy(T)


@pytest.mark.parametrize(
    ("granted", "requested", "covered"),
    [
        ("a/b", "a/b", True),
        ("a/b", "a/c", False),
        ("a/b", "a/+", False),
        ("a/+", "a/b", True),
        ("a/+", "a/+", True),
        ("a/+", "a/#", False),
        ("a/+", "a", False),
        ("a/+", "a/b/c", False),
        ("a/#", "a/#", True),
        ("a/#", "a", True),
        ("a/#", "a/b/+/c/#", True),
        ("a/#", "#", False),
        ("a/#", "+/#", False),
        ("a/+/c", "a/#", False),
        ("a/+/c", "a/b/c", True),
        ("a/+/c", "+/b/c", False),
        ("#", "a/b", True),
        ("#", "$SYS/x", False),
        ("+/x", "$SYS/x", False),
        ("a/b", "a/b/#", False),
        ("a/#", "a/#/b", False),
        ("a/#", "a/b+", False),
        ("a/#", "a/b#", False),
        ("a/#", "$share/g/a/b", False),
        ("a/+", "a/", True),
    ],
)
def test_covers(granted, requested, covered):
    assert covers(granted, requested) is covered


def test_covers_agrees_with_matching_every_topic():
    """Covered means: it matches no topic that the wider filter does not."""
    levels = ("a", "b", "+", "#")
    topics = ["/".join(p) for n in (1, 2, 3, 4) for p in itertools.product("abc", repeat=n)]
    filters = [
        "/".join(parts)
        for n in (1, 2, 3)
        for parts in itertools.product(levels, repeat=n)
        if "#" not in parts[:-1]
    ]
    filters.sort(key="#".__eq__)  # "+/#" and "#" match the same topics; only "#" covers "#"
    reach = {f: {topic for topic in topics if matches(f, topic)} for f in filters}
    for granted, requested in itertools.product(filters, filters[:-1]):
        assert covers(granted, requested) is (reach[requested] <= reach[granted]), (
            granted,
            requested,
        )


DIRECT = ("direct/n/x", "direct/n/x/cancel", "direct/n/x/resume")
CLIENT = ("task/x", "task/x/cancel", "task/x/resume", *DIRECT)
PUBLISHED = {
    Role.DEVICE: CLIENT,
    Role.NODE: (
        "task/x",
        "task/x/cancel",
        "task/x/resume",
        "capability/x/f",
        "node/x/state",
        "node/x/load",
        "report/router-1/x",
        "reply/c/t/x",
        "event/x/k",
        "enroll/x",
        "evidence/x",
    ),
    Role.ROUTER: (
        "invoke/n",
        "control/n",
        "reply/c/t/x",
        "router/x/state",
        "event/x/k",
        "enroll/x",
    ),
    Role.REGISTRY: (
        "catalog/n/f",
        "control/n",
        "enroll/r/reply",
        "artifact/n/d",
        "reply/c/t/x",
        "event/x/k",
        "trust/m",
    ),
    Role.ADMIN: (*CLIENT, "admin/router-1/x", "enroll/x"),
    Role.OPERATOR: (*CLIENT, "admin/router-1/x", "enroll/x"),
    Role.OBSERVER: (),
    Role.ENROLLEE: ("enroll/x",),
}
SUBSCRIBED = {
    Role.DEVICE: (
        "reply/x/#",
        "reply/x/+/+",
        "reply/x/t/n",
        "catalog/+/+",
        "node/+/state",
        "node/+/load",
        "router/+/state",
    ),
    Role.NODE: (
        "reply/x/#",
        "direct/x/#",
        "direct/x/+",
        "direct/x/+/cancel",
        "invoke/x",
        "control/x",
        "artifact/x/+",
        "router/+/state",
        "enroll/x/reply",
    ),
    Role.ROUTER: (
        "task/#",
        "task/+/cancel",
        "catalog/#",
        "node/+/state",
        "node/+/load",
        "report/x/+",
        "reply/#",
        "admin/x/+",
        "router/+/state",
        "trust/+",
        "enroll/x/reply",
    ),
    Role.REGISTRY: (
        "capability/#",
        "catalog/#",
        "node/+/state",
        "admin/x/+",
        "enroll/+",
        "router/+/state",
        "event/+/audit",
        "trust/+",
        "evidence/+",
    ),
    Role.ADMIN: (
        "reply/x/#",
        "catalog/#",
        "capability/#",
        "node/#",
        "router/#",
        "event/#",
        "report/#",
    ),
    Role.OPERATOR: (
        "reply/x/#",
        "catalog/#",
        "node/#",
        "router/#",
        "event/#",
        "trust/+",
        "enroll/x/reply",
    ),
    Role.OBSERVER: ("catalog/#", "node/#", "router/#", "event/#", "trust/+"),
    Role.ENROLLEE: ("enroll/x/reply",),
}
EVERY_TOPIC = sorted({t for topics in PUBLISHED.values() for t in topics})
EVERY_FILTER = sorted({f for filters in SUBSCRIBED.values() for f in filters})


@pytest.mark.parametrize("role", Role)
def test_a_role_publishes_its_own_topics_and_no_others(role):
    allowed = {
        topic
        for topic in EVERY_TOPIC
        if POLICY.allows(role, "x", Action.PUBLISH, f"{T.root}/{topic}")
    }
    assert allowed == set(PUBLISHED[role])


@pytest.mark.parametrize("role", Role)
def test_a_role_subscribes_to_its_own_filters(role):
    for wanted in SUBSCRIBED[role]:
        assert POLICY.allows(role, "x", Action.SUBSCRIBE, f"{T.root}/{wanted}"), wanted


@pytest.mark.parametrize("role", Role)
def test_nobody_speaks_for_another_identity(role):
    for topic in PUBLISHED[role]:
        if "x" in topic.split("/"):
            other = f"{T.root}/" + "/".join("y" if p == "x" else p for p in topic.split("/"))
            assert not POLICY.allows(role, "x", Action.PUBLISH, other), other


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("wide", ["#", "+/#", "plant/v1/#", "plant/v1/hall-3/#", "$SYS/#"])
def test_nobody_subscribes_to_everything(role, wide):
    assert not POLICY.allows(role, "x", Action.SUBSCRIBE, wide)


@pytest.mark.parametrize("role", Role)
def test_another_site_is_out_of_reach(role):
    for topic in PUBLISHED[role]:
        assert not POLICY.allows(role, "x", Action.PUBLISH, f"plant/v1/hall-4/{topic}")
    for wanted in SUBSCRIBED[role]:
        assert not POLICY.allows(role, "x", Action.SUBSCRIBE, f"plant/v1/hall-4/{wanted}")


def test_what_may_be_subscribed_may_be_received():
    mine = T.build(TopicKind.REPLY, client="x", task="t", source="n")
    theirs = T.build(TopicKind.REPLY, client="y", task="t", source="n")
    assert POLICY.allows(Role.DEVICE, "x", Action.RECEIVE, mine)
    assert not POLICY.allows(Role.DEVICE, "x", Action.RECEIVE, theirs)


@pytest.mark.parametrize("identity", ["+", "#", "a/b", "", "x" * 65, "a b"])
def test_an_identity_that_is_no_level_holds_nothing(identity):
    with pytest.raises(ProtocolError):
        POLICY.allows(Role.DEVICE, identity, Action.PUBLISH, f"{T.root}/task/x")


def test_every_topic_of_the_grammar_but_stage_has_a_publisher():
    granted = {g.kind for role in Role for g in grants(role) if g.action is Action.PUBLISH}
    assert set(TopicKind) - granted == {TopicKind.STAGE}  # no role speaks it yet


def test_components_are_bound_to_one_client_id():
    assert {role for role in Role if role.binds_client_id} == {
        Role.NODE,
        Role.ROUTER,
        Role.REGISTRY,
    }


def test_a_node_of_a_tenant_hears_nothing_of_what_others_offer():
    load = f"{T.root}/node/other/load"
    assert POLICY.allows(Role.NODE, "x", Action.SUBSCRIBE, load)
    assert not POLICY.allows(Role.NODE, "x", Action.SUBSCRIBE, load, apart=True)
    assert not POLICY.allows(Role.NODE, "x", Action.RECEIVE, load, apart=True)
    for kind in ("capability/other/f", "catalog/other/f", "invoke/other", "node/other/state"):
        for apart in (False, True):
            topic = f"{T.root}/{kind}"
            assert not POLICY.allows(Role.NODE, "x", Action.RECEIVE, topic, apart=apart), kind
    assert all(
        POLICY.allows(Role.NODE, "x", Action.PUBLISH, f"{T.root}/{topic}", apart=True)
        for topic in PUBLISHED[Role.NODE]
    )


def test_a_client_of_a_tenant_gets_past_no_router():
    offers = ("catalog/+/+", "node/+/state", "node/+/load")
    for wanted in offers:
        topic = f"{T.root}/{wanted}"
        assert POLICY.allows(Role.DEVICE, "x", Action.SUBSCRIBE, topic)
        assert not POLICY.allows(Role.DEVICE, "x", Action.SUBSCRIBE, topic, apart=True), wanted
    for topic in DIRECT:
        named = f"{T.root}/{topic}"
        assert not POLICY.allows(Role.DEVICE, "x", Action.PUBLISH, named, apart=True), topic
    assert POLICY.allows(Role.DEVICE, "x", Action.PUBLISH, f"{T.root}/task/x", apart=True)


def test_what_is_said_to_one_node_directly_no_other_hears():
    theirs = T.build(TopicKind.DIRECT, node="y", client="pump-7")
    assert not POLICY.allows(Role.NODE, "x", Action.RECEIVE, theirs)
    assert not POLICY.allows(Role.ROUTER, "x", Action.RECEIVE, theirs)
    assert not POLICY.allows(Role.NODE, "x", Action.PUBLISH, f"{T.root}/direct/n/x")
