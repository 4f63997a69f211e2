"""Which routers are there, as a client sees it that may read their states."""

import asyncio
import contextlib
from typing import Final

from broker.session.base import Message, Session, Subscription
from capability_schemas.errors import FoamError, ProtocolError
from capability_schemas.ids import now_ms
from capability_schemas.node import RouterState
from capability_schemas.topics import TopicKind, Topics
from capability_schemas.wire import decode

__all__ = ["RouterWatch"]

_QUIET_S: Final = 0.25
_MISSED: Final = 3


class RouterWatch:
    """Follows ``router/+/state``. Owned by the client's event loop.

    Args:
        session: The client's connection.
        topics: Topic grammar of the site.
    """

    def __init__(self, *, session: Session, topics: Topics) -> None:
        self._session = session
        self._topics = topics
        self._states: dict[str, tuple[RouterState, int]] = {}
        self._heard = asyncio.Event()
        self._subscription: Subscription | None = None

    async def live(self, *, preferred: str | None = None, wait_s: float = 2.0) -> list[str]:
        """Return the routers that pass for alive.

        Args:
            preferred: Comes first, if it is one of them.
            wait_s: How long to listen, the first time, until nothing new is heard, seconds.

        Returns:
            Their ids; empty also where this client may not read the states.
        """
        if self._subscription is None:
            topic_filter = self._topics.filter(TopicKind.ROUTER_STATE)
            with contextlib.suppress(FoamError):
                self._subscription = await self._session.subscribe(topic_filter, self._on_state)
            await self._listen(wait_s)
        now = now_ms()
        found = sorted(router for router in self._states if self._is_live(router, now))
        return sorted(found, key=lambda router: router != preferred)

    async def _listen(self, wait_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                while True:
                    self._heard.clear()
                    async with asyncio.timeout(_QUIET_S if self._states else wait_s):
                        await self._heard.wait()

    def _is_live(self, router: str, now: int) -> bool:
        state, heard_at = self._states[router]
        if state.state != "birth":
            return False
        # A kept birth says little: its will may have been lost. Heartbeats tell, once they are due.
        return state.heartbeat_s is None or now - heard_at < _MISSED * 1000 * state.heartbeat_s

    async def _on_state(self, message: Message) -> None:
        try:
            state = decode(RouterState, message.payload) if message.payload else None
            router = self._topics.parse(message.topic).levels["router"]
        except ProtocolError:
            return
        if state is None:
            self._states.pop(router, None)
        elif state.router == router:
            known = self._states.get(router)
            if known is None or state.epoch >= known[0].epoch:
                self._states[router] = state, now_ms()
        self._heard.set()
