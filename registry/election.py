"""Which of several registries leads: a lease on the word of the broker alone. Pure.

Each registry says on a topic of its own whether it leads, and in which *term*. Nobody counts votes,
and no broker feature is needed beyond delivery in the order in which the broker took the messages:

* A leader repeats its word. Its lease runs from the moment it *sent* a word that has come back to
  it; when the lease is over it has fenced itself, whatever its connection does.
* When a leader was silent for the length of a lease, said goodbye, or lost its connection, another
  registry claims the next term. What the old one said before the claim arrives before the claim's
  own echo, so that the claimant knows the youngest word that can have renewed the old lease, and
  waits until that is over on the old one's clock: the lease, and what clocks may differ in speed.
  It repeats its claim meanwhile, should one be lost on the way to somebody.
* Whoever hears of a higher term yields at once and says so, which ends the wait. What an old leader
  sent after the claim it hears of behind the claim; so nothing that was sent then renews a lease.

Of two claims the higher term counts, and in one term the registry whose id sorts first. Times are
durations of one's own monotonic clock; no two clocks are compared. After Gray and Cheriton,
"Leases: an efficient fault-tolerant mechanism for distributed file cache consistency" (SOSP 1989);
the claim and its echo stand in for the atomic register of Fischer's mutual exclusion (Lamport,
"A fast mutual exclusion algorithm", ACM TOCS 5(1), 1987).
"""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

DRIFT: Final = 0.05
"""How much faster one monotonic clock may run than another, as a share; crystals: 0.01 %."""

_BEATS: Final = 5
"""Words in one lease: so many less one may be lost in a row."""

_OUTSTANDING: Final = 64
_REPEATED: Final = 4
"""Times that a claim is repeated for those who have not answered: so many less one may be lost."""

_DEAF: Final = 2.0
"""Leases without an echo after which a leader gives way."""

_PAUSE: Final = 0.5
"""Share of a lease without a look at the clock after which it was oneself who was away."""


class Mode(StrEnum):
    """What a registry is after."""

    FOLLOWING = "following"
    CLAIMING = "claiming"
    LEADING = "leading"


@dataclass(frozen=True, slots=True)
class Word:
    """What a registry says of itself.

    Attributes:
        registry: Who says so.
        term: Of its claim; of a follower, the highest term it has heard of.
        epoch: Start of its process.
        beat: Counts its words.
        leads: Whether it leads or claims to; False also lets go of what it held.
        leaves: Whether it is the last one of its process.
    """

    registry: str
    term: int
    epoch: int
    beat: int
    leads: bool
    leaves: bool = False

    @property
    def order(self) -> tuple[int, int, int]:
        """Of two words of one registry the later one is greater, also after its clock was set."""
        return self.term, self.epoch, self.beat


@dataclass(slots=True)
class Other:
    """What is known of another registry.

    Attributes:
        word: Its latest; None before it was heard.
        heard_at: When, on the own clock.
        holds_until: When any lease of it is surely over, on the own clock.
        gone: Whether its connection was lost, or it said goodbye.
        left: Whether it said goodbye while we were listening, and nothing since.
    """

    word: Word | None = None
    heard_at: float = 0.0
    holds_until: float = 0.0
    gone: bool = False
    left: bool = False

    @property
    def leads(self) -> bool:
        """Whether it said last that it leads."""
        return self.word is not None and self.word.leads and not self.gone

    def knows(self, term: int) -> bool:
        """Whether it has let go of what it held, having heard of a term, or having left."""
        if self.left:
            return True
        return self.word is not None and self.word.term >= term and not self.word.leads


class Election:
    """One registry's part. Owned by one event loop; times are milliseconds of a monotonic clock.

    Args:
        own: Its id.
        epoch: Start of its process, UTC milliseconds: tells its words from those of earlier ones.
        lease_ms: Length of a lease; the same for all registries of a site.
        others: Further registries that are known to exist.
    """

    def __init__(
        self, *, own: str, epoch: int, lease_ms: float, others: Iterable[str] = ()
    ) -> None:
        self.own = own
        self.lease_ms = lease_ms
        self.mode = Mode.FOLLOWING
        self.term = 0
        """Highest term heard of, the own one included."""
        self._epoch = epoch
        self._others: dict[str, Other] = {name: Other() for name in others if name != own}
        self._beat = 0
        self._sent: OrderedDict[int, tuple[float, int]] = OrderedDict()
        self._connected = False
        self._hears = False
        self._confirmed = False
        self._confirmed_at = 0.0
        self._holds_until = 0.0
        self._spoke_at: float | None = None
        self._heard_at = 0.0
        self._looked_at: float | None = None
        self._vacant_since: float | None = None

    @property
    def beat_ms(self) -> float:
        """How often a word is repeated."""
        return self.lease_ms / _BEATS

    @property
    def wait_ms(self) -> float:
        """How long a lease of another one lasts at most, on the own clock."""
        return self.lease_ms * (1 + DRIFT)

    @property
    def alone(self) -> bool:
        """Whether no other registry is known of."""
        return not self._others

    @property
    def others(self) -> dict[str, Other]:
        """The other registries by id."""
        return self._others

    @property
    def leader(self) -> str | None:
        """Who leads or claims to, as far as is known; the registry itself where it does."""
        found = [
            (other.word.term, name)
            for name, other in self._others.items()
            if other.word is not None and other.leads
        ]
        if self.mode is not Mode.FOLLOWING:
            found.append((self.term, self.own))
        return min(found, key=lambda one: (-one[0], one[1]))[1] if found else None

    def leads(self, now: float) -> bool:
        """Tell whether this registry may write now."""
        return (
            self.mode is Mode.LEADING
            and self._connected
            and self._confirmed
            and now < self._holds_until
        )

    def expect(self, names: Iterable[str], now: float) -> None:
        """Learn that further registries exist, which may lead without having been heard of."""
        for name in names:
            if name != self.own and name not in self._others:
                self._others[name] = Other(holds_until=now + self.wait_ms)

    # ---- the line

    def connect(self, now: float) -> None:
        """The connection is there, and states are subscribed to."""
        self._connected, self._hears, self._confirmed = True, False, False
        self._sent.clear()
        self._spoke_at = None
        for other in self._others.values():
            # Who claimed meanwhile may hold a lease whose words nobody kept.
            other.holds_until = max(other.holds_until, now + self.wait_ms)
            other.heard_at, other.left = now, False

    def disconnect(self) -> None:
        """The connection is lost: nothing is written until a word comes back on the next one."""
        self._connected = self._hears = self._confirmed = False

    # ---- words

    def speak(self, now: float) -> Word:
        """Make the next word; it is sent at once."""
        self._beat += 1
        leads = self.mode is not Mode.FOLLOWING
        self._sent[self._beat] = (now, self.term if leads else 0)
        if len(self._sent) > _OUTSTANDING:
            self._sent.popitem(last=False)
        self._spoke_at = now
        return Word(self.own, self.term, self._epoch, self._beat, leads)

    def leave(self, now: float) -> Word:
        """Make the last word: whatever is held is let go of."""
        self._yield()
        return replace(self.speak(now), leaves=True)

    def hear(self, word: Word, now: float, *, kept: bool = False) -> bool:
        """Take a word.

        Args:
            word: As published.
            now: Time of receipt.
            kept: Whether the broker had kept it: it may be old.

        Returns:
            Whether something has to be said at once.
        """
        if word.registry == self.own:
            return self._hear_own(word, now)
        other = self._others.setdefault(word.registry, Other())
        if other.word is not None and word.order <= other.word.order:
            return False
        other.word, other.heard_at, other.gone = word, now, word.leaves
        other.left = word.leaves and not kept
        if word.leads:
            other.holds_until = now + self.wait_ms
        elif not kept:
            other.holds_until = 0.0
        return self._learn(word)

    def lose(self, registry: str) -> None:
        """Another registry's connection was lost: it may be gone, and its lease has to run out."""
        if (other := self._others.get(registry)) is not None:
            other.gone = True

    def look(self, now: float, *, least_term: int = 1) -> bool:
        """Let time pass; called several times within `beat_ms`.

        Args:
            now: The time.
            least_term: Lowest term to claim: higher than any of before, should all have forgotten.

        Returns:
            Whether to say a word now.
        """
        before, self._looked_at = self._looked_at, now
        if before is not None and now - before > _PAUSE * self.lease_ms:
            self._heard_at = now  # it was us who were away
            for other in self._others.values():
                other.heard_at = now
            self._vacant_since = None
        if not self._connected:
            return False
        if self._hears and now - self._heard_at > _DEAF * self.lease_ms:
            self._hears = False  # others hear us and we hear nobody: they can do better
            if self.mode is not Mode.FOLLOWING:
                self._yield()
                return True
        if self.mode is Mode.FOLLOWING and self._may_claim(now):
            self.mode, self.term = Mode.CLAIMING, max(self.term + 1, least_term)
            self._confirmed, self._vacant_since = False, None
            return True
        self._enter(now)
        return self._spoke_at is None or now - self._spoke_at >= self.beat_ms

    # ---- the rules

    def _hear_own(self, word: Word, now: float) -> bool:
        if word.epoch != self._epoch:
            yielded = self._learn(word)
            if word.epoch > self._epoch:  # an earlier process, by a clock that was ahead
                self._epoch = word.epoch + 1
                self._sent.clear()
                return True
            return yielded
        sent = self._sent.pop(word.beat, None)
        if sent is None:
            return False
        sent_at, term = sent
        self._hears, self._heard_at = True, now
        if self.mode is not Mode.FOLLOWING and term == self.term:
            if not self._confirmed:
                self._confirmed, self._confirmed_at = True, now
            self._holds_until = max(self._holds_until, sent_at + self.lease_ms)
            self._enter(now)
        return False

    def _enter(self, now: float) -> None:
        """Lead, once all know of the claim, or nobody can hold an older lease."""
        if self.mode is not Mode.CLAIMING or not self._confirmed:
            return
        repeated = now - self._confirmed_at >= _REPEATED * self.beat_ms
        if all(
            other.knows(self.term) or (repeated and now >= other.holds_until)
            for other in self._others.values()
        ):
            self.mode = Mode.LEADING

    def _learn(self, word: Word) -> bool:
        """Take the term of a word, and yield if that is over the own one.

        Returns whether to say at once that it is known: the claimant waits for that.
        """
        own, self.term = self.term, max(self.term, word.term)
        if self.mode is Mode.FOLLOWING:
            return word.leads and word.term > own
        if word.term > own or (word.leads and word.term == own and word.registry < self.own):
            self._yield()
            return True
        return False

    def _yield(self) -> None:
        self.mode, self._confirmed, self._holds_until = Mode.FOLLOWING, False, 0.0
        self._vacant_since = None

    def _may_claim(self, now: float) -> bool:
        """Tell whether nobody leads, and it is this registry's turn."""
        if not self._hears or any(
            other.leads and now - other.heard_at <= self.wait_ms for other in self._others.values()
        ):
            self._vacant_since = None
            return False
        if any(other.word is None and now < other.holds_until for other in self._others.values()):
            return False  # it may lead, and just not have been heard
        if self._vacant_since is None:
            self._vacant_since = now
        before = sum(
            name < self.own and not other.gone and now - other.heard_at <= self.wait_ms
            for name, other in self._others.items()
            if other.word is not None
        )
        return now - self._vacant_since >= before * self.beat_ms
