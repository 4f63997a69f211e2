"""Functions that say how sure they are, for the tests of cascades."""

from collections.abc import AsyncIterator, Iterator

from node_agent.functions import Answer, InvocationContext, function


@function
def judge(text: str, sure: float = 0.3) -> Answer[str]:
    """Judge a text, as sure as it is told to be."""
    return Answer(f"judged {text}", confidence=sure)


@function
def long_winded(sure: float = 0.3, times: int = 10_000) -> Answer[str]:
    """Answer at some length."""
    return Answer("so to say " * times, confidence=sure)


@function
def broken() -> str:
    """Fail."""
    raise ValueError("out of order")


@function
def aloud(sure: float = 0.9) -> Iterator[str | Answer[None]]:
    """Think aloud, then say how sure it is."""
    yield "well, "
    yield "perhaps"
    yield Answer(None, confidence=sure)


@function
async def aloud_async(sure: float) -> AsyncIterator[str | Answer[None]]:
    """Do the same without blocking."""
    for piece in ("well, ", "perhaps", Answer(None, confidence=sure)):
        yield piece


@function
def chatter() -> Iterator[str | Answer[None]]:
    """Go on after its answer, which is a mistake."""
    yield Answer(None, confidence=1)
    yield "but"


@function
def boast() -> Answer[str]:
    """Be surer than sure."""
    return Answer("I know", confidence=1.5)


@function
def endless(context: InvocationContext) -> str:
    """Run until it is cancelled."""
    context.cancelled.wait()
    return "cancelled"
