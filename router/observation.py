"""Reading the reply topics cheaply: one JSON parse per chunk, no model.

The router sees every chunk of every stream, so this is its hottest path. Its own events come back
to it too and are told apart by the topic alone.
"""

import json
from dataclasses import dataclass
from typing import Any, Final

from router.events import Observed

_MAX_CODE: Final = 64
_MAX_COUNT: Final = 2**53
_WATCHED: Final = frozenset({"working", "chunk", "result", "error"})


@dataclass(frozen=True, slots=True)
class Observation:
    """What a node told a client.

    Attributes:
        client: Whose reply topic it is.
        task_id: Task named in the payload; with ``reply_to`` the topic names another level.
        event: The event for the machine of the task.
    """

    client: str
    task_id: str
    event: Observed


class ReplyReader:
    """Takes messages of ``reply/{client}/{task}/{source}`` apart.

    Args:
        root: Topic prefix and site.
        router_id: This router, whose own events are skipped unread.
        limit_bytes: Larger payloads are not read.
    """

    def __init__(self, *, root: str, router_id: str, limit_bytes: int) -> None:
        self._skip = len(root) + len("/reply/")
        self._own = "/" + router_id
        self._limit_bytes = limit_bytes

    def read(self, topic: str, payload: bytes) -> Observation | None:
        """Read one message.

        Args:
            topic: A topic that matches ``reply/+/+/+`` of the site.
            payload: Its bytes.

        Returns:
            None when it is the router's own or no event of a running task.
        """
        if topic.endswith(self._own) or len(payload) > self._limit_bytes:
            return None
        client, _, rest = topic[self._skip :].partition("/")
        source = rest.rpartition("/")[2]
        try:
            fields = json.loads(payload)
        except (ValueError, RecursionError):
            return None
        if not isinstance(fields, dict) or fields.get("v", 1) != 1:
            return None
        task_id, kind = fields.get("task"), fields.get("event")
        if not isinstance(kind, str) or kind not in _WATCHED or not isinstance(task_id, str):
            return None
        return _observation(client, task_id, source, kind, fields, payload)


def _observation(
    client: str, task_id: str, source: str, kind: Any, fields: dict[str, Any], payload: bytes
) -> Observation | None:
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
    return Observation(client, task_id, Observed(source, kind, seq, attempt, payload, code))


def _is_count(value: Any, least: int) -> bool:
    return type(value) is int and least <= value <= _MAX_COUNT
