"""Which role may give which order: one table, for routers and registries alike."""

import pytest

from broker.access.orders import ORDERS, Requester, changes, told_args
from broker.access.policy import Role
from capability_schemas.errors import AccessDenied

OPERATED = [
    "nodes",
    "routers",
    "functions",
    "stats",
    "task",
    "explain",
    "whatif",
    "reputation",
    "quotas",
    "waiting",
    "claims",
    "history",
    "audit",
    "tokens",
    "enrollments",
    "registries",
    "cordon",
    "uncordon",
    "drain",
    "undrain",
    "token_create",
    "token_revoke",
    "approve",
    "deny",
    "revoke",
    "authority",
    "attestation",
    "attestation_reference",
]
ADMINISTERED = ["calibrate", "forget"]
SHOWN_ONLY = ["weights", "rules", "encoder"]
ARGS = {"x": 1}


def may(role, verb, args):
    try:
        Requester("somebody", role).check_order(verb, args)
    except AccessDenied:
        return False
    return True


def test_every_verb_that_an_operator_may_use_is_named_here():
    lowered = {verb for verb in ORDERS if may(Role.OPERATOR, verb, ARGS)}
    assert lowered == set(OPERATED)


@pytest.mark.parametrize("verb", [*OPERATED, *ADMINISTERED, *SHOWN_ONLY, "made_up"])
def test_an_administrator_may_order_everything(verb):
    assert may(Role.ADMIN, verb, ARGS)
    assert may(Role.ADMIN, verb, {})


@pytest.mark.parametrize("verb", OPERATED)
def test_an_operator_keeps_the_mesh_running(verb):
    assert may(Role.OPERATOR, verb, ARGS)


@pytest.mark.parametrize("verb", [*ADMINISTERED, "made_up", ""])
def test_an_operator_does_not_decide_what_the_mesh_is(verb):
    assert not may(Role.OPERATOR, verb, ARGS)
    assert not may(Role.OPERATOR, verb, {})


@pytest.mark.parametrize("verb", SHOWN_ONLY)
def test_an_operator_sees_what_it_may_not_set(verb):
    assert may(Role.OPERATOR, verb, {})
    assert not may(Role.OPERATOR, verb, ARGS)


@pytest.mark.parametrize("role", sorted(set(Role) - {Role.ADMIN, Role.OPERATOR}))
@pytest.mark.parametrize("verb", ["nodes", "weights", "drain", "token_create"])
def test_nobody_else_orders_anything(role, verb):
    assert not may(role, verb, {})
    assert not may(role, verb, ARGS)


def test_a_refusal_says_what_is_needed_and_what_was_seen():
    with pytest.raises(AccessDenied, match="weights needs an administrator, olga is known here as"):
        Requester("olga", Role.OPERATOR).check_order("weights", {"cost": 0.1})


@pytest.mark.parametrize("role", Role)
def test_an_operator_decides_over_nodes_and_devices_only(role):
    Requester("anna", Role.ADMIN).check_member(role, "throw out members of")
    operator = Requester("olga", Role.OPERATOR)
    if role in {Role.NODE, Role.DEVICE}:
        operator.check_member(role, "throw out members of")
        return
    with pytest.raises(AccessDenied, match=f"operator olga may not throw out .* role {role.value}"):
        operator.check_member(role, "throw out members of")


def test_what_changes_nothing_needs_no_entry():
    assert not changes("nodes", {"limit": 3})
    assert not changes("weights", {})
    assert changes("weights", {"cost": 0.1})
    assert changes("calibrate", {})
    assert changes("made_up", {})


def test_arguments_are_told_without_secrets_and_at_no_length():
    assert told_args({"node": "a", "password": "geheim"}) == {"node": "a", "password": "…"}
    long = told_args({"text": "x" * 5_000})
    assert long["names"] == ["text"]
    assert long["bytes"] > 5_000
