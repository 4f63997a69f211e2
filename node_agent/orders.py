"""Lets orders through to a node that a router or registry of its mesh really gave.

An order is checked before anything else is done with it: whom it is for, who signed it, when it was
sent, and whether it was seen before. Whose key a router's is, its retained state tells, which may
come after its first order: such orders wait for it, for a bounded time and in bounded number.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import structlog

from broker.security import SecurityAlarm, hear_registry, hear_trust
from broker.session.base import Message, Session
from capability_schemas.errors import AccessDenied, FoamError, InvalidTopic, ProtocolError
from capability_schemas.ids import is_identifier
from capability_schemas.invocation import Control, Invocation
from capability_schemas.node import RouterState
from capability_schemas.passport import PassportBook
from capability_schemas.provenance import ORDER_ROLES, Provenance
from capability_schemas.topics import MAX_LEVELS, TopicKind, Topics
from capability_schemas.wire import decode

_WAIT_S: Final = 5.0
"""How long an order waits for the state of its router, seconds."""

_WAITING_LIMIT: Final = 256
_STATE_LIMIT_BYTES: Final = 64 * 1024
_QUEUE_LIMIT: Final = 4_096

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

Order = Invocation | Control


@dataclass(eq=False, slots=True)
class _Waiting:
    payload: bytes
    order: Order
    obey: Callable[[bool], None]
    refuse: Callable[[FoamError], None]
    timer: asyncio.TimerHandle


class OrderGate:
    """Checks orders and passes them on. Owned by the agent's event loop.

    Args:
        session: The node's session.
        topics: The site's topics.
        node: The node.
        epoch: Start of the agent, UTC milliseconds: orders for an earlier one are refused, and
            those for none in particular, but to cancel: the clocks of router and node may differ,
            so that times do not tell whether the earlier one was given the same order. Who asks for
            an account is answered whichever start is meant.
        book: Passports that were shown; None where no registry is known: then the broker's word
            is all there is, which is logged once.
        alarm: Told about what is refused.
        clock: UTC milliseconds.
    """

    def __init__(
        self,
        *,
        session: Session,
        topics: Topics,
        node: str,
        epoch: int,
        book: PassportBook | None,
        alarm: SecurityAlarm,
        clock: Callable[[], int],
    ) -> None:
        self._session = session
        self._topics = topics
        self._node = node
        self._epoch = epoch
        self._book = book
        self._provenance = Provenance(own=node, book=book, clock=clock) if book else None
        self._alarm = alarm
        self._waiting: OrderedDict[str, list[_Waiting]] = OrderedDict()
        self._waiting_count = 0

    async def listen(self) -> None:
        """Subscribe to what tells whose key is whose; before the orders themselves."""
        if self._book is None:
            _log.warning(
                "node.orders_unchecked",
                node=self._node,
                reason="its identity knows no registry: whom the broker lets publish is obeyed",
                do="enroll it: foam enroll",
            )
            return
        for kind, handler in (
            (TopicKind.REGISTRY_STATE, self._on_registry_state),
            (TopicKind.TRUST, self._on_trust),
            (TopicKind.ROUTER_STATE, self._on_router_state),
        ):
            await self._session.subscribe(
                self._topics.filter(kind), handler, queue_limit=_QUEUE_LIMIT
            )

    def stop(self) -> None:
        """Drop what waits."""
        for waiting in self._waiting.values():
            for one in waiting:
                one.timer.cancel()
        self._waiting.clear()
        self._waiting_count = 0

    def check(
        self,
        payload: bytes,
        order: Order,
        *,
        obey: Callable[[bool], None],
        refuse: Callable[[FoamError], None],
    ) -> None:
        """Pass an order on, now or when its router is known, or refuse it.

        Args:
            payload: As received.
            order: The same, decoded.
            obey: Called when it is to be obeyed, with whether it was seen before.
            refuse: Called when a router that is known to be one should hear that it is not.
        """
        if self._book is None:
            obey(False)
            return
        sender = _sender(order)
        if sender is None or self._book.knows(sender):
            self._judge(payload, order, obey, refuse)
        elif self._waiting_count < _WAITING_LIMIT:
            self._wait(sender, payload, order, obey, refuse)
        else:
            reason = f"{_WAITING_LIMIT} orders of unknown routers wait already"
            self._tell(order, AccessDenied(f"{sender} has shown no passport, and {reason}"))

    def reply_topic(self, invocation: Invocation) -> str:
        """Return the topic of this node's events, checked to lie in the client's own subtree.

        Raises:
            InvalidTopic: It does not.
        """
        root = f"{self._topics.root}/reply/{invocation.client}/"
        topic = f"{invocation.reply}/{self._node}"
        levels = topic[len(root) :].split("/")
        if (
            not topic.startswith(root)
            or not all(is_identifier(level) for level in levels)
            or topic.count("/") >= MAX_LEVELS
        ):
            raise InvalidTopic(f"reply topic {invocation.reply[:200]!r} is not below {root}")
        return topic

    def _judge(
        self,
        payload: bytes,
        order: Order,
        obey: Callable[[bool], None],
        refuse: Callable[[FoamError], None],
    ) -> None:
        sender = _sender(order)
        try:
            new = self._verify(payload, order, sender)
        except FoamError as exc:
            self._tell(order, exc)
            if order.node in {None, self._node} and self._is_router(sender):
                refuse(exc)
            return
        obey(not new)

    def _verify(self, payload: bytes, order: Order, sender: str | None) -> bool:
        if self._provenance is None:
            return True
        if isinstance(order, Invocation):
            nonce: tuple[object, ...] = (
                order.client,
                order.task,
                order.attempt,
                order.sent_at,
            )
        else:
            nonce = ("control", order.nonce)
        new = self._provenance.check(
            payload,
            sender=sender,
            roles=ORDER_ROLES,
            target=order.node,
            sent_at=order.sent_at,
            nonce=nonce,
        )
        if isinstance(order, Control) and order.verb == "account":
            return new
        if order.epoch is None:
            if isinstance(order, Invocation) or order.verb != "cancel":
                raise AccessDenied(
                    f"names no start of {self._node} (epoch), which may have been given it before: "
                    "send it again with the epoch of the node's state"
                )
        elif order.epoch != self._epoch:
            raise AccessDenied(
                f"is for an earlier start of {self._node}, which has forgotten what it ran"
            )
        return new

    def _is_router(self, sender: str | None) -> bool:
        try:
            return bool(self._book and sender and self._book.key(sender, "router"))
        except AccessDenied:
            return False

    def _tell(self, order: Order, error: FoamError) -> None:
        what = "invocation" if isinstance(order, Invocation) else f"control {order.verb}"
        self._alarm.tell(error, sender=_sender(order), what=what)

    # ---- routers that are not known yet

    def _wait(
        self,
        sender: str,
        payload: bytes,
        order: Order,
        obey: Callable[[bool], None],
        refuse: Callable[[FoamError], None],
    ) -> None:
        timer = asyncio.get_running_loop().call_later(_WAIT_S, self._give_up, sender)
        self._waiting.setdefault(sender, []).append(_Waiting(payload, order, obey, refuse, timer))
        self._waiting_count += 1

    def _give_up(self, sender: str) -> None:
        """Refuse the order of a router that has waited longest."""
        one = self._waiting[sender].pop(0)
        self._waiting_count -= 1
        if not self._waiting[sender]:
            del self._waiting[sender]
        self._judge(one.payload, one.order, one.obey, one.refuse)

    def _release(self, sender: str) -> None:
        waiting = self._waiting.pop(sender, [])
        self._waiting_count -= len(waiting)
        for one in waiting:
            one.timer.cancel()
        for one in waiting:
            self._judge(one.payload, one.order, one.obey, one.refuse)

    async def _on_router_state(self, message: Message) -> None:
        if self._book is None or not message.payload:
            return
        try:
            router = self._topics.parse(message.topic).levels["router"]
            state = decode(RouterState, message.payload, limit_bytes=_STATE_LIMIT_BYTES)
        except ProtocolError as exc:
            _log.warning("node.bad_router_state", topic=message.topic, error=exc.message)
            return
        passport = state.passport
        if passport is None:  # a last will, or a router that signs nothing
            return
        try:
            if not router == state.router == passport.identity:
                raise AccessDenied(f"the state of {router} shows a passport of another member")
            self._book.admit(passport)
        except FoamError as exc:
            self._alarm.tell(exc, sender=router, what="passport")
            return
        self._release(router)

    async def _on_registry_state(self, message: Message) -> None:
        try:
            registry = self._topics.parse(message.topic).levels["registry"]
        except ProtocolError:
            return
        if self._book is not None:
            hear_registry(message.payload, registry=registry, book=self._book)

    async def _on_trust(self, message: Message) -> None:
        try:
            member = self._topics.parse(message.topic).levels["member"]
        except ProtocolError:
            return
        if self._book is not None:
            hear_trust(message.payload, member=member, book=self._book)


def _sender(order: Order) -> str | None:
    return order.router if isinstance(order, Invocation) else order.sender
