"""Records of large catalogues: light, shared, and still told apart."""

import gc
from collections.abc import Iterator
from typing import Any

import pytest

from capability_schemas.capability import CatalogRecord
from capability_schemas.wire import decode, encode
from router.catalogue import Fleet
from router.sharing import CollectorRest, Sharing


def heard(node: str = "n1", **fields: Any) -> CatalogRecord:
    """A record as it comes off the wire: nothing in it is shared with another."""
    values: dict[str, Any] = {
        "node": node,
        "function": "echo",
        "version": "1.0.0",
        "epoch": 10,
        "revision": 1,
        "description": "Repeat the text.",
        "skills": ("talk",),
        "policy": {"zones": ["hall"]},
        "input_schema": {"type": "object", "properties": {"text": {"const": 1}}},
        "embedding": "AAAA",
        "parts": "BBBB",
        "space": {"model": "m", "revision": "1", "dimension": 3},
        "registry": "registry-1",
        "admitted_at": 0,
        "claim_digest": "sha256:0",
    }
    return decode(CatalogRecord, encode(CatalogRecord(**(values | fields))))


def test_a_light_record_says_the_same_but_for_its_vectors() -> None:
    record = heard()
    light = Sharing().lighten(record)
    assert light == record.model_copy(update={"embedding": None, "parts": None})
    assert light.model_fields_set == record.model_fields_set
    assert record.embedding == "AAAA"


def test_what_is_equal_is_kept_once() -> None:
    sharing = Sharing()
    one, other = sharing.lighten(heard("n1")), sharing.lighten(heard("n2"))
    assert one.node != other.node
    assert one.policy is other.policy
    assert one.space is other.space
    assert one.input_schema is other.input_schema


def test_schemas_that_only_python_takes_for_equal_are_not_shared() -> None:
    sharing = Sharing()
    truth = {"type": "object", "properties": {"text": {"const": True}}}
    one, other = sharing.lighten(heard()), sharing.lighten(heard(input_schema=truth))
    assert one.input_schema == other.input_schema
    assert one.input_schema is not other.input_schema


def test_a_light_record_that_comes_again_is_no_news() -> None:
    fleet = Fleet()
    assert fleet.admit(heard())
    fleet.lighten(("n1", "echo"))
    fleet.lighten(("n1", "unknown"))
    kept = fleet.records["n1", "echo"]
    assert kept.embedding is None
    assert fleet.named("echo")["n1"] is kept
    assert not fleet.admit(heard())
    assert not fleet.admit(heard(revision=0))
    assert fleet.records["n1", "echo"] is kept


@pytest.mark.parametrize(
    "change", [{"parts": "CCCC"}, {"embedding": "CCCC"}, {"revision": 2}, {"skills": ("sing",)}]
)
def test_a_light_record_that_comes_changed_is_news(change: dict[str, Any]) -> None:
    fleet = Fleet()
    fleet.admit(heard())
    fleet.lighten(("n1", "echo"))
    assert fleet.admit(heard(**change))
    assert fleet.records["n1", "echo"] == heard(**change)


@pytest.fixture
def thawed() -> Iterator[None]:
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("thawed")
def test_the_collector_is_spared_what_a_thousand_changes_left() -> None:
    gc.unfreeze()
    rest = CollectorRest()
    for _ in range(999):
        rest.changed()
    assert gc.get_freeze_count() == 0
    rest.changed()
    assert gc.get_freeze_count() > 0
