from registry.catalog import Catalog
from support.capabilities import make_record
from support.encoders import WordEncoder

ENCODER = WordEncoder(dimension=8)
KEY = ("edge-1", "echo")


def test_a_record_leaves_when_its_lease_ends() -> None:
    catalog = Catalog()
    catalog.admit(make_record(ENCODER, expires_at=100), grace_until=0)
    assert catalog.due(99) == []
    assert [lapse.key for lapse in catalog.due(100)] == [KEY]


def test_a_withdrawn_record_leaves_its_order_behind() -> None:
    catalog = Catalog()
    catalog.admit(make_record(ENCODER, expires_at=100), grace_until=0)
    assert catalog.withdraw(KEY) is not None
    assert catalog.withdraw(KEY) is None
    standing = catalog.standing(KEY)
    assert standing is not None
    assert standing.withdrawn
    assert standing.order == (10, 1)
    assert catalog.due(10**9) == []
    catalog.forget(KEY)
    assert catalog.standing(KEY) is None


def test_what_is_restored_must_be_heard_again_within_the_grace() -> None:
    catalog = Catalog()
    catalog.restore(make_record(ENCODER), withdrawn=False)
    catalog.restore(make_record(ENCODER, function="other"), withdrawn=False)
    assert catalog.due(10**9) == []  # not connected yet
    catalog.start_grace(100)
    catalog.confirm(KEY)
    assert [lapse.key for lapse in catalog.due(100)] == [("edge-1", "other")]


def test_a_confirmation_before_the_grace_starts_counts() -> None:
    catalog = Catalog()
    catalog.restore(make_record(ENCODER), withdrawn=False)
    catalog.confirm(KEY)
    catalog.start_grace(100)
    assert catalog.due(10**9) == []


def test_a_lost_connection_makes_everything_doubtful() -> None:
    catalog = Catalog()
    catalog.admit(make_record(ENCODER), grace_until=0)
    catalog.doubt_all()
    catalog.start_grace(100)
    assert [lapse.key for lapse in catalog.due(100)] == [KEY]


def test_a_new_start_of_a_node_asks_for_its_claims_again() -> None:
    catalog = Catalog()
    catalog.admit(make_record(ENCODER, epoch=10), grace_until=0)
    catalog.admit(make_record(ENCODER, node="edge-2", epoch=10), grace_until=0)
    catalog.node_started("edge-1", 10, grace_until=50)
    assert catalog.due(10**6) == []
    catalog.node_started("edge-1", 20, grace_until=50)
    catalog.node_started("edge-1", 15, grace_until=1)
    assert [lapse.key for lapse in catalog.due(50)] == [KEY]


def test_a_claim_of_an_earlier_life_does_not_outlast_the_grace() -> None:
    catalog = Catalog()
    catalog.node_started("edge-1", 20, grace_until=50)
    catalog.admit(make_record(ENCODER, epoch=10), grace_until=60)
    assert [lapse.key for lapse in catalog.due(60)] == [KEY]
    catalog.admit(make_record(ENCODER, epoch=20), grace_until=60)
    assert catalog.due(10**6) == []


def test_a_key_that_is_due_twice_is_named_once() -> None:
    catalog = Catalog()
    catalog.restore(make_record(ENCODER, expires_at=100), withdrawn=False)
    catalog.start_grace(100)
    assert len(catalog.due(100)) == 1
