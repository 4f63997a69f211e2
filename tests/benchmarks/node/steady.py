"""A stream that goes on for a while, the same every time."""

import time
from collections.abc import Iterator

from foam import function

PAUSE_S = 0.03


def _lines(count: int) -> Iterator[str]:
    for number in range(count):
        yield f"line {number}\n"
        time.sleep(PAUSE_S)


@function(continues="skip")
def steady(count: int) -> Iterator[str]:
    """Say numbered lines and go on elsewhere when the node is lost."""
    yield from _lines(count)


@function
def fragile(count: int) -> Iterator[str]:
    """Say numbered lines and end when the node is lost."""
    yield from _lines(count)
