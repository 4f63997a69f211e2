"""Identifiers."""

import uuid

import pytest

from capability_schemas.errors import ProtocolError
from capability_schemas.ids import check_identifier, is_identifier, new_uuid7, now_ms


@pytest.mark.parametrize("value", ["a", "A-1_b", "x" * 64, "-", "_"])
def test_identifiers(value):
    assert check_identifier(value, "node") == value


@pytest.mark.parametrize("value", ["", "x" * 65, "a.b", "a b", "ä", "a\n", "a/b", "#", 5, None])
def test_what_no_broker_is_sure_to_carry(value):
    assert not is_identifier(value)


def test_the_error_says_what_it_names():
    with pytest.raises(ProtocolError, match=r"client id 'a\.b'"):
        check_identifier("a.b", "client id")


def test_uuid7_is_one_and_sorts_by_time():
    made = [new_uuid7(at) for at in (1, 2, now_ms())]
    assert made == sorted(made)
    assert all(uuid.UUID(value).version == 7 for value in made)
    assert all(uuid.UUID(value).variant == uuid.RFC_4122 for value in made)
    assert all(is_identifier(value) for value in made)
