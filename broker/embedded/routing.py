"""Which sessions get a message: a tree of subscriptions with a memory of recent topics."""

from collections import OrderedDict
from typing import Final

from capability_schemas.errors import InvalidTopic

_MEMORY_LIMIT: Final = 8192
_MAX_TOPIC_BYTES: Final = 65_535
_MAX_LEVELS: Final = 32  # bounds the depth of the tree; the mesh uses 8


class _Branch:
    __slots__ = ("branches", "held")

    def __init__(self) -> None:
        self.branches: dict[str, _Branch] = {}
        self.held: dict[str, int] = {}


def check_filter(topic_filter: str) -> None:
    """Check the form of a subscription filter (MQTT 3.1.1 section 4.7.1).

    Raises:
        InvalidTopic: It is empty, too long or deep, holds NUL, or a wildcard is not a whole level.
    """
    levels = topic_filter.split("/")
    misplaced = any(len(level) > 1 and ("+" in level or "#" in level) for level in levels)
    if (
        not topic_filter
        or len(topic_filter.encode()) > _MAX_TOPIC_BYTES
        or "\0" in topic_filter
        or misplaced
        or "#" in levels[:-1]
        or len(levels) > _MAX_LEVELS
    ):
        raise InvalidTopic(f"{topic_filter[:200]!r} is not a subscription filter")


def check_topic(topic: str) -> None:
    """Check a topic that a client publishes to (MQTT 3.1.1 sections 3.3.2.1 and 4.7.2).

    Raises:
        InvalidTopic: It is empty, holds a wildcard or NUL, or belongs to the broker (``$``).
    """
    if not topic or topic[0] == "$" or "+" in topic or "#" in topic or "\0" in topic:
        raise InvalidTopic(f"{topic[:200]!r} is not a topic a client may publish to")


class SubscriptionTree:
    """Filters of many sessions, matched level by level.

    Overlapping filters of one session count once, with the highest quality of service (MQTT 3.1.1
    section 3.3.5 allows it). Owned by one loop; not thread-safe.
    """

    def __init__(self) -> None:
        self._root = _Branch()
        self._filters: dict[str, dict[str, int]] = {}
        self._memory: OrderedDict[str, tuple[tuple[str, int], ...]] = OrderedDict()

    def add(self, session: str, topic_filter: str, qos: int) -> None:
        """Subscribe a session; the same filter again replaces its quality of service.

        Raises:
            InvalidTopic: The filter is malformed.
        """
        check_filter(topic_filter)
        branch = self._root
        for level in topic_filter.split("/"):
            branch = branch.branches.setdefault(level, _Branch())
        branch.held[session] = qos
        self._filters.setdefault(session, {})[topic_filter] = qos
        self._memory.clear()

    def remove(self, session: str, topic_filter: str) -> None:
        """Unsubscribe a session; nothing happens when it had not subscribed."""
        held = self._filters.get(session)
        if held is None or held.pop(topic_filter, None) is None:
            return
        if not held:
            del self._filters[session]
        self._prune(topic_filter.split("/"), session)
        self._memory.clear()

    def remove_session(self, session: str) -> None:
        """Unsubscribe a session from everything."""
        for topic_filter in list(self._filters.get(session, ())):
            self.remove(session, topic_filter)

    def filters(self, session: str) -> dict[str, int]:
        """Return the filters of a session with their quality of service; a copy."""
        return dict(self._filters.get(session, ()))

    def count(self, session: str) -> int:
        """Return how many filters a session holds."""
        return len(self._filters.get(session, ()))

    def match(self, topic: str) -> tuple[tuple[str, int], ...]:
        """Return the sessions that get a message on ``topic``, with their quality of service."""
        found = self._memory.get(topic)
        if found is not None:
            return found
        best: dict[str, int] = {}
        _collect(self._root, topic.split("/"), 0, best, wild=not topic.startswith("$"))
        found = tuple(best.items())
        if len(self._memory) >= _MEMORY_LIMIT:
            self._memory.popitem(last=False)
        self._memory[topic] = found
        return found

    def _prune(self, levels: list[str], session: str) -> None:
        trail = [self._root]
        for level in levels:
            trail.append(trail[-1].branches[level])
        trail[-1].held.pop(session, None)
        for level, parent, child in zip(
            reversed(levels), reversed(trail[:-1]), reversed(trail[1:]), strict=True
        ):
            if child.held or child.branches:
                return
            del parent.branches[level]


def _collect(
    branch: _Branch, levels: list[str], depth: int, best: dict[str, int], *, wild: bool
) -> None:
    """Gather the holders below ``branch``; ``wild`` is false at the first level of ``$`` topics."""
    rest = branch.branches.get("#") if wild else None
    if rest is not None:
        _take(rest, best)
    if depth == len(levels):
        _take(branch, best)
        return
    level = levels[depth]
    for key in (level, "+") if wild else (level,):
        child = branch.branches.get(key)
        if child is not None:
            _collect(child, levels, depth + 1, best, wild=True)


def _take(branch: _Branch, best: dict[str, int]) -> None:
    for session, qos in branch.held.items():
        if qos > best.get(session, -1):
            best[session] = qos
