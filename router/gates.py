"""The gates: what an offer must pass, each with the reason when it does not. Pure.

A gate is never waived, in no mode and in no fallback. Those of policy look at what the registry
attests, never at what a node claims. They come in three stages, the cheap and final ones first; in
a large fleet an offer that fails a stage is not taken to the next, and most of those that fail
plainly (``glance``) are not judged at all.
"""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from enum import Enum, auto
from functools import cache, cached_property
from typing import Final

import structlog

from capability_schemas.capability import EVERY_TENANT, CatalogRecord
from capability_schemas.errors import InvalidTask
from capability_schemas.functions import check_input, effective_input
from capability_schemas.task import TaskPolicy
from capability_schemas.validation import Bounds
from router.breaker import Breakers
from router.candidates import Candidate, Offer, Request
from router.catalogue import NodeView
from router.finish import UNKNOWN, Finish, predict_finish
from router.rules.patterns import compile_expression

POLICY_GATES: Final = ("tenant", "zones", "data", "grants", "local", "cost", "rules")
FIT_GATES: Final = ("sound", "version", "skills", "schema", "size", "context")
PASSING_GATES: Final = (
    *("memory", "liveness", "asleep", "lost", "open"),
    *("capacity", "breaker", "deadline"),
)
"""Gates that a node fails for the moment only."""

GATES: Final = (*POLICY_GATES, *FIT_GATES, *PASSING_GATES)

PLAIN_GATES: Final = frozenset(GATES) - {
    *("rules", "sound", "schema", "size", "context"),
    *("memory", "breaker", "deadline"),
}
"""Gates that ``glance`` looks at."""

MOST_TOKEN_BYTES: Final = 6.0
"""Bytes a token stands for at the most, over a whole request. Tokenizers of language models take
3.2 to 3.9 characters of English for one (Llama 2 and 3: arXiv 2407.21783, section 3.2), fewer of
code and of other languages; what has more tokens than fit even so is too long for certain."""

USUAL_TOKEN_BYTES: Final = 3.0
"""The cautious estimate: a request that fits only if its tokens are longer may not fit."""

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

_NAMED: Final = 8
_ASKED: Final = frozenset({"version", "skills"})
_BOUNDS: Final = Bounds(expression=compile_expression)
"""A claim's schema is a stranger's; what is left undecided here the node decides."""

_AFTER_POLICY: Final = frozenset((*FIT_GATES, *PASSING_GATES))
_AFTER_FIT: Final = frozenset(PASSING_GATES)
_TIME: Final = frozenset({"deadline"})
_AFTER_SOUND: Final = frozenset(GATES) - {"sound"}
_NONE: Final[frozenset[str]] = frozenset()


def may_be_meant(one: Candidate) -> bool:
    """Tell whether a candidate is of the kind that is asked for, whether it may be had or not.

    A client that means what it may not have, cannot have just now, or gives the wrong input for,
    does not mean the next best; what lacks a skill that it asks for is not meant at all.
    """
    return _ASKED.isdisjoint(one.failed) and _ASKED.isdisjoint(one.skipped)


class Outlook(Enum):
    """What a glance at an offer tells; the earlier, the more a client can do about it."""

    OPEN = auto()
    FULL = auto()
    RETURNING = auto()
    AWAY = auto()
    NEVER = auto()


Glance = Callable[[CatalogRecord, NodeView], Outlook]


def glance(request: Request, *, now: int) -> Glance:
    """Return what sorts out offers that fail plain gates, in less than a microsecond each.

    Of a function on ten thousand nodes those that may be chosen are found, and the few that tell
    why the others may not be, without a judgement of every one.

    Args:
        request: What is asked.
        now: UTC milliseconds.
    """
    policy, skills = request.task.policy, frozenset(request.task.skills)
    zones = None if policy.zones is None else frozenset(policy.zones)
    data, grants = policy.data, frozenset(policy.grants)
    most, local = policy.max_cost, policy.local_only
    asks = policy != TaskPolicy()
    served, prefer = frozenset({request.tenant, EVERY_TENANT}), request.prefer
    admits = None if request.function is None else cache(request.function.admits)

    def look(record: CatalogRecord, node: NodeView) -> Outlook:
        if record.policy.tenant not in served:
            return Outlook.NEVER
        if asks:
            attested = record.policy
            if (
                (zones is not None and zones.isdisjoint(attested.zones))
                or (data is not None and data not in attested.data)
                or (local and attested.external)
                or (most is not None and record.cost.money > most)
                or not grants.issubset(attested.grants)
            ):
                return Outlook.NEVER
        if (skills and not skills.issubset(record.skills)) or (
            admits is not None and not admits(record.version)
        ):
            return Outlook.NEVER
        lapsed = record.expires_at is not None and record.expires_at <= now
        if lapsed or not node.live:
            returns = not lapsed and (node.asleep or node.just_lost(now))
            return Outlook.RETURNING if returns else Outlook.AWAY
        if not node.open:
            return Outlook.AWAY
        if node.full or (node.given and not node.has_room(record, session=record.node == prefer)):
            return Outlook.FULL
        return Outlook.OPEN

    return look


class Gatekeeper:
    """Judges the offers for one request; what is the same for all of them is worked out once.

    Args:
        request: What is asked.
        now: UTC milliseconds.
        breakers: Who is left alone for not answering; nobody when None.
    """

    def __init__(self, request: Request, *, now: int, breakers: Breakers | None = None) -> None:
        self._request = request
        self._task = request.task
        self._policy = policy = request.task.policy
        self._zones = None if policy.zones is None else frozenset(policy.zones)
        self._grants = frozenset(policy.grants)
        self._skills = frozenset(request.task.skills)
        self._now = now
        self._breakers = breakers
        self._mismatches: dict[str, str | None] = {}

    def judge(self, offer: Offer, *, thorough: bool = True) -> Candidate:
        """Take an offer through the gates; one that breaks them is not ``sound``.

        Args:
            offer: What is judged.
            thorough: Whether to look at every gate even when an earlier stage has decided.
        """
        try:
            return self._judge(offer, thorough=thorough)
        except Exception as error:  # noqa: BLE001  # supervision boundary: one node's word, not all tasks
            kind, record = type(error).__name__, offer.record
            _log.error(
                "offer.unsound", node=record.node, function=record.function, error=repr(error)
            )
            why = f"what node {record.node} says of itself cannot be judged ({kind})"
            return Candidate(offer, {"sound": why}, _AFTER_SOUND, UNKNOWN)

    def _judge(self, offer: Offer, *, thorough: bool) -> Candidate:
        record = offer.record
        failed = self.failed_policy(record)
        if failed and not thorough:
            return Candidate(offer, failed, _AFTER_POLICY, UNKNOWN)
        failed |= self._failed_fit(record)
        if failed and not thorough:
            return Candidate(offer, failed, _AFTER_FIT, UNKNOWN)
        failed |= self._failed_moment(offer)
        if failed and not thorough:
            return Candidate(offer, failed, _TIME, UNKNOWN)
        finish = predict_finish(record, offer.node)
        failed |= self._failed_deadline(finish, offer.node)
        return Candidate(offer, failed, _NONE, finish)

    def context_missing(self, record: CatalogRecord) -> float:
        """Return the share of the request's tokens, 0 to 1, that may not fit into the context."""
        have = record.resources.context_tokens
        need = self._size_bytes / USUAL_TOKEN_BYTES
        return max(0.0, 1.0 - have / need) if have is not None and need else 0.0

    @cached_property
    def _size_bytes(self) -> int:
        """Size of text and input as JSON."""
        return len(self._task.model_dump_json(include={"text", "input"}).encode())

    def failed_policy(self, record: CatalogRecord) -> dict[str, str]:
        """Return the gates of policy that a record fails, each with the reason."""
        failed: dict[str, str] = {}
        policy, attested = self._policy, record.policy
        if not attested.serves(self._request.tenant):
            failed["tenant"] = "serves another tenant"
        if self._zones is not None and self._zones.isdisjoint(attested.zones):
            wanted = _words(policy.zones or ())
            failed["zones"] = f"stands in {_words(attested.zones)}, not in {wanted}"
        if policy.data is not None and policy.data not in attested.data:
            failed["data"] = f"not cleared for {policy.data} data, only for {_words(attested.data)}"
        missing = self._grants.difference(attested.grants)
        if missing:
            failed["grants"] = f"lacks {_words(sorted(missing))}"
        if policy.local_only and attested.external:
            failed["local"] = "hands the task to a service outside the site"
        if policy.max_cost is not None and record.cost.money > policy.max_cost:
            failed["cost"] = (
                f"costs {record.cost.money:g}, at most {policy.max_cost:g} allowed:"
                f" {record.cost.money - policy.max_cost:g} too dear"
            )
        refusal = self._request.effect.refusal(record)
        if refusal is not None:
            failed["rules"] = refusal
        return failed

    def _failed_fit(self, record: CatalogRecord) -> dict[str, str]:
        failed: dict[str, str] = {}
        function, resources = self._request.function, record.resources
        if function is not None and not function.admits(record.version):
            failed["version"] = f"{record.version} is not in {function.range}"
        missing = self._skills.difference(record.skills)
        if missing:
            failed["skills"] = f"lacks {_words(sorted(missing))}"
        mismatch = self._mismatch(record)
        if mismatch is not None:
            failed["schema"] = mismatch
        limit = resources.max_input_bytes
        if limit is not None and self._size_bytes > limit:
            failed["size"] = (
                f"input of {self._size_bytes} bytes, takes {limit}:"
                f" {self._size_bytes - limit} too many"
            )
        context = resources.context_tokens
        if context is not None and self._size_bytes > context * MOST_TOKEN_BYTES:
            least = self._size_bytes / MOST_TOKEN_BYTES
            failed["context"] = (
                f"at least {least:.0f} tokens, the context holds {context}:"
                f" {least - context:.0f} too many"
            )
        return failed

    def _mismatch(self, record: CatalogRecord) -> str | None:
        """Return why the input does not fit the schema; equal schemas are checked once.

        Nodes that offer one function bring equal schemas in objects of their own. They are told
        apart by their text, not by ``==``: to Python 1 and true are equal.
        """
        schema = record.input_schema
        if schema is None:
            return None
        text = repr(schema)
        if text not in self._mismatches:
            try:
                value = effective_input(self._task.text, self._task.input, schema)
                check_input(value, schema, bounds=_BOUNDS)
                self._mismatches[text] = None
            except InvalidTask as error:
                self._mismatches[text] = error.message
        return self._mismatches[text]

    def _failed_moment(self, offer: Offer) -> dict[str, str]:
        record, node, now = offer.record, offer.node, self._now
        failed = _failed_presence(record, node, now)
        if node.presence == "draining":
            failed["open"] = "draining"
        elif node.cordoned:
            failed["open"] = "cordoned"
        if node.full and node.load is not None:
            failed["capacity"] = (
                f"all {node.load.capacity} places and the queue of {node.load.queue_limit} are"
                " taken"
            )
        elif not node.has_room(record, session=node.node == self._request.prefer):
            given = node.given[record.function]
            failed["capacity"] = f"it has {given} tasks of this function, more would wait there"
        lacking = memory_lacking(record, node)
        if lacking is not None:
            failed["memory"] = lacking
        blocked = (
            self._breakers.blocked(record.node, record.function, now) if self._breakers else None
        )
        if blocked is not None and node.just_lost(now):  # what it had is what was lost
            failed["lost"] = f"{tell_loss(node, now)}; {blocked}"
        elif blocked is not None:
            failed["breaker"] = blocked
        return failed

    def _failed_deadline(self, finish: Finish, node: NodeView) -> dict[str, str]:
        left_ms = max(0, self._request.deadline - self._now)
        if node.wake_at is not None and self._now + left_ms < node.wake_at + finish.least_ms:
            return {"deadline": f"{left_ms} ms are left"}
        if finish.least_ms <= left_ms:
            return {}
        figures = f"wait {finish.least_wait_ms:.0f}, run {finish.least_run_ms:.0f}"
        return {
            "deadline": f"done in {finish.least_ms:.0f} ms at the soonest ({figures}),"
            f" {left_ms} ms are left"
        }


def _failed_presence(record: CatalogRecord, node: NodeView, now: int) -> dict[str, str]:
    failed: dict[str, str] = {}
    if node.asleep:
        failed["asleep"] = tell_sleep(node, now)
    elif not node.live and node.just_lost(now):
        failed["lost"] = tell_loss(node, now)
    elif not node.live:
        failed["liveness"] = _absence(node)
    lapses = record.expires_at
    if "liveness" not in failed and lapses is not None and lapses <= now:
        failed["liveness"] = f"the lease of the capability ran out {now - lapses} ms ago"
    return failed


def tell_sleep(node: NodeView, now: int) -> str:
    """Say until when a node sleeps, at ``now`` (UTC milliseconds)."""
    if node.wake_at is None:
        return "asleep, and does not say until when"
    at = datetime.fromtimestamp(node.wake_at / 1000, UTC)
    away_s = max(0, node.wake_at - now) / 1000
    return f"asleep until {at:%H:%M:%S} UTC, {away_s:.0f} s from now"


def tell_loss(node: NodeView, now: int) -> str:
    """Say when a node was lost, and until when it is waited for, at ``now`` (UTC milliseconds)."""
    since_s, left_s = (now - (node.lost_at or 0)) / 1000, ((node.back_by or 0) - now) / 1000
    return f"{since_s:.1f} s ago, and may be back within {left_s:.1f} s"


def _absence(node: NodeView) -> str:
    if node.presence == "sleeping" and node.silent:
        return "went to sleep and did not wake in time"
    if node.revoked:
        return "revoked"
    return "silent" if node.silent else (node.presence or "never heard of")


def memory_lacking(record: CatalogRecord, node: NodeView) -> str | None:
    """Say how much memory a node lacks for a function of it that has no instance; None: none."""
    load, need = node.load, record.resources.memory_bytes
    if load is None or load.memory_free_bytes is None or need is None:
        return None
    if node.function(record.function).instances or need <= load.memory_free_bytes:
        return None
    free = load.memory_free_bytes
    return f"needs {need} bytes, {free} are free: {need - free} too few"


def _words(names: Sequence[str]) -> str:
    """Name some of many: a task may list thousands, and each candidate has its reason kept."""
    if len(names) > _NAMED:
        return f"{', '.join(names[:_NAMED])} and {len(names) - _NAMED} more"
    return ", ".join(names) if names else "none"
