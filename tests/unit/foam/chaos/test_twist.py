"""What a twist does to the stream of a broker: packets stay whole, topics keep their order."""

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from foam.chaos.twist import Twist

PINGRESP = bytes([0xD0, 0])


def publish(topic: str, payload: bytes, *, qos: int = 0, packet: int = 7) -> bytes:
    body = len(topic).to_bytes(2) + topic.encode()
    body += packet.to_bytes(2) if qos else b""
    body += payload
    digits, left = bytearray(), len(body)
    while left or not digits:
        left, digit = divmod(left, 128)
        digits.append(digit | (0x80 if left else 0))
    return bytes([0x30 | qos << 1]) + bytes(digits) + body


def twisted(active: bool, doubled: float = 1.0) -> tuple[Any, list[bytes], list[str]]:
    sent: list[bytes] = []
    noted: list[str] = []
    twist = Twist(chance=random.Random(3), note=noted.append, doubled=doubled, active=active)
    return twist.connection(sent.append), sent, noted


@pytest.mark.parametrize("step", [1, 3, 1000])
async def test_what_is_not_twisted_passes_byte_by_byte(step: int) -> None:
    data = publish("a/b", b"x" * 300, qos=1) + PINGRESP + publish("c", b"")
    connection, sent, noted = twisted(active=False)
    for at in range(0, len(data), step):
        connection.feed(data[at : at + step])
    assert b"".join(sent) == data
    assert len(sent) == 3
    assert noted == []


async def test_everything_comes_and_topics_keep_their_order(
    eventually: Callable[..., Any],
) -> None:
    connection, sent, noted = twisted(active=True, doubled=0.0)
    first = [publish(topic, bytes([number]), qos=1) for number in range(40) for topic in "ab"]
    connection.feed(b"".join(first))
    await eventually(lambda: set(first) <= set(sent), timeout_s=20)
    for topic in "ab":
        mine = [one for one in sent if one in first and one[4:5] == topic.encode()]
        assert mine == [one for one in first if one[4:5] == topic.encode()]
    assert [one for one in sent if one in first] != first, "nothing overtook anything"
    assert Counter(sent).keys() > set(first), "nothing of the past came again"
    assert noted


async def test_a_repetition_has_no_number_to_confirm(eventually: Callable[..., Any]) -> None:
    connection, sent, _ = twisted(active=True)
    connection.feed(publish("a/b", b"hello" * 60, qos=1))
    once = publish("a/b", b"hello" * 60)
    await eventually(lambda: once in sent, timeout_s=20)
    assert publish("a/b", b"hello" * 60, qos=1) in sent


async def test_nothing_follows_the_end_of_a_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Twist, "draw", lambda _: (0.0, 0.0, False))
    connection, sent, _ = twisted(active=True)
    connection.feed(publish("a", b"held") + PINGRESP)
    connection.end()
    fired = asyncio.Event()
    asyncio.get_running_loop().call_later(0, fired.set)  # after what was to come at once
    await fired.wait()
    assert sent == [PINGRESP]
