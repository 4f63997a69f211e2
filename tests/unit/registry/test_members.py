"""What the registry tells of its members, and what may be vouched for of whom."""

import pytest

from broker.access.credentials import CredentialStore
from broker.access.policy import Role
from capability_schemas.capability import CapabilityPolicy
from capability_schemas.errors import InvalidTask
from registry.enrollment.members import MemberWatch
from registry.enrollment.tenancy import check_attested
from registry.trust import Description


class Board:
    """Keeps what is said."""

    def __init__(self):
        self.said = {}

    def describe(self, member, description):
        if description is None:
            del self.said[member]
        else:
            self.said[member] = description


@pytest.fixture
def store(tmp_path):
    return CredentialStore(tmp_path / "credentials.json")


@pytest.fixture
def board(store):
    return Board()


@pytest.fixture
def watch(store, board):
    def members():
        store.refresh()
        return store.identities()

    return MemberWatch(board=board, members=members, registry_id="registry-1")


def test_people_and_members_of_tenants_are_told_of_and_nobody_else(store, board, watch):
    store.add("anna", Role.ADMIN)
    store.add("olga", Role.OPERATOR)
    store.add("otto", Role.OBSERVER)
    store.add("pump-7", Role.DEVICE)
    store.add("pump-8", Role.DEVICE, attested=CapabilityPolicy(tenant="acme"))
    store.add("edge-1", Role.NODE, attested=CapabilityPolicy(zones=("z",)))
    store.add("edge-2", Role.NODE, attested=CapabilityPolicy(tenant="*"))
    watch.refresh()
    assert board.said == {
        "anna": Description(role="admin"),
        "olga": Description(role="operator"),
        "pump-8": Description(role="device", tenant="acme"),
    }


def test_what_changes_is_told_again(store, board, watch):
    store.add("olga", Role.OPERATOR)
    store.add("pump-8", Role.DEVICE, attested=CapabilityPolicy(tenant="acme"))
    watch.refresh()
    store.update("olga", disabled=True)
    store.update("pump-8", attested=CapabilityPolicy(tenant="bolt"))
    watch.refresh()
    assert board.said == {"pump-8": Description(role="device", tenant="bolt")}
    store.remove("pump-8")
    watch.refresh()
    assert board.said == {}


def test_whoever_follows_the_credentials_hears_of_every_change_once(store, board):
    stirred = []

    def members():
        store.refresh()
        return store.identities()

    watch = MemberWatch(
        board=board,
        members=members,
        registry_id="registry-1",
        stirred=lambda: stirred.append(set(store.identities())),
    )
    store.add("pump-7", Role.DEVICE)
    watch.refresh()
    watch.refresh()
    store.remove("pump-7")
    watch.refresh()
    assert stirred == [{"pump-7"}, set()]


def test_a_damaged_file_changes_nothing(store, board, watch):
    store.add("olga", Role.OPERATOR)
    watch.refresh()
    store.path.write_text("{")
    watch.refresh()
    assert set(board.said) == {"olga"}


@pytest.mark.parametrize(
    ("role", "given", "says"),
    [
        (Role.DEVICE, {"zones": ("z",)}, "zones, grants and data are for nodes, not for a device"),
        (Role.ADMIN, {"tenant": "acme"}, "role admin is of no tenant"),
        (Role.OPERATOR, {"tenant": "acme"}, "of no tenant"),
        (Role.ROUTER, {"tenant": "acme"}, "of no tenant"),
        (Role.DEVICE, {"tenant": "*"}, "is for nodes that serve all"),
        (Role.NODE, {"tenant": "a b"}, "tenant: "),
        (Role.NODE, {"data": ("secret",)}, "data"),
    ],
)
def test_what_cannot_be_vouched_for_is_said(role, given, says):
    with pytest.raises(InvalidTask, match=says):
        check_attested(role, given, error=InvalidTask)


def test_what_can():
    assert check_attested(Role.DEVICE, {}, error=InvalidTask) is None
    policy = check_attested(Role.DEVICE, {"tenant": "acme"}, error=InvalidTask)
    assert policy is not None
    assert policy.tenant == "acme"
    policy = check_attested(Role.NODE, {"tenant": "*", "zones": ["z"]}, error=InvalidTask)
    assert policy == CapabilityPolicy(zones=("z",), tenant="*")
