"""Which registries are there, and which one leads, as a client sees it that may hear of them."""

import asyncio
import contextlib
from typing import Final

from broker.session.base import Message, Session, Subscription
from capability_schemas.errors import AccessDenied, ProtocolError
from capability_schemas.node import RegistryState
from capability_schemas.topics import TopicKind, Topics
from capability_schemas.wire import decode

__all__ = ["RegistryWatch"]

_LIMIT_BYTES: Final = 64 * 1024
_MOST: Final = 256


class RegistryWatch:
    """Follows ``registry/+/state``. Owned by the client's event loop.

    Args:
        session: The client's connection.
        topics: Topic grammar of the site.
    """

    def __init__(self, *, session: Session, topics: Topics) -> None:
        self._session = session
        self._topics = topics
        self._kept: dict[str, RegistryState] = {}
        self._live: dict[str, RegistryState] = {}
        self._heard = asyncio.Event()
        self._subscription: Subscription | None = None

    async def leader(self, *, wait_s: float = 3.0) -> str | None:
        """Return the registry that leads now; None where none says so.

        What the broker has kept may be old: a leader repeats itself several times a second.

        Args:
            wait_s: How long to listen, seconds.
        """
        self._live.clear()
        with contextlib.suppress(TimeoutError, AccessDenied):
            await self._listen()
            async with asyncio.timeout(wait_s):
                while not any(state.leads for state in self._live.values()):
                    self._heard.clear()
                    await self._heard.wait()
        leading = [
            (-state.term, name)
            for name, state in (self._live or self._kept).items()
            if state.leads and state.state == "birth"
        ]
        return min(leading)[1] if leading else None

    async def states(self, *, wait_s: float = 1.5) -> list[RegistryState]:
        """Return what the registries say of themselves, by id; ``reason`` tells who is silent.

        Args:
            wait_s: How long to listen, seconds; all that run are heard several times in that time.
        """
        self._live.clear()
        with contextlib.suppress(AccessDenied):
            await self._listen()
            await asyncio.sleep(wait_s)
        known = {**self._kept, **self._live}
        return [
            state
            if name in self._live or state.state != "birth"
            else state.model_copy(update={"leads": False, "reason": "silent"})
            for name, state in sorted(known.items())
        ]

    async def names(self, *, until: str, wait_s: float = 1.0) -> list[str]:
        """Return who has ever been a registry here, as far as the broker knows.

        Args:
            until: Listen no longer once this one was heard of.
            wait_s: How long to listen, seconds.
        """
        with contextlib.suppress(TimeoutError, AccessDenied):
            await self._listen()
            async with asyncio.timeout(wait_s):
                while until not in self._kept:
                    self._heard.clear()
                    await self._heard.wait()
        return sorted(self._kept)

    async def _listen(self) -> None:
        if self._subscription is None:
            self._subscription = await self._session.subscribe(
                self._topics.filter(TopicKind.REGISTRY_STATE), self._on_state
            )

    async def _on_state(self, message: Message) -> None:
        try:
            registry = self._topics.parse(message.topic).levels["registry"]
            if not message.payload:
                self._kept.pop(registry, None)
                return
            state: RegistryState = decode(RegistryState, message.payload, limit_bytes=_LIMIT_BYTES)
        except ProtocolError:
            return
        if state.registry != registry or (registry not in self._kept and len(self._kept) >= _MOST):
            return
        self._kept[registry] = state
        if not message.retain:
            self._live[registry] = state
        self._heard.set()
