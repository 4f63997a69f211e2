"""Tasks and what a client may say about them afterwards (PROTOCOL section 2)."""

import json
import re
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, Self, get_args

from pydantic import ConfigDict, Field, StringConstraints, ValidationError, model_validator
from semantic_version import SimpleSpec, Version

from capability_schemas.errors import InvalidTask, MalformedPayload, TooLarge
from capability_schemas.ids import Identifier, is_identifier
from capability_schemas.wire import WireModel, WirePart, first_problem, parse_json

TASK_LIMIT_BYTES: Final = 1024 * 1024
DEFAULT_TIMEOUT_MS: Final = 60_000
MAX_TIMEOUT_MS: Final = 24 * 3_600_000

DataClass = Literal["public", "internal", "private"]
Collaboration = Literal["never", "auto", "plan", "panel"]
Preference = Literal["balanced", "best", "cheapest", "fastest"]
_SKIMMED_BYTES: Final = 4096
_PLAIN: Final = rb'\s*"[a-z_]{1,32}"\s*:\s*(?:"[^"\\]{0,256}"|[-+.0-9eE]{1,32}|true|false|null)\s*'
_ID: Final = rb'\s*"id"\s*:\s*"([A-Za-z0-9_-]{1,64})"\s*'
_ID_AHEAD: Final = re.compile(rb"\s*\{(?:" + _PLAIN + rb",)*?" + _ID + rb"[,}]")
_ID_BEHIND: Final = re.compile(rb"," + _ID + rb"(?:," + _PLAIN + rb")*\}\s*\Z")

ShortText = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Share = Annotated[float, Field(ge=0, le=1, strict=True)]


class TaskPolicy(WirePart):
    """What the client demands of the node that runs its task.

    Attributes:
        zones: Zones the node may stand in; any zone when None.
        data: Class of the data in the task; a node must be cleared for it.
        max_cost: Largest price of one call, in the unit the site uses; no limit when None.
        local_only: Whether the task must not leave this site.
        grants: Rights the node must hold, as attested by the registry.
    """

    model_config = ConfigDict(extra="forbid")

    zones: tuple[ShortText, ...] | None = None
    data: DataClass | None = None
    max_cost: Annotated[float, Field(ge=0, strict=True)] | None = None
    local_only: Annotated[bool, Field(strict=True)] = False
    grants: tuple[ShortText, ...] = ()

    def narrowed(self, other: "TaskPolicy") -> "TaskPolicy":
        """Return the policy that demands what this one and another one demand.

        Args:
            other: Further demands. Of two classes of data the more private one holds, of two
                prices the lower one.
        """
        zones = self.zones if other.zones is None else other.zones
        if self.zones is not None and other.zones is not None:
            zones = tuple(zone for zone in self.zones if zone in other.zones)
        classes = [data for data in (self.data, other.data) if data is not None]
        prices = [price for price in (self.max_cost, other.max_cost) if price is not None]
        return TaskPolicy(
            zones=zones,
            data=max(classes, key=get_args(DataClass).index, default=None),
            max_cost=min(prices, default=None),
            local_only=self.local_only or other.local_only,
            grants=tuple(dict.fromkeys((*self.grants, *other.grants))),
        )


class RouteWeights(WirePart):
    """How much each term counts for one task, in place of the router's own weights.

    Each is 0 to 1, and None leaves the router's; the terms themselves are 0 to 1 too.

    Attributes:
        cost: Price of the call, relative to the dearest candidate.
        energy: Energy of the call, relative to the hungriest candidate.
        time: Predicted finish, relative to the slowest candidate.
        load: Share of the node's places that are taken.
        reputation: What the node has done with such work so far.
        affinity: Bonus of the node that served the session last.
    """

    model_config = ConfigDict(extra="forbid")

    cost: Share | None = None
    energy: Share | None = None
    time: Share | None = None
    load: Share | None = None
    reputation: Share | None = None
    affinity: Share | None = None


class Task(WireModel):
    """One request of a client.

    Attributes:
        text: What is wanted, in words; needed unless ``function`` is given.
        input: Any JSON for the function, checked against its input schema.
        id: Chosen by the client for idempotency, scoped to it; made by the router when None.
        function: A function by name, optionally with a version range: ``name@>=1.2``.
        skills: Skills the function must offer, all of them.
        timeout_ms: Time allowed from receipt, 0 to 86,400,000 ms; 0 has passed on arrival.
        priority: 0 (last) to 9 (first).
        policy: Demands on the node.
        stream: Whether chunks are wanted before the result.
        session: Affinity key: tasks of one session prefer one node.
        reply_to: Another reply topic of the same client, without the last (source) level.
        trace: W3C ``traceparent``.
        collaborate: Whether several nodes may share the task.
        prefer: What decides between candidates of like meaning: ``balanced`` the router's weights,
            ``best`` the meaning alone, ``cheapest`` the price, ``fastest`` the predicted finish.
        weights: Single weights in place of the router's.
        min_confidence: Least confidence an answer may have, 0 to 1; a node whose answer is below
            it hands it back and a stronger node is asked. None leaves it to the router's rules.
        proof: Whether the result shall carry the passport of the node that answers, so that its
            signature can be checked by whoever knows the registry's key.
    """

    model_config = ConfigDict(extra="forbid")

    text: str | None = None
    input: Any = None
    id: Identifier | None = None
    function: Annotated[str, StringConstraints(min_length=1, max_length=256)] | None = None
    skills: tuple[ShortText, ...] = ()
    timeout_ms: Annotated[int, Field(ge=0, le=MAX_TIMEOUT_MS, strict=True)] = DEFAULT_TIMEOUT_MS
    priority: Annotated[int, Field(ge=0, le=9, strict=True)] = 5
    policy: TaskPolicy = TaskPolicy()
    stream: Annotated[bool, Field(strict=True)] = True
    session: ShortText | None = None
    reply_to: Annotated[str, StringConstraints(min_length=1, max_length=512)] | None = None
    trace: Annotated[str, StringConstraints(max_length=256)] | None = None
    collaborate: Collaboration = "auto"
    prefer: Preference = "balanced"
    weights: RouteWeights = RouteWeights()
    min_confidence: Share | None = None
    proof: Annotated[bool, Field(strict=True)] = False

    @model_validator(mode="after")
    def _says_what_is_wanted(self) -> Self:
        if self.text is not None and not self.text.strip():
            raise ValueError("text is empty: say what is wanted")
        if self.text is None and self.function is None:
            raise ValueError("text is missing: say what is wanted, or name a function")
        return self


class CancelRequest(WireModel):
    """A client no longer wants an answer."""

    task: Identifier


class ResumeRequest(WireModel):
    """A client missed events and wants them again.

    Attributes:
        task: The task.
        from_seq: First sequence number wanted, from 0.
    """

    task: Identifier
    from_seq: Annotated[int, Field(ge=0, strict=True)] = 0


def peek_task_id(payload: bytes) -> str | None:
    """Return the id of a task that may not decode, so that the refusal can name it.

    Args:
        payload: Raw bytes, already known to be within the size limit.

    Returns:
        The ``id`` field when the payload is a JSON object with a well-formed one, else None.
    """
    try:
        value = parse_json(payload)
    except MalformedPayload:
        return None
    found = value.get("id") if isinstance(value, dict) else None
    return found if is_identifier(found) else None


def skim_task_id(payload: bytes) -> str | None:
    """Return the id of a task that is too large to be parsed, so that its sender hears of it.

    Only the ends of the payload are looked at: the first members of the object as far as they are
    plain values, and the last ones. An id between two large members is not found.

    Args:
        payload: Raw bytes of any size.

    Returns:
        The ``id`` field where one of the ends holds a well-formed one, else None.
    """
    found = _ID_AHEAD.match(payload[:_SKIMMED_BYTES]) or _ID_BEHIND.search(
        payload[-_SKIMMED_BYTES:]
    )
    return (
        found.group(1).decode() if found and payload[:_SKIMMED_BYTES].lstrip()[:1] == b"{" else None
    )


def decode_task(payload: bytes, *, limit_bytes: int = TASK_LIMIT_BYTES) -> Task:
    """Turn what a client published into a Task.

    A JSON object is a Task; anything else is UTF-8 text and means ``{"text": that}``. Text that
    opens with a brace is taken for a JSON object gone wrong and is refused with the position, for
    a device with a broken serialiser must hear of it instead of having its braces answered.

    Args:
        payload: Raw bytes.
        limit_bytes: Largest task.

    Raises:
        TooLarge: Longer than ``limit_bytes``.
        InvalidTask: Not UTF-8, empty, malformed JSON, an unknown field, a wrong type; ``detail``
            names the ``field``.
    """
    if len(payload) > limit_bytes:
        raise TooLarge("task", size_bytes=len(payload), limit_bytes=limit_bytes)
    fields = _task_fields(payload)
    try:
        return Task.model_validate(fields)
    except ValidationError as exc:
        field, problem = first_problem(exc)
        where = f"{field}: " if field else ""
        raise InvalidTask(f"{where}{problem}", field=field) from exc


def _task_fields(payload: bytes) -> dict[str, Any]:
    try:
        text = payload.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise InvalidTask(f"task is not UTF-8 at byte {exc.start}", field="") from exc
    if not text.strip():
        raise InvalidTask("task is empty: publish text or a JSON object", field="text")
    if not text.lstrip().startswith("{"):
        return {"text": text}
    try:
        value = parse_json(payload)
    except MalformedPayload as exc:
        raise InvalidTask(f"task looks like JSON, but the {exc.message}", field="") from exc
    if not isinstance(value, dict):
        raise InvalidTask("task is not a JSON object", field="")
    if b"\\ud" in payload.lower() and _has_lone_surrogate(value):
        raise InvalidTask("task holds an unpaired surrogate escape: not text", field="")
    return value


def _has_lone_surrogate(value: Any) -> bool:
    """Tell whether a string inside is not Unicode text (RFC 8259 section 8.2)."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


@dataclass(frozen=True, slots=True)
class FunctionRef:
    """A function by name and version range.

    Attributes:
        name: Function name, an identifier.
        range: Version range in the notation of SimpleSpec (``>=1.2,<2``, ``~=1.4``, ``1.2.3``), or
            None for any version.
    """

    name: str
    range: str | None = None

    @classmethod
    def parse(cls, reference: str) -> Self:
        """Parse ``name`` or ``name@range``.

        Raises:
            InvalidTask: The name is no identifier or the range cannot be read.
        """
        name, at, text = reference.partition("@")
        if not is_identifier(name):
            raise InvalidTask(
                f"function {reference!r}: the name must be 1 to 64 of A-Z a-z 0-9 _ -",
                field="function",
            )
        if at and not text.strip():
            raise InvalidTask(f"function {reference!r}: a version range after @", field="function")
        if at:
            try:
                SimpleSpec(text.replace(" ", ""))
            except ValueError as exc:
                raise InvalidTask(
                    f"function {reference!r}: {text!r} is not a version range; write for example "
                    "@1.2.3, @>=1.2 or @>=1.2,<2",
                    field="function",
                ) from exc
        return cls(name=name, range=text.replace(" ", "") if at else None)

    def admits(self, version: str) -> bool:
        """Tell whether a version (semver) lies in the range."""
        if self.range is None:
            return True
        return bool(SimpleSpec(self.range).match(Version(version)))
