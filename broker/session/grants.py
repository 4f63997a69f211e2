"""What the broker granted of a session's subscriptions, and what it refused.

A cluster of nats-servers without a leader refuses a filter in the same words as one that forbids it
(0x80, MQTT 3.1.1 section 3.9.3). What tells them apart is the same filter with QoS 0, for which it
needs no leader: where that is granted, it is no matter of rights. So a refusal of this kind is
doubted, and that of what was granted before: it ends the connection, and is believed when several
connections in a row say the same. What is refused for good is done without (or with QoS 0), and
asked for again every few seconds: rights may have come, or a leader.
"""

import asyncio
from typing import Final

import structlog

from broker.session.inbox import SubscriptionTable
from broker.session.link import Link
from capability_schemas.errors import BrokerUnavailable

_ASK_AGAIN_S: Final = 5.0
_DOUBTS: Final = 5
_SHARED_DOUBT_S: Final = 6.0
"""A cluster of nats-servers takes some seconds to elect a leader."""

_FIRST_PAUSE_S: Final = 0.5
_PAUSE_CAP_S: Final = 3.0

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class Grants:
    """Subscribes what a table holds, over one link after the other.

    Owned by the event loop of the session.

    Args:
        table: What is wanted.
        client_id: Whose, for the log.
        doubt_s: How long a refusal that is no matter of rights is doubted, seconds.
    """

    def __init__(self, *, table: SubscriptionTable, client_id: str, doubt_s: float) -> None:
        self._table = table
        self._doubt_s = doubt_s
        self._granted: set[str] = set()
        self._refused: set[str] = set()
        self._doubts = 0
        self._ask_at = 0.0
        self._log = _log.bind(client_id=client_id)

    async def restore(self, link: Link) -> None:
        """Subscribe to everything, over a new link.

        Raises:
            BrokerUnavailable: The connection is lost, or refuses what was granted before.
        """
        self._refused.clear()
        self._ask_at = asyncio.get_running_loop().time() + _ASK_AGAIN_S
        asked: dict[str, int] = {}
        while missing := [
            (name, qos) for name, qos in self._table.filters().items() if asked.get(name) != qos
        ]:
            asked.update(missing)
            await self._ask(link, missing)
        doubted = self._refused & (self._granted | await self._bare(link, self._refused))
        if doubted and self._doubts < _DOUBTS:
            self._doubts += 1
            raise BrokerUnavailable(
                f"the broker refuses {min(doubted)}, which it grants at other times: a cluster "
                "without a leader does that"
            )
        self._doubts = 0
        for name in sorted(self._refused):
            self._log.error("session.subscription_refused", topic_filter=name)

    async def subscribe(self, link: Link, name: str, *, doubted: bool) -> bool:
        """Subscribe to one filter of the table.

        Args:
            link: A link that was restored.
            name: The filter.
            doubted: Whether any refusal is doubted for some seconds, for others share the work.

        Returns:
            Whether it was granted.

        Raises:
            BrokerUnavailable: The connection is lost; or the refusal is no matter of rights, and
                lasts.
        """
        loop = asyncio.get_running_loop()
        since, pause_s = loop.time(), _FIRST_PAUSE_S
        while True:
            qos = self._table.filters().get(name, 1)  # it may be wanted no more by now
            [granted] = await link.subscribe([(name, qos)])
            if granted:
                self._granted.add(name)
                return True
            bare = bool(await self._bare(link, {name}))
            patience_s = self._doubt_s if bare else _SHARED_DOUBT_S * doubted
            left_s = since + patience_s - loop.time()
            if left_s <= 0 and bare:
                raise BrokerUnavailable(
                    f"the broker grants {name} with QoS 0 only, as a cluster without a leader does"
                )
            if left_s <= 0:
                return False
            self._log.info("session.subscription_doubted", topic_filter=name, bare=bare)
            await asyncio.sleep(min(pause_s, left_s))
            pause_s = min(2 * pause_s, _PAUSE_CAP_S)

    def forget(self, name: str) -> None:
        """A filter is not wanted any more."""
        self._granted.discard(name)
        self._refused.discard(name)

    async def ask_again(self, link: Link) -> None:
        """Ask once more for what was refused, when it is time.

        Raises:
            BrokerUnavailable: The connection is lost.
        """
        now = asyncio.get_running_loop().time()
        if not self._refused or now < self._ask_at:
            return
        self._ask_at = now + _ASK_AGAIN_S
        before = set(self._refused)
        wanted = [one for one in self._table.filters().items() if one[0] in before]
        await self._ask(link, wanted)
        for name in sorted(before - self._refused):
            self._log.info("session.subscription_granted", topic_filter=name)

    async def _bare(self, link: Link, names: set[str]) -> set[str]:
        """Return which of these refused filters are granted with QoS 0, and then hold so."""
        wanted = self._table.filters()
        asked = [(name, 0) for name in sorted(names) if wanted.get(name, 1) > 0]
        if not asked:
            return set()
        granted = await link.subscribe(asked)
        return {name for (name, _), good in zip(asked, granted, strict=True) if good}

    async def _ask(self, link: Link, wanted: list[tuple[str, int]]) -> None:
        if not wanted:
            return
        for (name, _), granted in zip(wanted, await link.subscribe(wanted), strict=True):
            if granted:
                self._granted.add(name)
                self._refused.discard(name)
            else:
                self._refused.add(name)
