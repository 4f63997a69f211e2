"""Functions that take their time, for tests that kill nodes in mid-answer."""

import time
from collections.abc import Iterator

from foam import function


@function(continues="skip")
def recite(lines: int, pause_s: float = 0.0) -> Iterator[str]:
    """Say numbered lines, the same every time."""
    for number in range(lines):
        yield f"line {number}\n"
        time.sleep(pause_s)


@function
def improvise(lines: int, pause_s: float = 0.0) -> Iterator[str]:
    """Say numbered lines; nobody promises that they come again."""
    yield from recite(lines, pause_s)
