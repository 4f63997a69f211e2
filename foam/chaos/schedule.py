"""What happens to a mesh, and what is asked of it meanwhile: drawn from a seed, kept as data."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from foam.chaos.functions import answer_of
from foam.chaos.judge import Ask

__all__ = ["Fault", "Kind", "Load", "Words", "draw_faults", "draw_load"]

_LONGEST_MS: Final = 60_000
_SHORTEST_MS: Final = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Something that happens to a member.

    Attributes:
        at_ms: When, milliseconds after the start of the load.
        kind: What.
        target: To whom; empty for the broker of a simulation.
        lasts_ms: How long; then it passes by itself.
        amount: How much: factor of a slow link, milliseconds of a clock set wrong.
    """

    at_ms: int
    kind: str
    target: str = ""
    lasts_ms: int = 0
    amount: float = 0.0

    def __str__(self) -> str:
        whom = self.target or "the broker"
        more = f", {self.amount:g}" if self.amount else ""
        return f"{self.at_ms} ms: {self.kind} {whom} for {self.lasts_ms} ms{more}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A kind of fault as it may be drawn.

    Attributes:
        weight: How often, beside the others.
        targets: Whom it may hit; one empty name for the broker of a simulation.
        mean_ms: Mean time it lasts, milliseconds; drawn from an exponential distribution.
        amounts: What `Fault.amount` is drawn from.
    """

    weight: float
    targets: Sequence[str]
    mean_ms: int = 5_000
    amounts: Sequence[float] = (0.0,)


def draw_faults(
    kinds: Mapping[str, Kind], *, seed: str, span_ms: int, count: int
) -> tuple[Fault, ...]:
    """Draw faults, in the order in which they happen.

    Args:
        kinds: What may happen.
        seed: The same seed draws the same.
        span_ms: Time in which they happen, milliseconds.
        count: How many.
    """
    chance = random.Random(f"{seed}/faults")  # noqa: S311  # a test, no secret
    able = {name: kind for name, kind in kinds.items() if kind.targets and kind.weight}
    faults = []
    for _ in range(count):
        name = chance.choices(list(able), [kind.weight for kind in able.values()])[0]
        kind = able[name]
        lasts_ms = _SHORTEST_MS + chance.expovariate(1 / kind.mean_ms)
        faults.append(
            Fault(
                at_ms=round(chance.uniform(0, span_ms)),
                kind=name,
                target=chance.choice(kind.targets),
                lasts_ms=round(min(_LONGEST_MS, lasts_ms)),
                amount=chance.choice(kind.amounts),
            )
        )
    return tuple(sorted(faults, key=lambda fault: fault.at_ms))


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """A task of the load.

    Attributes:
        at_ms: When it is sent, milliseconds after the start of the load.
        ask: What the judge knows of it.
        body: The task as it is sent.
        cancelled_at_ms: When it is taken back, if it is.
        repeated_at_ms: When it is sent a second time, if it is.
    """

    at_ms: int
    ask: Ask
    body: dict[str, Any]
    cancelled_at_ms: int | None = None
    repeated_at_ms: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Words:
    """A task in words for a language model that answers the same whenever it is asked.

    Attributes:
        text: What is asked.
        function: Who answers it.
        shown: The text that it shows.
        output: Its output.
    """

    text: str
    function: str
    shown: str
    output: Any


_FUNCTIONS: Final = {"look_up": 4, "count": 3, "recite": 3}
_QUICK_MS: Final = 200
_STREAM_MS: Final = 2_000
_SLOWEST_MS: Final = 20_000
_CANCELLED: Final = 0.04
_REPEATED: Final = 0.08
_FAILING: Final = 0.04
_UNSTREAMED: Final = 0.1
_WORDED: Final = 0.1
_NAMED: Final = 0.5
"""Share of the tasks in words that say which function is meant."""


def draw_load(
    clients: Sequence[str],
    *,
    seed: str,
    span_ms: int,
    count: int,
    words: Sequence[Words] = (),
    pace: float = 1.0,
    name: str = "t",
) -> list[Load]:
    """Draw tasks for `foam.chaos.functions`, in the order in which they are sent.

    Args:
        clients: Who sends them.
        seed: The same seed draws the same.
        span_ms: Time in which they are sent, milliseconds.
        count: How many.
        words: Tasks in words, of which a tenth of the load is made, if there are any.
        pace: How long they take, compared with the usual 2 s of a stream.
        name: What their ids begin with.
    """
    chance = random.Random(f"{seed}/load")  # noqa: S311  # a test, no secret
    loads = []
    for number in range(1, count + 1):
        client, task = chance.choice(clients), f"{name}-{number}"
        ask, body = (
            _in_words(client, task, chance.choice(words), named=chance.random() < _NAMED)
            if chance.random() < _WORDED and words
            else _computed(client, task, chance, pace)
        )
        at_ms = round(chance.uniform(0, span_ms))
        later_ms = at_ms + round(chance.expovariate(1 / 1_000))
        loads.append(
            Load(
                at_ms=at_ms,
                ask=ask,
                body=body,
                cancelled_at_ms=later_ms if chance.random() < _CANCELLED else None,
                repeated_at_ms=later_ms if chance.random() < _REPEATED else None,
            )
        )
    return sorted(loads, key=lambda load: load.at_ms)


def _in_words(client: str, task: str, words: Words, *, named: bool) -> tuple[Ask, dict[str, Any]]:
    ask = Ask(
        client=client,
        task=task,
        function=words.function,
        pieces=(words.shown,),
        output=words.output,
        timeout_ms=30_000,
    )
    body = {"id": task, "text": words.text, "timeout_ms": ask.timeout_ms}
    return ask, body | ({"function": words.function} if named else {})


def _computed(
    client: str, task: str, chance: random.Random, pace: float
) -> tuple[Ask, dict[str, Any]]:
    function = chance.choices(list(_FUNCTIONS), list(_FUNCTIONS.values()))[0]
    mean_ms = _QUICK_MS if function == "look_up" else _STREAM_MS
    request: dict[str, Any] = {
        "key": task,
        "pieces": 0 if function == "look_up" else chance.randint(1, 30),
        "ms": round(pace * min(_SLOWEST_MS, chance.expovariate(1 / mean_ms))),
        "fails": chance.random() < _FAILING,
    }
    timeout_ms, streams = chance.choice([5_000, 30_000, 60_000]), chance.random() >= _UNSTREAMED
    pieces, output = answer_of(function, task, request["pieces"])
    ask = Ask(
        client=client,
        task=task,
        function=function,
        pieces=pieces if streams else (),
        output=None if request["fails"] else output,
        timeout_ms=timeout_ms,
    )
    body = {
        "id": task,
        "function": function,
        "input": request,
        "timeout_ms": timeout_ms,
        "priority": chance.randint(0, 9),
        "stream": streams,
    }
    return ask, body
