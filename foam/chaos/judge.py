"""What a client was promised, and what it got: the only witness of a chaos run is the wire.

A `Judge` reads every event that arrives for a client and holds it against the protocol
(sections 3 and 5) and against what the function is known to answer::

    judge.submitted(ask, at=…)       # the task was published
    judge.heard(client, source, payload, at=…)
    verdict = judge.verdict(at=…)    # broken: lost, doubled, gap, wrong, late

An event may arrive twice, for delivery is at least once: the same number with the same content is
no fault. Two ends that differ are, a number with two contents is, and so is an accepted task that
has no end when its deadline and a grace have passed. What a node says of an attempt below the
highest one seen, be it numbered or ``routed``, a reader passes over; a router's word always counts,
for it keeps the record.
"""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final, Literal

__all__ = ["Ask", "Breach", "Judge", "Verdict", "percentile"]

_ENDS: Final = frozenset({"result", "error"})

Kind = Literal["lost", "unanswered", "doubled", "gap", "wrong", "malformed"]
"""What can be broken.

lost: accepted, and no end in time. unanswered: neither accepted nor refused. doubled: two ends, or
one number with two contents, or something after the end. gap: a number missing before the end.
wrong: not what the function answers. malformed: not an event of the protocol.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A task as the client sent it.

    Attributes:
        client: Who sent it.
        task: Its id.
        function: What it addressed.
        pieces: The chunks the function is known to send, in order, as JSON values; None where that
            is not known. Texts may arrive joined.
        output: The known answer; None where it is not known.
        timeout_ms: Its time, milliseconds.
    """

    client: str
    task: str
    function: str
    pieces: tuple[Any, ...] | None = None
    output: Any = None
    timeout_ms: int = 60_000


@dataclass(frozen=True, slots=True)
class Breach:
    """A promise that was not kept.

    Attributes:
        kind: Which.
        client: To whom.
        task: About which task.
        what: In words.
        at: When it was noticed, milliseconds by the caller's clock.
    """

    kind: Kind
    client: str
    task: str
    what: str
    at: int


@dataclass(slots=True)
class _Case:
    """One task as its client sees it."""

    ask: Ask
    submitted_at: int
    accepted_at: int | None = None
    routed: list[tuple[int, str]] = field(default_factory=list)
    attempt: int = 0
    routers: set[str] = field(default_factory=set)
    chunks: dict[int, Any] = field(default_factory=dict)
    end: dict[str, Any] | None = None
    ended_at: int | None = None
    last_at: int | None = None
    left_at: int | None = None
    gaps_ms: list[int] = field(default_factory=list)

    @property
    def refused(self) -> bool:
        """Whether it was turned away for want of room: sent again, it may be taken."""
        end = self.end
        return end is not None and self.accepted_at is None and end.get("code") == "overloaded"

    @property
    def next_seq(self) -> int:
        """The first number not seen yet."""
        seq = 0
        while seq in self.chunks:
            seq += 1
        return seq


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What came of a run.

    Attributes:
        submitted: Tasks sent.
        accepted: Of those, accepted.
        finished: Ended with a result.
        failed: Ended with an error, by code.
        breaches: Promises not kept.
        repeated: Events that arrived more than once, which is allowed.
        stale: Events of an attempt that another had replaced: a reader passes over them.
        moved: Tasks that more than one node had.
        gaps_ms: For each time that another node went on with an answer of which something had been
            shown: from the last word of the one to the next of the other.
        accepted_ms: From sending to ``accepted``, for each accepted task.
        answer_ms: From sending to the end, for each finished task.
    """

    submitted: int
    accepted: int
    finished: int
    failed: dict[str, int]
    breaches: tuple[Breach, ...]
    repeated: int
    stale: int
    moved: int
    gaps_ms: tuple[int, ...]
    accepted_ms: tuple[int, ...]
    answer_ms: tuple[int, ...]

    @property
    def broken(self) -> Counter[str]:
        """Breaches by kind."""
        return Counter(breach.kind for breach in self.breaches)


class Judge:
    """Reads what clients get; see the module.

    Args:
        grace_ms: How long after its deadline an accepted task may still end, milliseconds.
    """

    def __init__(self, *, grace_ms: int = 5_000) -> None:
        self._grace_ms = grace_ms
        self._cases: dict[tuple[str, str], _Case] = {}
        self._open: dict[tuple[str, str], None] = {}
        self._breaches: list[Breach] = []
        self._blamed: set[tuple[str, str, str]] = set()
        self._repeated = 0
        self._stale = 0
        self._lacking: dict[tuple[str, str], None] = {}

    @property
    def breaches(self) -> tuple[Breach, ...]:
        """What was noticed so far."""
        return tuple(self._breaches)

    def submitted(self, ask: Ask, *, at: int) -> None:
        """Note that a task was sent, milliseconds by the caller's clock."""
        key = (ask.client, ask.task)
        if key not in self._cases:
            self._cases[key] = _Case(ask, at)
            self._open[key] = None

    def open_tasks(self, client: str | None = None) -> list[tuple[Ask, bool, int]]:
        """Return the tasks without an end: what was asked, whether accepted, next number.

        Args:
            client: Whose; everybody's when None.
        """
        cases = (self._cases[key] for key in self._open)
        return [
            (case.ask, case.accepted_at is not None, case.next_seq)
            for case in cases
            if client is None or case.ask.client == client
        ]

    def missing(self, client: str) -> list[tuple[str, int]]:
        """Return the client's ended tasks that lack a chunk: id, first number missing."""
        return [
            (task, self._cases[owner, task].next_seq)
            for owner, task in self._lacking
            if owner == client
        ]

    def served_after(self, at: int) -> int | None:
        """Return when a task that was sent after a moment was first accepted."""
        return min(
            (
                case.accepted_at
                for case in self._cases.values()
                if case.submitted_at > at and case.accepted_at is not None
            ),
            default=None,
        )

    def heard(self, client: str, source: str, payload: bytes, *, at: int) -> None:
        """Take an event that arrived on a client's reply topic.

        Args:
            client: Who got it.
            source: Last level of the topic: who sent it.
            payload: The event.
            at: When, milliseconds by the caller's clock.
        """
        try:
            event = json.loads(payload)
            kind, task = event["event"], event["task"]
        except (ValueError, KeyError, TypeError):
            self._blame("malformed", client, "", f"no event: {payload[:200]!r}", at)
            return
        case = self._cases.get((client, task))
        if case is None:
            return
        if case.refused and kind != "error":
            self._reopen(case)
        if kind == "accepted":
            case.routers.add(source)
            case.accepted_at = case.accepted_at or at
        elif kind == "routed":
            case.routers.add(source)
            self._hear_route(case, event["attempt"], event["node"])
        elif kind == "chunk" or kind in _ENDS:
            stale = source not in case.routers and event.get("attempt", 1) < case.attempt
            if stale:
                self._stale += 1
            elif kind == "chunk":
                self._hear_chunk(case, event, at)
            else:
                self._hear_end(case, event, at)

    def verdict(self, *, at: int) -> Verdict:
        """Judge everything.

        Args:
            at: Now, milliseconds by the caller's clock.
        """
        for case in self._cases.values():
            self._look_at(case, at)
        ended = [case for case in self._cases.values() if case.end is not None]
        finished = [case for case in ended if case.end and case.end["event"] == "result"]
        failed = Counter(case.end["code"] for case in ended if case.end and "code" in case.end)
        moved = [case for case in self._cases.values() if len({n for n, _ in case.routed}) > 1]
        return Verdict(
            submitted=len(self._cases),
            accepted=sum(case.accepted_at is not None for case in self._cases.values()),
            finished=len(finished),
            failed=dict(sorted(failed.items())),
            breaches=tuple(self._breaches),
            repeated=self._repeated,
            stale=self._stale,
            moved=len(moved),
            gaps_ms=tuple(sorted(gap for case in moved for gap in case.gaps_ms)),
            accepted_ms=tuple(
                sorted(
                    case.accepted_at - case.submitted_at
                    for case in self._cases.values()
                    if case.accepted_at is not None
                )
            ),
            answer_ms=tuple(sorted(_took(case) for case in finished)),
        )

    def _reopen(self, case: _Case) -> None:
        """The client had sent a refused task again, and it was taken."""
        case.end = case.ended_at = None
        self._open[case.ask.client, case.ask.task] = None

    # ---- one event

    def _hear_route(self, case: _Case, attempt: int, node: str) -> None:
        if attempt > case.attempt and case.routed and case.routed[-1][1] != node:
            case.left_at = case.last_at
        case.routed.append((attempt, node))
        case.attempt = max(case.attempt, attempt)

    def _hear_chunk(self, case: _Case, event: dict[str, Any], at: int) -> None:
        seq, attempt, data = event["seq"], event["attempt"], event["data"]
        if seq in case.chunks:
            self._repeated += 1
            if case.chunks[seq] == "" and data != "":
                case.chunks[seq] = data  # the replay had only a stand-in for it
            elif data not in ("", case.chunks[seq]):
                self._breach("doubled", case, f"number {seq} has two contents", at)
            return
        if case.end is not None and seq >= case.end["seq"]:
            self._breach("doubled", case, f"chunk {seq} after the end {case.end['seq']}", at)
            return
        case.attempt = max(case.attempt, attempt)
        case.chunks[seq] = data
        if case.end is not None and not _lacks(case):
            self._lacking.pop((case.ask.client, case.ask.task), None)
        _go_on(case, at)
        case.last_at = at
        pieces = case.ask.pieces
        known = pieces is not None and data != "" and not isinstance(data, str)
        if known and pieces is not None and (seq >= len(pieces) or pieces[seq] != data):
            self._breach("wrong", case, f"chunk {seq} is {json.dumps(data)[:100]}", at)

    def _hear_end(self, case: _Case, event: dict[str, Any], at: int) -> None:
        if case.refused and _gist(event) != _gist(case.end or {}):
            self._reopen(case)
        if case.end is not None:
            self._repeated += 1
            if _gist(event) != _gist(case.end):
                said = f"{_words(case.end)}, then {_words(event)}"
                self._breach("doubled", case, f"two ends: {said}", at)
            return
        case.attempt = max(case.attempt, event.get("attempt", 1))
        case.end, case.ended_at = event, at
        self._open.pop((case.ask.client, case.ask.task), None)
        if _lacks(case):
            self._lacking[case.ask.client, case.ask.task] = None
        if event["event"] == "result":
            _go_on(case, at)
        beyond = [seq for seq in case.chunks if seq >= event["seq"]]
        if beyond:
            self._breach("doubled", case, f"the end {event['seq']} after chunk {max(beyond)}", at)
        known = event["event"] == "result" and case.ask.output is not None
        if known and event["output"] != case.ask.output:
            said = json.dumps(event["output"])[:100]
            self._breach("wrong", case, f"the output is {said}", at)

    def _look_at(self, case: _Case, at: int) -> None:
        """Judge a task as a whole."""
        if case.end is None:
            kind: Kind = "lost" if case.accepted_at is not None else "unanswered"
            begun = case.accepted_at or case.submitted_at
            if at > begun + case.ask.timeout_ms + self._grace_ms:
                self._breach(kind, case, f"no end after {at - case.submitted_at} ms", at)
            return
        if _lacks(case):
            seen, end = case.next_seq, case.end["seq"]
            self._breach("gap", case, f"number {seen} is missing before the end {end}", at)
            return
        self._check_text(case, at)

    def _check_text(self, case: _Case, at: int) -> None:
        """Hold the text that was shown against the text there is."""
        pieces, shown = case.ask.pieces, [case.chunks[seq] for seq in sorted(case.chunks)]
        if pieces is None or not shown or "" in shown or not isinstance(shown[0], str):
            return
        text, whole = "".join(shown), "".join(pieces)
        complete = case.end is not None and case.end["event"] == "result"
        if text != whole if complete else not whole.startswith(text):
            self._breach("wrong", case, f"the text shown is {text[:100]!r}", at)

    def _breach(self, kind: Kind, case: _Case, what: str, at: int) -> None:
        self._blame(kind, case.ask.client, case.ask.task, what, at)

    def _blame(self, kind: Kind, client: str, task: str, what: str, at: int) -> None:
        if (kind, client, task) in self._blamed:
            return
        self._blamed.add((kind, client, task))
        self._breaches.append(Breach(kind, client, task, what, at))


def _lacks(case: _Case) -> bool:
    return case.end is not None and case.next_seq < case.end["seq"]


def _go_on(case: _Case, at: int) -> None:
    """Note how long the client waited, if this is the first word of another node."""
    if case.left_at is not None:
        case.gaps_ms.append(at - case.left_at)
        case.left_at = None


def _took(case: _Case) -> int:
    return (case.ended_at or 0) - case.submitted_at


def _gist(event: dict[str, Any]) -> tuple[Any, ...]:
    """Return what makes an end this end, and no other."""
    return event.get("event"), event.get("seq"), event.get("code"), event.get("output")


def _words(event: dict[str, Any]) -> str:
    what = event.get("code") or "result"
    return f"{what} (number {event['seq']}, attempt {event.get('attempt', 1)})"


def percentile(values: Iterable[int], share: float) -> int | None:
    """Return a percentile of some figures by the nearest rank; None where there are none.

    Args:
        values: The figures.
        share: 0.5 for the median, 0.99 for the 99th percentile.
    """
    ordered = sorted(values)
    if not ordered:
        return None
    return ordered[min(len(ordered) - 1, max(0, round(share * len(ordered)) - 1))]
