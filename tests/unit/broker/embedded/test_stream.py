"""Packets are cut out of whatever arrives, and too large ones are refused by their length."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.embedded.outbox import encode_length
from broker.embedded.stream import take_frames
from capability_schemas.errors import ProtocolError, TooLarge

PACKETS = st.lists(st.tuples(st.integers(0, 255), st.binary(max_size=300)), max_size=6)


@given(PACKETS, st.integers(1, 50))
def test_packets_survive_any_cut(packets, step):
    stream = b"".join(bytes((f,)) + encode_length(len(body)) + body for f, body in packets)
    buffer = bytearray()
    got: list[tuple[int, bytes]] = []
    for start in range(0, len(stream), step):
        buffer += stream[start : start + step]
        got.extend(take_frames(buffer, 1000))
    assert got == packets
    assert not buffer


def test_a_length_above_the_limit_is_refused_before_the_rest_arrives():
    buffer = bytearray(b"\xc0\x00\x30" + encode_length(1001))
    frames = take_frames(buffer, 1000)
    assert next(frames) == (0xC0, b"")
    with pytest.raises(TooLarge) as error:
        next(frames)
    assert error.value.detail == {"size_bytes": 1001, "limit_bytes": 1000}


def test_a_length_of_five_digits_is_no_length():
    with pytest.raises(ProtocolError, match="four digits"):
        list(take_frames(bytearray(b"\x30\x80\x80\x80\x80\x01"), 1000))
