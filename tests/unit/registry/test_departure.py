import pytest

from broker.access.orders import Requester
from broker.access.policy import Role
from capability_schemas.errors import AccessDenied, Conflict
from registry.enrollment.departure import check_departure

ADMIN = Requester("admin-1", Role.ADMIN)
OPERATOR = Requester("otto", Role.OPERATOR)
OURS = {"registry-1", "registry-2", "router-1", "edge-1"}


def leave(identity, role, *, asker=ADMIN, force=False, administrators=("admin-1", "ann")):
    check_departure(
        identity,
        role,
        asker=asker,
        registry_id="registry-1",
        administrators=administrators,
        runs_here=OURS.__contains__,
        force=force,
    )


@pytest.mark.parametrize(
    ("identity", "role", "words"),
    [
        ("registry-2", Role.REGISTRY, "own data folder"),
        ("router-1", Role.ROUTER, "own data folder"),
        ("edge-1", Role.NODE, "own data folder"),
        ("admin-1", Role.ADMIN, "asks for itself"),
    ],
)
def test_what_the_mesh_runs_with_goes_by_force_only(identity, role, words):
    with pytest.raises(Conflict, match=words) as refused:
        leave(identity, role)
    assert "--force" in refused.value.message
    leave(identity, role, force=True)


def test_the_last_administrator_goes_by_force_only():
    with pytest.raises(Conflict, match="last administrator: add another one first"):
        leave("admin-1", Role.ADMIN, administrators=["admin-1"])
    leave("admin-1", Role.ADMIN, administrators=["admin-1"], force=True)
    leave("ann", Role.ADMIN)


def test_the_registry_never_throws_itself_out():
    for force in (False, True):
        with pytest.raises(Conflict, match="cannot throw itself out"):
            leave("registry-1", Role.REGISTRY, force=force)


def test_others_go_and_operators_have_no_force():
    leave("press-7", Role.NODE, asker=OPERATOR)
    with pytest.raises(Conflict, match="own data folder"):
        leave("edge-1", Role.NODE, asker=OPERATOR)
    with pytest.raises(AccessDenied, match="may not use force: ask an administrator"):
        leave("edge-1", Role.NODE, asker=OPERATOR, force=True)
