"""A function that takes longer the more it has to read."""

import time

from foam import function


@function(description="Read a text slowly.", examples=["read this slowly"])
def nap(text: str) -> int:
    time.sleep(len(text) / 10_000)
    return len(text)
