"""The reader's side of PROTOCOL section 3: the events of one task in order, and their text."""

from capability_schemas.reply import (
    Accepted,
    Chunk,
    ErrorEvent,
    Plan,
    ReplyEvent,
    Result,
    Routed,
)


class ReplyOrder:
    """Puts the events of one task into the order in which the client shall see them. Pure.

    Numbered events come out by ``seq`` without gaps; the others as they arrive, repetitions of
    ``accepted`` and ``routed`` left out. Of nodes, an attempt below the highest one seen is
    ignored, be that seen on a numbered event or on ``routed``: the router lets no other node speak
    before that has gone out. The router (whoever sent ``accepted``, ``routed``, ``plan`` or
    ``step``) is exempt: it keeps the record and repeats earlier attempts out of it.
    """

    def __init__(self) -> None:
        self.next_seq = 0
        self.ended = False
        self._attempt = 0
        self._held: dict[int, tuple[Chunk | Result | ErrorEvent, bool]] = {}
        self._seen: set[tuple[str, int]] = set()
        self._routers: set[str] = set()

    @property
    def held(self) -> int:
        """Events that arrived before their turn."""
        return len(self._held)

    def push(self, event: ReplyEvent, source: str) -> list[ReplyEvent]:
        """Take an event as it arrived.

        Args:
            event: The event.
            source: Last level of its topic: who sent it.

        Returns:
            The events whose turn it is now, in order; often none or one.
        """
        if self.ended:
            return []
        if not isinstance(event, Chunk | Result | ErrorEvent):
            return self._push_unnumbered(event, source)
        by_router = source in self._routers
        if not by_router and event.attempt < self._attempt:
            return []
        self._rise(event.attempt)
        if event.seq < self.next_seq:
            return []
        self._held.setdefault(event.seq, (event, by_router))
        return self._release()

    def _rise(self, attempt: int) -> None:
        """Hear lower attempts no more."""
        if attempt <= self._attempt:
            return
        self._attempt = attempt
        self._held = {
            seq: (held, trusted)
            for seq, (held, trusted) in self._held.items()
            if trusted or held.attempt >= attempt
        }

    def _push_unnumbered(self, event: ReplyEvent, source: str) -> list[ReplyEvent]:
        if isinstance(event, Accepted | Routed | Plan):  # a step may be a node's
            self._routers.add(source)
        if isinstance(event, Accepted | Routed):
            key = (event.event, event.attempt if isinstance(event, Routed) else 0)
            if key in self._seen:
                return []
            self._seen.add(key)
        if isinstance(event, Routed):
            self._rise(event.attempt)
        return [event]

    def _release(self) -> list[ReplyEvent]:
        ready: list[ReplyEvent] = []
        while self.next_seq in self._held:
            event, _ = self._held.pop(self.next_seq)
            self.next_seq += 1
            ready.append(event)
            if not isinstance(event, Chunk):
                self.ended = True
                self._held.clear()
        return ready


class AnswerText:
    """Says which text an event adds to what was said before. Pure.

    A router that has missed chunks itself (a broker that was killed forgets what it had for it)
    stands in for them by empty ones, and nodes send no empty text. Behind such a hole nothing more
    is said before the result, which holds the whole text.
    """

    def __init__(self) -> None:
        self._said: list[str] = []
        self._hole = False

    def add(self, event: Chunk | Result) -> str:
        """Return what the next event adds; often all of it, of a result often nothing."""
        text = self._rest(event.output) if isinstance(event, Result) else self._piece(event.data)
        if text:
            self._said.append(text)
        return text

    @property
    def begun(self) -> bool:
        """Whether there was any text."""
        return bool(self._said) or self._hole

    def _piece(self, data: object) -> str:
        if not isinstance(data, str):
            return ""
        self._hole = self._hole or not data
        return "" if self._hole else data

    def _rest(self, output: object) -> str:
        if not isinstance(output, str):
            return ""
        said = "".join(self._said)
        return output.removeprefix(said) if output.startswith(said) else ""
