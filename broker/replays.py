"""Says again what clients have missed, a little at a time."""

import asyncio
from collections.abc import Iterator
from typing import Final

import structlog

from broker.session.base import Session
from capability_schemas.errors import FoamError

__all__ = ["Replays"]

_AT_ONCE: Final = 64
_PAUSE_S: Final = 0.01
"""Between two turns, seconds: at most 6,400 events a second go out for all clients together."""

_CROWDED: Final = 128
"""Unconfirmed messages of the session at which repetitions wait; streams go on to 256."""

_MOST_OF_ONE: Final = 64
_MOST_CLIENTS: Final = 1_024

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class Replays:
    """Publishes repetitions in turns, each client in its turn. Owned by one event loop.

    A repetition may have thousands of events, and costs whoever asks for it one message: at once
    they would fill the outbox, and those for whom there is something new would be refused.

    Args:
        session: Carries them.
    """

    def __init__(self, *, session: Session) -> None:
        self._session = session
        self._clients: dict[str, dict[str, tuple[str, Iterator[bytes]]]] = {}
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, key: tuple[str, str], topic: str, events: Iterator[bytes]) -> bool:
        """Say events again, the first 64 at once if nobody waits.

        Args:
            key: Client and task.
            topic: Where they go.
            events: Made one by one, as they go out.

        Returns:
            Whether that was taken: not while the same task is being repeated, nor beyond 64 of a
            client. Clients ask again.
        """
        client, task = key
        waiting = self._clients.get(client, {})
        full = len(waiting) >= _MOST_OF_ONE or len(self._clients) >= _MOST_CLIENTS
        if task in waiting or full:
            return False
        waiting[task] = topic, events
        self._clients[client] = waiting
        if self._timer is None:
            self._turn()
        return True

    def stop(self) -> None:
        """Say no more."""
        self._clients.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _turn(self) -> None:
        self._timer = None
        client, waiting = next(iter(self._clients.items()))
        task, (topic, events) = next(iter(waiting.items()))
        if self._post(topic, events):
            del waiting[task]
        del self._clients[client]
        if waiting:  # behind the others
            self._clients[client] = waiting
        if self._clients:
            self._timer = asyncio.get_running_loop().call_later(_PAUSE_S, self._turn)

    def _post(self, topic: str, events: Iterator[bytes]) -> bool:
        """Say the next ones; true when none is left, or the session takes none."""
        try:
            for _ in range(_AT_ONCE):
                if self._session.outbox_size >= _CROWDED:
                    return False
                payload = next(events, None)
                if payload is None:
                    return True
                self._session.post(topic, payload)
        except FoamError as error:  # the client asks again
            _log.warning("replay.dropped", topic=topic, error=error.message)
            return True
        return False
