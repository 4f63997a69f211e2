"""Deliveries that come twice, late, out of order, and again from the past.

A `Twist` sits in a proxy, on the way from the broker to one client. It does what MQTT allows a
broker to do and brokers seldom do (MQTT 3.1.1 sections 4.3 to 4.6): a message is delivered again,
at once, later, or long after newer ones; a message waits while those of other topics overtake it.
Messages of one topic keep their order, but for the repetitions. A repetition has QoS 0, so that
nobody confirms what nobody sent.
"""

import asyncio
import random
from collections import deque
from collections.abc import Callable
from typing import Final

__all__ = ["Twist"]

_PUBLISH: Final = 3
_QOS: Final = 0b0110
_DUP: Final = 0b1000
_DELAYED: Final = 0.15
_RECALLED: Final = 0.1
_LATEST_S: Final = 0.3
"""Longest a message is held back."""
_AGAIN_S: Final = 2.0
"""Longest until its repetition."""
_PAST: Final = 1_000
"""Messages remembered, to be delivered again at any time."""
_MOST_BYTES: Final = 64 * 1024
"""Larger messages are not repeated."""


class Twist:
    """Twists the deliveries to one client, while it is `active`.

    Args:
        chance: What it draws from.
        note: Told the topic of each message that it held back or repeated.
        doubled: Share of the messages that are delivered again, 0 to 1.
        active: Whether it begins at once.
    """

    def __init__(
        self,
        *,
        chance: random.Random,
        note: Callable[[str], None],
        doubled: float,
        active: bool = False,
    ) -> None:
        self.active = active
        self._doubled = doubled
        self._chance = chance
        self._note = note
        self._past: deque[tuple[str, bytes]] = deque(maxlen=_PAST)

    def connection(self, write: Callable[[bytes], None]) -> "_Connection":
        """Begin with a connection.

        Args:
            write: Takes the bytes for the client.
        """
        return _Connection(self, write)

    def draw(self) -> tuple[float | None, float | None, bool]:
        """Return how long a message is held, when it is repeated, and whether an old one is."""
        chance = self._chance
        held_s = chance.uniform(0, _LATEST_S) if chance.random() < _DELAYED else None
        again_s = None
        if chance.random() < self._doubled:
            again_s = chance.choice([0.0, chance.uniform(0, _AGAIN_S)])
        return held_s, again_s, chance.random() < _RECALLED

    def remember(self, topic: str, copy: bytes) -> None:
        """Take a message that may be delivered again."""
        self._past.append((topic, copy))

    def recall(self) -> bytes:
        """Return an old message."""
        topic, copy = self._chance.choice(self._past)
        self._note(topic)
        return copy

    def noted(self, topic: str) -> None:
        """Take note of a message that is twisted."""
        self._note(topic)


class _Connection:
    """The stream of packets of one connection."""

    def __init__(self, twist: Twist, write: Callable[[bytes], None]) -> None:
        self._twist = twist
        self._write = write
        self._rest = b""
        self._held: dict[str, list[bytes]] = {}
        self._open = True

    def feed(self, data: bytes) -> None:
        """Take bytes from the broker."""
        self._rest += data
        while (size := _size(self._rest)) is not None:
            packet, self._rest = self._rest[:size], self._rest[size:]
            if packet[0] >> 4 == _PUBLISH:
                self._publish(packet)
            else:
                self._write(packet)

    def end(self) -> None:
        """The connection is over: what was held back is lost with it."""
        self._open = False
        self._held.clear()

    def _publish(self, packet: bytes) -> None:
        twist = self._twist
        topic, copy = _copy(packet)
        if len(copy) <= _MOST_BYTES:
            twist.remember(topic, copy)
        if not twist.active:
            self._pass(topic, packet)
            return
        held_s, again_s, old = twist.draw()
        if held_s is not None and topic not in self._held:
            self._held[topic] = []
            asyncio.get_running_loop().call_later(held_s, self._release, topic)
            twist.noted(topic)
        self._pass(topic, packet)
        if again_s is not None and len(copy) <= _MOST_BYTES:
            twist.noted(topic)
            asyncio.get_running_loop().call_later(again_s, self._send, copy)
        if old:
            self._send(twist.recall())

    def _pass(self, topic: str, packet: bytes) -> None:
        if topic in self._held:
            self._held[topic].append(packet)
        else:
            self._write(packet)

    def _release(self, topic: str) -> None:
        for packet in self._held.pop(topic, ()):
            self._write(packet)

    def _send(self, packet: bytes) -> None:
        if self._open:
            self._write(packet)


def _size(data: bytes) -> int | None:
    """Return the bytes of the first packet; None while it is not complete.

    The length is a number of up to four digits to the base of 128 (MQTT 3.1.1 section 2.2.3).
    """
    length = 0
    for place, digit in enumerate(data[1:5]):
        length |= (digit & 0x7F) << (7 * place)
        if digit < 0x80:  # noqa: PLR2004 - the highest bit says that there are more digits
            size = 2 + place + length
            return size if len(data) >= size else None
    return None


def _copy(packet: bytes) -> tuple[str, bytes]:
    """Return the topic of a message, and the message again with QoS 0 (section 3.3)."""
    head = 2
    while packet[head - 1] & 0x80:
        head += 1
    topic_end = head + 2 + int.from_bytes(packet[head : head + 2])
    topic = packet[head + 2 : topic_end].decode("utf-8", "replace")
    rest = packet[topic_end + 2 :] if packet[0] & _QOS else packet[topic_end:]
    body = packet[head:topic_end] + rest
    digits, left = bytearray(), len(body)
    while left or not digits:
        left, digit = divmod(left, 128)
        digits.append(digit | (0x80 if left else 0))
    return topic, bytes([packet[0] & ~(_QOS | _DUP)]) + bytes(digits) + body
