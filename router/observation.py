"""Reading the reply topics cheaply: one JSON parse per chunk, no model.

The router sees every chunk of every stream, so this is its hottest path. Its own events come back
to it too and are told apart by the topic alone.
"""

import json
from dataclasses import dataclass
from typing import Any, Final

from capability_schemas.ids import is_identifier
from capability_schemas.reply import ENDS_HERE
from router.events import Observed
from router.ownership import Claim
from router.shadow import Route

_MAX_CODE: Final = 64
_MAX_COUNT: Final = 2**53
_WATCHED: Final = frozenset({"working", "chunk", "result", "error"})
_WORDS: Final = frozenset({"accepted", "routed"})


@dataclass(frozen=True, slots=True)
class Observation:
    """What a node told a client.

    Attributes:
        client: Whose reply topic it is.
        task_id: Task named in the payload; with ``reply_to`` the topic names another level.
        event: The event for the machine of the task.
        reply: Reply topic without its last level.
    """

    client: str
    task_id: str
    event: Observed
    reply: str = ""

    @property
    def key(self) -> tuple[str, str]:
        """``(client, task id)``."""
        return self.client, self.task_id


@dataclass(frozen=True, slots=True)
class RouterWord:
    """What a router told a client.

    Attributes:
        key: ``(client, task id)``.
        reply: Reply topic without its last level.
        router: Who said it.
        claim: That it has the task (``accepted``), until when at the latest.
        deadline: With a claim, UTC milliseconds.
        route: Who it asked (``routed``).
    """

    key: tuple[str, str]
    reply: str
    router: str
    claim: Claim | None = None
    deadline: int = 0
    route: Route | None = None


class ReplyReader:
    """Takes messages of ``reply/{client}/{task}/{source}`` apart.

    Args:
        root: Topic prefix and site.
        router_id: This router, of whose own events only ``routed`` is read, and ``accepted`` of a
            task taken over: that they have come back says that everything before them has.
        limit_bytes: Larger payloads are not read.
    """

    def __init__(self, *, root: str, router_id: str, limit_bytes: int) -> None:
        self._skip = len(root) + len("/reply/")
        self._own = "/" + router_id
        self._limit_bytes = limit_bytes

    def read(self, topic: str, payload: bytes) -> Observation | RouterWord | None:
        """Read one message.

        Args:
            topic: A topic that matches ``reply/+/+/+`` of the site.
            payload: Its bytes.

        Returns:
            None when it is no event of a running task, or the router's own but for those.
        """
        if len(payload) > self._limit_bytes:
            return None
        if topic.endswith(self._own) and not _is_fence(payload):
            return None
        client, _, rest = topic[self._skip :].partition("/")
        source = rest.rpartition("/")[2]
        try:
            fields = json.loads(payload)
        except (ValueError, RecursionError):
            return None
        if not isinstance(fields, dict) or fields.get("v", 1) != 1:
            return None
        task_id, kind = str(fields.get("task")), fields.get("event")
        if not isinstance(kind, str) or not is_identifier(fields.get("task")):
            return None
        reply = topic.rpartition("/")[0]
        if kind in _WORDS:
            return _word((client, task_id), reply, source, kind, fields)
        if kind not in _WATCHED or source == self._own[1:]:
            return None
        observed = _observed(source, kind, fields, payload)
        return None if observed is None else Observation(client, task_id, observed, reply)


def _is_fence(payload: bytes) -> bool:
    """Tell whether an event of our own says by its return that all before it has been heard."""
    return b'"routed"' in payload or (b'"accepted"' in payload and b'"attempt"' in payload)


def _word(
    key: tuple[str, str], reply: str, router: str, kind: str, fields: dict[str, Any]
) -> RouterWord | None:
    attempt = fields.get("attempt", 1)
    if not _is_count(attempt, 1):
        return None
    if kind == "accepted":
        deadline = fields.get("deadline")
        if fields.get("router") != router or not _is_count(deadline, 0):
            return None
        claim = Claim(router, attempt)
        return RouterWord(key, reply, router, claim=claim, deadline=int(deadline or 0))
    node, function, version = (str(fields.get(name)) for name in ("node", "function", "version"))
    if not (is_identifier(node) and is_identifier(function)):
        return None
    last = fields.get("reason") == ENDS_HERE
    route = Route(node, function, version[:64], attempt, last=last)
    return RouterWord(key, reply, router, route=route)


def _observed(source: str, kind: Any, fields: dict[str, Any], payload: bytes) -> Observed | None:
    seq, attempt = fields.get("seq"), fields.get("attempt", 1)
    if kind == "working":
        seq = attempt = None
    elif not _is_count(seq, 0) or not _is_count(attempt, 1):
        return None
    code = fields.get("code") if kind == "error" else None
    if kind == "error" and not (
        isinstance(code, str) and code.isascii() and len(code) <= _MAX_CODE
    ):
        return None
    return Observed(source, kind, seq, attempt, payload, code)


def _is_count(value: Any, least: int) -> bool:
    return type(value) is int and least <= value <= _MAX_COUNT
