"""Which routers are there, as clients and nodes see it: by what the routers say of themselves."""

import asyncio
import contextlib
from typing import TYPE_CHECKING, Final

from broker.session.base import Message, Session, Subscription
from capability_schemas.errors import AccessDenied, ProtocolError
from capability_schemas.node import RouterState
from capability_schemas.topics import TopicKind, Topics
from capability_schemas.wire import decode

if TYPE_CHECKING:
    from collections.abc import Callable

_QUIET_S: Final = 0.25
_SETTLING_S: Final = 1.0
"""How long after a (re)connection nothing is concluded from what was not heard, seconds."""

_MISSED: Final = 3
_LIMIT_BYTES: Final = 64 * 1024
_MOST_ROUTERS: Final = 1_024


class RouterPresence:
    """Follows ``router/+/state``. Owned by the event loop it listens on.

    A router lives from its birth until it, or its last will, says otherwise, or so many heartbeats
    were missed. Time is the loop's, so that a clock which is set means nothing.

    Args:
        session: Whose connection it hears them over.
        topics: Topic grammar of the site.
    """

    def __init__(self, *, session: Session, topics: Topics) -> None:
        self._session = session
        self._topics = topics
        self._states: dict[str, tuple[RouterState, float]] = {}
        self._heard = asyncio.Event()
        self._subscription: Subscription | None = None
        self._forget: Callable[[], None] | None = None
        self._listening_since = 0.0

    async def listen(self) -> bool:
        """Begin to listen; idempotent.

        Returns:
            Whether this member may: one of a foreign broker may not be allowed to, and then knows
            nothing of routers.

        Raises:
            BrokerUnavailable: The session has ended.
        """
        if self._subscription is None:
            self._listening_since = asyncio.get_running_loop().time()
            with contextlib.suppress(AccessDenied):
                # QoS 0 does for what is repeated every few seconds, and costs no consumer on NATS.
                self._subscription = await self._session.subscribe(
                    self._topics.filter(TopicKind.ROUTER_STATE), self._on_state, qos=0
                )
                self._forget = self._session.on_connection(self._on_connection)
        return self._subscription is not None

    def stop(self) -> None:
        """Conclude nothing any more; the subscription ends with the session."""
        if self._forget is not None:
            self._forget()
            self._forget = None

    async def live(self, *, preferred: str | None = None, wait_s: float = 2.0) -> list[str]:
        """Return the routers that pass for alive.

        Args:
            preferred: Comes first, if it is one of them.
            wait_s: How long to listen, the first time, until nothing new is heard, seconds.

        Returns:
            Their ids; empty also where this member may not read the states.

        Raises:
            BrokerUnavailable: The session has ended.
        """
        if await self.listen() and not self._living():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._quiet(wait_s)
        return sorted(sorted(self._living()), key=lambda router: router != preferred)

    def present(self) -> str | None:
        """Return a router that lives, the first by name; None when there is none."""
        return min(self._living(), default=None)

    def states(self) -> list[tuple[RouterState, bool]]:
        """Return what each router said last, by id, and whether it passes for alive."""
        now = asyncio.get_running_loop().time()
        return [
            (state, self._is_live(name, now)) for name, (state, _) in sorted(self._states.items())
        ]

    def names(self) -> list[str]:
        """Return the ids of all routers that were heard of, living or not."""
        return sorted(self._states)

    def told(self) -> str:
        """Return what became of each router that was heard of, in words."""
        return ", ".join(
            f"{state.router} is {'silent' if state.state == 'birth' and not live else state.state}"
            for state, live in self.states()
        )

    @property
    def absent(self) -> bool:
        """Whether it is certain, as far as this member can tell, that no router lives."""
        if self._subscription is None or not self._session.connected or self._living():
            return False
        return asyncio.get_running_loop().time() - self._listening_since >= _SETTLING_S

    @property
    def bereft(self) -> bool:
        """Whether routers were heard of, and all of them are gone as far as is known."""
        return bool(self._states) and self._session.connected and not self._living()

    @property
    def forbids(self) -> str | None:
        """The router that let nobody past it, be it gone itself; None when none said so."""
        barring = (name for name, (state, _) in self._states.items() if not state.direct)
        return min(barring, default=None)

    async def hear(self, timeout_s: float) -> None:
        """Wait until any state has been heard; cancellation is safe.

        Args:
            timeout_s: Longest wait, seconds, from when listening began: later calls do not wait.
        """
        left_s = self._listening_since + timeout_s - asyncio.get_running_loop().time()
        if self._subscription is None or self._states or left_s <= 0:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(left_s):
                while not self._states:
                    self._heard.clear()
                    await self._heard.wait()

    async def wait_live(self, timeout_s: float) -> bool:
        """Wait until a router lives; cancellation is safe.

        Args:
            timeout_s: Longest wait, seconds.

        Returns:
            Whether one does.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, timeout_s)):
                while not self._living():
                    self._heard.clear()
                    await self._heard.wait()
        return bool(self._living())

    async def _quiet(self, wait_s: float) -> None:
        """Wait until somebody was heard, and then nobody new for a moment."""
        while not self._living():
            self._heard.clear()
            try:
                async with asyncio.timeout(_QUIET_S if self._states else wait_s):
                    await self._heard.wait()
            except TimeoutError:
                return

    def _living(self) -> list[str]:
        now = asyncio.get_running_loop().time()
        return [name for name in self._states if self._is_live(name, now)]

    def _is_live(self, router: str, now: float) -> bool:
        state, heard_at = self._states[router]
        if state.state != "birth":
            return False
        # A kept birth says little: its will may have been lost. Heartbeats tell, once they are due.
        return state.heartbeat_s is None or now - heard_at < _MISSED * state.heartbeat_s

    def _on_connection(self, up: bool) -> None:
        if not up:
            return
        now = asyncio.get_running_loop().time()
        self._listening_since = now  # it was the listener who heard nobody
        self._states = {name: (state, now) for name, (state, _) in self._states.items()}

    async def _on_state(self, message: Message) -> None:
        try:
            router = self._topics.parse(message.topic).levels["router"]
            if not message.payload:
                self._states.pop(router, None)
                self._heard.set()
                return
            state = decode(RouterState, message.payload, limit_bytes=_LIMIT_BYTES)
        except ProtocolError:
            return
        known = self._states.get(router)
        if state.router != router or (known is None and len(self._states) >= _MOST_ROUTERS):
            return
        if known is None or self._is_news(state, known[0], kept=message.retain):
            if known is not None and known[0].epoch == state.epoch and not known[0].direct:
                # Its will was made when it connected: what it has said since counts more.
                state = state.model_copy(update={"direct": False})
            self._states[router] = state, asyncio.get_running_loop().time()
            self._heard.set()

    def _is_news(self, state: RouterState, known: RouterState, *, kept: bool) -> bool:
        """Tell whether a state says more than the last one.

        The will of an earlier start does not, nor that of a start that was refused its place, nor
        the kept copy of what was heard already.
        """
        if known.unborn != state.unborn and state.epoch != known.epoch:
            return known.unborn
        if state.epoch < known.epoch:
            return False
        return not (kept and (state.state, state.at) == (known.state, known.at))
