"""Functions the end-to-end tests run on a node."""

import time
from collections.abc import Iterator

from foam import function


@function(examples=["repeat this sentence after me", "say back what I said"])
def echo(text: str) -> str:
    """Repeat the words of the task back to whoever sent them."""
    return text


@function(examples=["count slowly to ten", "count up one number at a time"], version="1.3.0")
def count(n: int = 5, pause_s: float = 0.05) -> Iterator[str]:
    """Count slowly from zero upwards, one number at a time."""
    for number in range(n):
        yield f"{number} "
        time.sleep(pause_s)


@function(examples=["break on purpose"])
def broken() -> str:
    """Fail on purpose, with an error."""
    message = "the shaft is gone"
    raise ValueError(message)


@function(examples=["how many times was this run?"])
def runs(path: str) -> int:
    """Count how many times it was run, in a file."""
    with open(path, "a+", encoding="utf-8") as file:  # noqa: PTH123
        file.write("x")
        file.seek(0)
        return len(file.read())
