"""The topic grammar: the only place that knows what a FOAM topic looks like.

``TOPICS`` is the table of PROTOCOL section 1. Access rules, filters, the protocol page and the
AsyncAPI document are derived from it. ``Topics`` binds it to a prefix and a site::

    topics = Topics(site="local")
    topics.build(TopicKind.INVOKE, node="edge-1")    # foam/v1/local/invoke/edge-1
    topics.filter(TopicKind.CAPABILITY)              # foam/v1/local/capability/+/+
    topics.parse("foam/v1/local/task/esp32-1")       # kind TASK, levels {"client": "esp32-1"}
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Final

from capability_schemas.errors import InvalidTopic
from capability_schemas.ids import check_identifier, is_identifier

DEFAULT_PREFIX: Final = "foam/v1"
DEFAULT_SITE: Final = "local"
MAX_LEVELS: Final = 8


class TopicKind(StrEnum):
    """What a topic is for; one member per row of PROTOCOL section 1, of ADR 23 and 37."""

    TASK = "task"
    CANCEL = "cancel"
    RESUME = "resume"
    REPLY = "reply"
    CAPABILITY = "capability"
    CATALOG = "catalog"
    NODE_STATE = "node_state"
    NODE_LOAD = "node_load"
    INVOKE = "invoke"
    CONTROL = "control"
    REPORT = "report"
    ROUTER_STATE = "router_state"
    REGISTRY_STATE = "registry_state"
    ADMIN = "admin"
    ENROLL = "enroll"
    ENROLL_REPLY = "enroll_reply"
    EVENT = "event"
    ARTIFACT = "artifact"
    STAGE = "stage"
    TRUST = "trust"
    EVIDENCE = "evidence"
    DIRECT = "direct"
    DIRECT_CANCEL = "direct_cancel"
    DIRECT_RESUME = "direct_resume"


@dataclass(frozen=True, slots=True)
class TopicSpec:
    """One row of the topic table.

    Attributes:
        pattern: Levels below the site; ``{name}`` is a variable level.
        qos: Highest quality of service its messages use (0 or 1).
        retain: Whether the broker keeps the last message.
        publishers: Who writes it, in words.
        payload: What it carries, in words.
    """

    pattern: str
    qos: int
    retain: bool
    publishers: str
    payload: str

    @property
    def variables(self) -> tuple[str, ...]:
        """Names of the variable levels, in order."""
        return tuple(level[1:-1] for level in self.pattern.split("/") if level.startswith("{"))


TOPICS: Final[Mapping[TopicKind, TopicSpec]] = MappingProxyType(
    {
        TopicKind.TASK: TopicSpec("task/{client}", 1, False, "client", "Task"),
        TopicKind.CANCEL: TopicSpec("task/{client}/cancel", 1, False, "client", "CancelRequest"),
        TopicKind.RESUME: TopicSpec("task/{client}/resume", 1, False, "client", "ResumeRequest"),
        TopicKind.REPLY: TopicSpec(
            "reply/{client}/{task}/{source}", 1, False, "the source named in it", "ReplyEvent"
        ),
        TopicKind.CAPABILITY: TopicSpec(
            "capability/{node}/{function}", 1, True, "node", "CapabilityClaim"
        ),
        TopicKind.CATALOG: TopicSpec(
            "catalog/{node}/{function}", 1, True, "registry", "CatalogRecord"
        ),
        TopicKind.NODE_STATE: TopicSpec("node/{node}/state", 1, True, "node", "NodeState"),
        TopicKind.NODE_LOAD: TopicSpec("node/{node}/load", 0, False, "node", "NodeLoad"),
        TopicKind.INVOKE: TopicSpec("invoke/{node}", 1, False, "router", "Invocation"),
        TopicKind.CONTROL: TopicSpec("control/{node}", 1, False, "router, registry", "Control"),
        TopicKind.REPORT: TopicSpec("report/{router}/{node}", 1, False, "node", "Report"),
        TopicKind.ROUTER_STATE: TopicSpec(
            "router/{router}/state", 1, True, "router", "RouterState"
        ),
        TopicKind.REGISTRY_STATE: TopicSpec(
            "registry/{registry}/state", 1, True, "registry", "RegistryState"
        ),
        TopicKind.ADMIN: TopicSpec("admin/{target}/{client}", 1, False, "admin", "AdminRequest"),
        TopicKind.ENROLL: TopicSpec("enroll/{request}", 1, False, "enrollee", "EnrollRequest"),
        TopicKind.ENROLL_REPLY: TopicSpec(
            "enroll/{request}/reply", 1, False, "registry", "EnrollReply"
        ),
        TopicKind.EVENT: TopicSpec(
            "event/{source}/{kind}", 1, False, "the source named in it", "CloudEvent"
        ),
        TopicKind.ARTIFACT: TopicSpec(
            "artifact/{node}/{digest}", 1, False, "registry", "binary bundle piece"
        ),
        TopicKind.STAGE: TopicSpec(
            "stage/{plan}/{stage}", 1, False, "neighbouring stage", "binary activation frame"
        ),
        TopicKind.TRUST: TopicSpec("trust/{member}", 1, True, "registry", "TrustState"),
        TopicKind.EVIDENCE: TopicSpec("evidence/{node}", 1, True, "node", "Evidence"),
        TopicKind.DIRECT: TopicSpec("direct/{node}/{client}", 1, False, "client", "Task"),
        TopicKind.DIRECT_CANCEL: TopicSpec(
            "direct/{node}/{client}/cancel", 1, False, "client", "CancelRequest"
        ),
        TopicKind.DIRECT_RESUME: TopicSpec(
            "direct/{node}/{client}/resume", 1, False, "client", "ResumeRequest"
        ),
    }
)


@dataclass(frozen=True, slots=True)
class ParsedTopic:
    """A topic taken apart.

    Attributes:
        kind: Which row of the table it is.
        levels: Its variable levels by name.
    """

    kind: TopicKind
    levels: Mapping[str, str]


def _fixed_levels(pattern: str) -> tuple[str | None, ...]:
    return tuple(None if part.startswith("{") else part for part in pattern.split("/"))


class Topics:
    """The topic table bound to a prefix and a site.

    Args:
        site: Site level; an identifier.
        prefix: Leading levels, one or more identifiers joined by ``/``.

    Raises:
        ProtocolError: ``site`` or a level of ``prefix`` is not an identifier.
        InvalidTopic: The longest topic would exceed eight levels.
    """

    def __init__(self, site: str = DEFAULT_SITE, prefix: str = DEFAULT_PREFIX) -> None:
        for level in prefix.split("/"):
            check_identifier(level, "topic prefix level")
        self.site = check_identifier(site, "site")
        self.prefix = prefix
        self.root = f"{prefix}/{site}"
        deepest = max(spec.pattern.count("/") + 1 for spec in TOPICS.values())
        if self.root.count("/") + 1 + deepest > MAX_LEVELS:
            raise InvalidTopic(f"prefix {prefix!r} makes topics of more than {MAX_LEVELS} levels")
        self._by_shape: dict[int, list[tuple[TopicKind, tuple[str | None, ...]]]] = {}
        for kind, spec in TOPICS.items():
            shape = _fixed_levels(spec.pattern)
            self._by_shape.setdefault(len(shape), []).append((kind, shape))

    def build(self, kind: TopicKind, /, **levels: str) -> str:
        """Return the topic of ``kind`` with every variable level filled in.

        Args:
            kind: Row of the table.
            **levels: One identifier for each variable level.

        Raises:
            ProtocolError: A level is missing, unknown or no identifier.
        """
        spec = TOPICS[kind]
        if set(levels) != set(spec.variables):
            raise InvalidTopic(f"topic {kind} takes the levels {spec.variables}, not {set(levels)}")
        for name, value in levels.items():
            check_identifier(value, name)
        return f"{self.root}/{spec.pattern.format(**levels)}"

    def filter(self, kind: TopicKind, /, **levels: str) -> str:
        """Return the narrowest subscription filter for ``kind``.

        Args:
            kind: Row of the table.
            **levels: Identifiers for the levels to pin; every other variable level becomes ``+``.

        Raises:
            ProtocolError: A level is unknown or no identifier.
        """
        spec = TOPICS[kind]
        if not set(levels) <= set(spec.variables):
            raise InvalidTopic(f"topic {kind} takes the levels {spec.variables}, not {set(levels)}")
        for name, value in levels.items():
            check_identifier(value, name)
        filled = {name: levels.get(name, "+") for name in spec.variables}
        return f"{self.root}/{spec.pattern.format(**filled)}"

    def parse(self, topic: str) -> ParsedTopic:
        """Take a topic apart.

        Raises:
            InvalidTopic: It is of another prefix or site, of no row of the table, or one of its
                levels is no identifier.
        """
        root = self.root + "/"
        if not topic.startswith(root):
            raise InvalidTopic(f"topic {topic[:200]!r} is not below {self.root}", topic=topic[:200])
        parts = topic[len(root) :].split("/")
        for kind, shape in self._by_shape.get(len(parts), ()):
            if all(
                fixed is None or fixed == part for fixed, part in zip(shape, parts, strict=True)
            ):
                values = [part for fixed, part in zip(shape, parts, strict=True) if fixed is None]
                if not all(is_identifier(value) for value in values):
                    break
                names = TOPICS[kind].variables
                return ParsedTopic(kind, dict(zip(names, values, strict=True)))
        raise InvalidTopic(f"topic {topic[:200]!r} is not in the grammar", topic=topic[:200])


def matches(topic_filter: str, topic: str) -> bool:
    """Tell whether an MQTT subscription filter matches a topic name.

    Wildcards, the parent match of ``#`` and the exclusion of ``$`` topics follow MQTT 3.1.1
    sections 4.7.1 and 4.7.2.

    Args:
        topic_filter: A filter; ``+`` and ``#`` only as whole levels.
        topic: A topic name without wildcards.
    """
    if topic.startswith("$") and topic_filter[:1] in {"+", "#"}:
        return False
    wanted, given = topic_filter.split("/"), topic.split("/")
    for position, level in enumerate(wanted):
        if level == "#":
            return True
        if position == len(given):
            return False
        if level not in {"+", given[position]}:
            return False
    return len(wanted) == len(given)
