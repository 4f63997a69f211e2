"""The one access table: which role publishes and subscribes where (PROTOCOL sections 1 and 6).

A grant names a kind of topic and the levels of it that must be the identity itself. Everything
else follows: the filters of an identity, whether it may publish a topic, subscribe to a filter, or
be handed a message. Compilers in ``broker.access.compilers`` derive broker files from it.
"""

from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from capability_schemas.topics import TopicKind, Topics, matches

if TYPE_CHECKING:
    from collections.abc import Mapping


class Role(StrEnum):
    """What an identity is in the mesh; each has its own rows of the table."""

    DEVICE = "device"
    NODE = "node"
    ROUTER = "router"
    REGISTRY = "registry"
    ADMIN = "admin"
    OPERATOR = "operator"
    OBSERVER = "observer"
    ENROLLEE = "enrollee"

    @property
    def binds_client_id(self) -> bool:
        """Whether the MQTT client id must equal the identity (PROTOCOL section 6).

        One connection per node, router and registry: a second one is the same component started
        again and takes over. Devices and people's tools may connect as often as they like.
        """
        return self in {Role.NODE, Role.ROUTER, Role.REGISTRY}


class Action(StrEnum):
    """What is being done with a topic or filter."""

    PUBLISH = "publish"
    SUBSCRIBE = "subscribe"
    RECEIVE = "receive"


@dataclass(frozen=True, slots=True)
class Grant:
    """One cell of the access table.

    Attributes:
        action: ``PUBLISH`` or ``SUBSCRIBE``; what may be subscribed to may be received.
        kind: Row of the topic table.
        own: Variable levels that must equal the identity.
        subtree: Grant everything below the last pinned level (``reply/{self}/#``), so that one
            wildcard subscription does.
    """

    action: Action
    kind: TopicKind
    own: tuple[str, ...] = ()
    subtree: bool = False

    def filter(self, topics: Topics, identity: str) -> str:
        """Return the MQTT filter this grant stands for.

        Args:
            topics: The grammar of the site.
            identity: Who holds the grant; an identifier, or ``+`` is refused.

        Raises:
            ProtocolError: ``identity`` is no identifier.
        """
        found = topics.filter(self.kind, **dict.fromkeys(self.own, identity))
        if not self.subtree:
            return found
        return found.partition("/+")[0] + "/#"


def _publish(kind: TopicKind, *own: str) -> Grant:
    return Grant(Action.PUBLISH, kind, own)


def _subscribe(kind: TopicKind, *own: str) -> Grant:
    return Grant(Action.SUBSCRIBE, kind, own)


def _below(kind: TopicKind, *own: str) -> Grant:
    return Grant(Action.SUBSCRIBE, kind, own, subtree=True)


_RENEWING: Final = (
    _publish(TopicKind.ENROLL, "request"),
    _subscribe(TopicKind.ENROLL_REPLY, "request"),
)
"""What a newcomer may with its join token, and a member under its own name to renew its papers."""

_DEVICE: Final = (
    _publish(TopicKind.TASK, "client"),
    _publish(TopicKind.CANCEL, "client"),
    _publish(TopicKind.RESUME, "client"),
    _below(TopicKind.REPLY, "client"),
)
_WITHOUT_ROUTERS: Final = (
    _publish(TopicKind.DIRECT, "client"),
    _publish(TopicKind.DIRECT_CANCEL, "client"),
    _publish(TopicKind.DIRECT_RESUME, "client"),
    _subscribe(TopicKind.CATALOG),
    _subscribe(TopicKind.NODE_STATE),
    _subscribe(TopicKind.NODE_LOAD),
    _subscribe(TopicKind.ROUTER_STATE),
)
"""What a client needs to ask a node itself when every router is gone (ADR 37); nodes obey it only
then. What runs on a node asks routers alone."""

_OBSERVER: Final = (
    _below(TopicKind.CATALOG),
    _below(TopicKind.NODE_STATE),
    _below(TopicKind.ROUTER_STATE),
    _below(TopicKind.REGISTRY_STATE),
    _below(TopicKind.EVENT),
    _below(TopicKind.TRUST),
)

_TABLE: Final["Mapping[Role, tuple[Grant, ...]]"] = MappingProxyType(
    {
        Role.DEVICE: (*_DEVICE, *_WITHOUT_ROUTERS),
        Role.NODE: (
            *_DEVICE,  # what runs on a node may ask the mesh: the tools of an agent
            *_RENEWING,
            _publish(TopicKind.CAPABILITY, "node"),
            _publish(TopicKind.NODE_STATE, "node"),
            _subscribe(TopicKind.NODE_STATE, "node"),  # whether another process says to be it
            _publish(TopicKind.NODE_LOAD, "node"),
            _publish(TopicKind.REPORT, "node"),
            _publish(TopicKind.REPLY, "source"),
            _publish(TopicKind.EVENT, "source"),
            _subscribe(TopicKind.INVOKE, "node"),
            _subscribe(TopicKind.CONTROL, "node"),
            _subscribe(TopicKind.ARTIFACT, "node"),
            _subscribe(TopicKind.ROUTER_STATE),
            _subscribe(TopicKind.NODE_LOAD),  # of its neighbours, to name one when it is full
            _publish(TopicKind.EVIDENCE, "node"),
            _subscribe(TopicKind.TRUST),
            _subscribe(TopicKind.REGISTRY_STATE),
            _below(TopicKind.DIRECT, "node"),
        ),
        Role.ROUTER: (
            *_RENEWING,
            _below(TopicKind.TASK),
            _below(TopicKind.CATALOG),
            _subscribe(TopicKind.NODE_STATE),
            _subscribe(TopicKind.NODE_LOAD),
            _subscribe(TopicKind.REPORT),  # those meant for a router whose tasks it takes over too
            _below(TopicKind.REPLY),
            _subscribe(TopicKind.ADMIN, "target"),
            _subscribe(TopicKind.ROUTER_STATE),
            _subscribe(TopicKind.REGISTRY_STATE),
            _subscribe(TopicKind.TRUST),
            _subscribe(TopicKind.EVENT),  # what other routers tell each other
            _publish(TopicKind.INVOKE),
            _publish(TopicKind.CONTROL),
            _publish(TopicKind.REPLY, "source"),
            _publish(TopicKind.ROUTER_STATE, "router"),
            _publish(TopicKind.EVENT, "source"),
        ),
        Role.REGISTRY: (
            _below(TopicKind.CAPABILITY),
            _below(TopicKind.CATALOG),
            _subscribe(TopicKind.NODE_STATE),
            _subscribe(TopicKind.ADMIN, "target"),
            _subscribe(TopicKind.ENROLL),
            _subscribe(TopicKind.ROUTER_STATE),
            _subscribe(TopicKind.TRUST),
            _subscribe(TopicKind.EVIDENCE),
            _subscribe(TopicKind.EVENT),  # for the audit trail
            _subscribe(TopicKind.REGISTRY_STATE),
            _publish(TopicKind.REGISTRY_STATE, "registry"),
            _publish(TopicKind.TRUST),
            _publish(TopicKind.CATALOG),
            _publish(TopicKind.CONTROL),
            _publish(TopicKind.ENROLL_REPLY),
            _publish(TopicKind.ARTIFACT),
            _publish(TopicKind.REPLY, "source"),
            _publish(TopicKind.EVENT, "source"),
        ),
        Role.ADMIN: (
            *_DEVICE,
            *_WITHOUT_ROUTERS,
            *_RENEWING,
            *_OBSERVER,
            _publish(TopicKind.ADMIN, "client"),
            _below(TopicKind.CAPABILITY),
            _below(TopicKind.REPORT),
        ),
        # On the admin topics as an administrator; which verbs count for it the receivers decide
        # (broker.access.orders), for a topic tells who asks and not what for.
        Role.OPERATOR: (
            *_DEVICE,
            *_WITHOUT_ROUTERS,
            *_RENEWING,
            *_OBSERVER,
            _publish(TopicKind.ADMIN, "client"),
        ),
        Role.OBSERVER: _OBSERVER,
        Role.ENROLLEE: _RENEWING,
    }
)


_BEYOND_TENANTS: Final = frozenset(_WITHOUT_ROUTERS[:-1])
"""What tells of the offers of all, or goes past those who keep tenants apart: kept from members of
a tenant. Routers' states remain, and trust states, for a node must hear of a router that was thrown
out; they name members and tenants, and nothing they offer."""


def grants(role: Role) -> tuple[Grant, ...]:
    """Return the rows of the table for ``role``."""
    return _TABLE[role]


def covers(granted: str, requested: str) -> bool:
    """Tell whether every topic that ``requested`` matches is matched by ``granted`` too.

    Both are filters after MQTT 3.1.1 section 4.7.1. ``a/#`` covers ``a`` (parent match); ``a/+``
    does not cover ``a/#``; a filter that starts with a wildcard does not reach ``$`` topics.

    Args:
        granted: The wider filter, from the table.
        requested: The filter of a SUBSCRIBE; a malformed one is covered by nothing.
    """
    wide, narrow = granted.split("/"), requested.split("/")
    if any(("#" in level or "+" in level) and len(level) > 1 for level in narrow):
        return False
    if "#" in narrow[:-1] or (requested.startswith("$") and granted[:1] in {"+", "#"}):
        return False
    for position, level in enumerate(wide):
        if level == "#":
            return True
        if position == len(narrow) or narrow[position] == "#":
            return False
        if level not in {"+", narrow[position]}:
            return False
    return len(wide) == len(narrow)


_STAND_IN: Final = "_-the-identity-_"


@dataclass(frozen=True, slots=True)
class Filters:
    """The filters one identity holds.

    Attributes:
        publish: Filters it may publish below.
        subscribe: Filters it may subscribe to, or to a part of.
    """

    publish: tuple[str, ...]
    subscribe: tuple[str, ...]


class AccessPolicy:
    """Answers access questions for one site.

    Pure and without state but a cache; safe to share between tasks of one loop.

    Args:
        topics: The grammar of the site.
    """

    def __init__(self, topics: Topics) -> None:
        self.topics = topics
        self._filters = lru_cache(maxsize=4096)(self._compile)

    def filters(self, role: Role, identity: str, *, apart: bool = False) -> Filters:
        """Return the filters that ``identity`` holds in ``role``.

        Args:
            role: Its role.
            identity: Its authenticated name.
            apart: Whether it is of one tenant: then it hears nothing of what others offer.

        Raises:
            ProtocolError: ``identity`` is no identifier.
        """
        return self._filters(role, identity, apart)

    def template(self, role: Role, placeholder: str, *, apart: bool = False) -> Filters:
        """Return the filters of a role with something else in the place of the identity.

        Args:
            role: The role.
            placeholder: What stands where the identity would, such as ``${username}``.
            apart: Whether it is for members of one tenant.
        """
        held = self._filters(role, _STAND_IN, apart)

        def put(filters: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(
                "/".join(placeholder if level == _STAND_IN else level for level in found.split("/"))
                for found in filters
            )

        return Filters(put(held.publish), put(held.subscribe))

    def allows(
        self, role: Role, identity: str, action: Action, topic: str, *, apart: bool = False
    ) -> bool:
        """Tell whether an identity may do something.

        Args:
            role: Its role.
            identity: Its authenticated name.
            action: What it wants to do.
            topic: A topic name for ``PUBLISH`` and ``RECEIVE``, a filter for ``SUBSCRIBE``.
            apart: Whether it is of one tenant.

        Raises:
            ProtocolError: ``identity`` is no identifier.
        """
        held = self._filters(role, identity, apart)
        if action is Action.SUBSCRIBE:
            return any(covers(granted, topic) for granted in held.subscribe)
        filters = held.publish if action is Action.PUBLISH else held.subscribe
        return any(matches(granted, topic) for granted in filters)

    def _compile(self, role: Role, identity: str, apart: bool) -> Filters:
        found: dict[Action, list[str]] = {Action.PUBLISH: [], Action.SUBSCRIBE: []}
        for grant in grants(role):
            if apart and grant in _BEYOND_TENANTS:
                continue
            found[grant.action].append(grant.filter(self.topics, identity))
        return Filters(tuple(found[Action.PUBLISH]), tuple(found[Action.SUBSCRIBE]))
