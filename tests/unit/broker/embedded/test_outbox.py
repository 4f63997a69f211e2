"""What waits for a session stays bounded, in order, and comes again until acknowledged."""

import pytest

from broker.embedded.outbox import Outbox, Publication, encode_length


class Wire:
    """Records what is written; ``room`` packets fit before it asks for a pause."""

    def __init__(self, room: int = 1000) -> None:
        self.sent: list[bytes] = []
        self.room = room

    def __call__(self, packet: bytes) -> bool:
        self.sent.append(packet)
        self.room -= 1
        return self.room > 0

    @property
    def payloads(self) -> list[bytes]:
        return [packet[-1:] for packet in self.sent]


@pytest.fixture
def dropped():
    return []


@pytest.fixture
def outbox(dropped):
    return Outbox(
        window=2, limit=3, limit_bytes=200, dropped=lambda p, n: dropped.append((p.payload, n))
    )


def message(number: int, qos: int = 1) -> Publication:
    return Publication("t", b"%d" % number, qos=qos)


def test_the_window_holds_back_what_is_not_acknowledged(outbox):
    wire = Wire()
    outbox.connect(wire)
    for number in range(5):
        assert outbox.offer(message(number))
    assert (wire.payloads, outbox.inflight, outbox.waiting) == ([b"0", b"1"], 2, 3)
    outbox.acknowledge(1)
    assert wire.payloads == [b"0", b"1", b"2"]
    outbox.acknowledge(99)
    assert outbox.waiting == 2


def test_quality_of_service_0_does_not_overtake(outbox):
    wire = Wire()
    outbox.connect(wire)
    for number, qos in enumerate((1, 1, 1, 0)):
        outbox.offer(message(number, qos))
    assert wire.payloads == [b"0", b"1"]
    outbox.acknowledge(1)
    assert wire.payloads == [b"0", b"1", b"2", b"3"]


def test_a_full_outbox_drops_the_newest_and_says_so(outbox, dropped):
    for number in range(5):
        outbox.offer(message(number))
    assert dropped == [(b"3", 1), (b"4", 2)]
    wire = Wire()
    outbox.connect(wire)
    assert wire.payloads == [b"0", b"1"]


def test_bytes_are_bounded_too_but_one_message_always_fits(outbox, dropped):
    assert outbox.offer(Publication("t", bytes(500), qos=1))
    assert not outbox.offer(message(1))
    assert dropped == [(b"1", 1)]


def test_nobody_keeps_quality_of_service_0_for_an_absent_client(outbox):
    assert not outbox.offer(message(0, qos=0))
    outbox.connect(Wire(room=1))
    outbox.offer(message(1, qos=0))
    outbox.offer(message(2, qos=0))
    assert outbox.waiting == 1
    outbox.disconnect()
    assert outbox.waiting == 0


def test_what_was_not_acknowledged_comes_first_again_and_marked(outbox):
    outbox.connect(Wire())
    for number in range(4):
        outbox.offer(message(number))
    outbox.acknowledge(2)
    outbox.disconnect()
    wire = Wire()
    outbox.connect(wire)
    assert wire.payloads == [b"0", b"2"]
    assert [bool(packet[0] & 0x08) for packet in wire.sent] == [True, True]
    outbox.acknowledge(1)
    assert wire.payloads[-1] == b"3"
    assert not wire.sent[-1][0] & 0x08


def test_a_slow_connection_pauses_and_resumes(outbox):
    wire = Wire(room=1)
    outbox.connect(wire)
    outbox.offer(message(0, qos=0))
    outbox.offer(message(1, qos=0))
    assert wire.payloads == [b"0"]
    wire.room = 10
    outbox.resume()
    assert wire.payloads == [b"0", b"1"]


def test_a_publish_packet_is_what_the_standard_says():
    assert Publication("a/b", b"hi", qos=0).encode() == b"\x30\x07\x00\x03a/bhi"
    packet = Publication("a/b", b"hi", qos=1, retain=True).encode(258, again=True)
    assert packet == b"\x3b\x09\x00\x03a/b\x01\x02hi"


@pytest.mark.parametrize(
    ("length", "encoded"),
    [
        (0, b"\0"),
        (127, b"\x7f"),
        (128, b"\x80\1"),
        (16_384, b"\x80\x80\1"),
        (268_435_455, b"\xff\xff\xff\x7f"),
    ],
)
def test_lengths_of_table_2_4(length, encoded):
    assert encode_length(length) == encoded
