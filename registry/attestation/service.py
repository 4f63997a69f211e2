"""Attestation on the wire: challenges out, evidence in, rights taken and given back."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import structlog

from broker.access.orders import Requester
from broker.audit import Budget
from broker.lifecycle import Service
from broker.session.base import Message, Session, Subscription
from capability_schemas.errors import AccessDenied, FoamError, InvalidTask, NotFound, TooLarge
from capability_schemas.ids import now_ms
from capability_schemas.signing import SigningKey
from capability_schemas.topics import TopicKind, Topics
from capability_schemas.trust import EVIDENCE_LIMIT_BYTES, Evidence
from registry.admin import Verb
from registry.admission import Identities, Identity
from registry.attestation.judgement import Judgement, challenge_of, judge_evidence, read_evidence
from registry.attestation.policy import AttestationFile, reference_toml
from registry.trust import Opinion, TrustBoard

_QUEUE: Final = 20_000
_LOOK_S: Final = 1.0
_BURST: Final = 3
_PER_SECOND: Final = 1.0
_PACE_S: Final = 0.25
_MISSING: Final = "it has shown no evidence yet"
_PAGE: Final = 500
_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Shown:
    """What a node has shown.

    Attributes:
        key: The public key it is shown by: another key is another machine, which inherits nothing.
        evidence: The newest that was sound.
        window: Number of the window whose challenge it answers; None: of none that counts.
        window_ms: How long windows were then: with others the numbers mean other times.
        problem: What was wrong with what came last, if anything.
    """

    key: str
    evidence: Evidence | None = None
    window: int | None = None
    window_ms: int = 0
    problem: str = ""


@dataclass(frozen=True, slots=True)
class _Judged:
    """A judgement, and what it was made of besides evidence: it says nothing of another identity.

    Attributes:
        identity: The node's key, and what the operator vouches for.
        judgement: What came out.
    """

    identity: Identity
    judgement: Judgement


class AttestationService(Service):
    """Judges evidence; entered with the registry's session, and owned by its event loop.

    Evidence counts by the challenge it answers, not by the clock of its node: until the window
    after that of the challenge ends. What is heard right after a start is taken in for ``settle_s``
    before anybody loses a right that it had: the broker kept the evidence, the registry did not.

    Of each node the newest piece waits, and about one a second is looked at: a node that floods
    delays nobody but itself. A judgement holds for the key and the attested rights that it was made
    of; the evidence of another key is dropped.

    Args:
        session: Connection of the registry.
        topics: The site's topics.
        file: What is asked; loaded by the caller.
        key: Makes the challenges; the same at all registries that judge by the same file, so that
            evidence counts with the next one too.
        identities: Looks nodes up.
        nodes: Returns the names of the nodes that are members.
        books: Returns what ``identities`` looks into; another object when anything has changed
            there.
        board: Where trust is said.
        emit: Publishes an event: kind and JSON fields.
        changed: Told of each node whose rights are others now.
        settle_s: See above, seconds.
        clock: UTC milliseconds.
    """

    def __init__(
        self,
        *,
        session: Session,
        topics: Topics,
        file: AttestationFile,
        key: SigningKey,
        identities: Identities,
        nodes: Callable[[], list[str]],
        board: TrustBoard,
        emit: Callable[[str, dict[str, Any]], None],
        changed: Callable[[str], None],
        books: Callable[[], object] = object,
        settle_s: float = 2.0,
        clock: Callable[[], int] = now_ms,
    ) -> None:
        super().__init__(service_id=topics.site)
        self._session = session
        self._topics = topics
        self._file = file
        self._key = key
        self._identities = identities
        self._nodes = nodes
        self._books = books
        self._board = board
        self._emit = emit
        self._changed = changed
        self._settle_s = settle_s
        self._clock = clock
        self._shown: dict[str, _Shown] = {}
        self._judged: dict[str, _Judged] = {}
        self._waiting: dict[str, bytes | TooLarge] = {}
        self._came = asyncio.Event()
        self._pace = Budget(time.monotonic, burst=_BURST, per_second=_PER_SECOND, remembered=_QUEUE)
        self._subscription: Subscription | None = None
        self._missed = False
        self._read: object = None
        self._settled = False
        self._window = -1
        self.counts: Counter[str] = Counter()

    @property
    def verbs(self) -> Mapping[str, Verb]:
        """What operators may ask about evidence."""
        return {
            "attestation": self._show,
            "attestation_reference": self._reference,
        }

    def narrowed(self, node: str) -> Identity | str | None:
        """Look a node up, without the rights that its evidence does not carry at the moment."""
        found = self._identities(node)
        if not isinstance(found, Identity) or not self._file.policy.rules:
            return found
        known = self._judged.get(node)
        fits = known is not None and known.identity == found
        judged = known.judgement if known and fits else self._judgement(node, found)
        if not judged.withheld:
            return found
        return replace(found, attested=judged.withheld.taken_from(found.attested))

    async def _on_start(self) -> None:
        await self._subscribe()
        self.spawn(self._take_waiting(), name="evidence")
        self.spawn(self._look(), name="look")

    async def _subscribe(self) -> None:
        try:
            self._subscription = await self._session.subscribe(
                self._topics.filter(TopicKind.EVIDENCE),
                self._on_evidence,
                queue_limit=_QUEUE,
                on_overflow=self._overflowed,
            )
        except AccessDenied as error:  # at a broker whose rules are not ours
            _log.warning("attestation.evidence_unseen", error=error.message)

    def _overflowed(self, message: Message) -> None:
        """Remember that kept evidence has to be asked for again; told by the session."""
        self.counts["dropped"] += 1
        if not self._missed:
            _log.warning("attestation.overflow", topic=message.topic)
        self._missed = True

    async def _ask_again(self) -> None:
        """Subscribe anew: the broker then hands out what it keeps."""
        self._missed = False
        if self._subscription is not None:
            await self._session.unsubscribe(self._subscription)
        await self._subscribe()

    async def _look(self) -> None:
        """Follow the file, the members and the windows."""
        await asyncio.sleep(self._settle_s)
        self._settled = True
        while True:
            edited = await asyncio.to_thread(self._file.refresh)
            window = self._window_now()
            everybody = edited or window != self._window
            self._window = window
            books = self._books()
            others, self._read = books is not self._read, books
            members = self._nodes()
            for node in members:
                if everybody or node not in self._judged or (others and self._outdated(node)):
                    self._judge(node)
            for node in self._judged.keys() - set(members):
                self._forget(node)
            if self._missed:
                await self._ask_again()
            await asyncio.sleep(_LOOK_S)

    def _outdated(self, node: str) -> bool:
        return self._judged[node].identity != self._identities(node)

    def _forget(self, node: str) -> None:
        """It is no member any more: nothing is said of it, and what it claimed goes."""
        self._shown.pop(node, None)
        if self._judged.pop(node, None) is not None:
            self._board.judge(node, None)
            self._changed(node)

    # ---- evidence

    async def _on_evidence(self, message: Message) -> None:
        """Put it where the newest of its node waits: at once, so that no queue grows."""
        if not message.payload:
            return
        try:
            node = self._topics.parse(message.topic).levels["node"]
            if node not in self._waiting and self._identities(node) is None:
                raise AccessDenied(f"node {node} has no signing key on record: enroll it first")
        except FoamError as error:
            self.counts["refused"] += 1
            if self._pace.spend(message.topic):
                _log.warning("attestation.refused", topic=message.topic, error=error.message)
            return
        if node in self._waiting:
            self.counts["superseded"] += 1
        size = len(message.payload)
        fits = size <= EVIDENCE_LIMIT_BYTES
        self._waiting[node] = (
            message.payload
            if fits
            else TooLarge("message", size_bytes=size, limit_bytes=EVIDENCE_LIMIT_BYTES)
        )
        self._came.set()

    async def _take_waiting(self) -> None:
        """Look at what waits, of each node about one piece a second."""
        while True:
            await self._came.wait()
            self._came.clear()
            for node in tuple(self._waiting):
                if not self._pace.spend(node):
                    continue
                try:
                    self._take(node, self._waiting.pop(node))
                except Exception:  # noqa: BLE001 - supervision boundary: one odd node must not end the registry
                    self.counts["failed"] += 1
                    _log.exception("attestation.failed", node=node)
                await asyncio.sleep(0)
            if self._waiting:
                await asyncio.sleep(_PACE_S)
                self._came.set()

    def _take(self, node: str, came: bytes | TooLarge) -> None:
        known = self._identities(node)
        if known is None:  # it was thrown out meanwhile
            return
        key = known.public_key if isinstance(known, Identity) else known
        shown = self._shown_by(node, key)
        try:
            if isinstance(came, TooLarge):
                raise came
            evidence = read_evidence(came, node=node, key=key, now=self._clock())
            if shown.evidence is not None and evidence.at < shown.evidence.at:
                raise AccessDenied("it is older than what was shown before: it was repeated")
        except FoamError as error:
            self.counts["refused"] += 1
            self._shown[node] = replace(shown, problem=f"its evidence is refused: {error.message}")
            _log.warning("attestation.refused", node=node, error=error.message)
        else:
            self.counts["taken"] += 1
            window = self._answered(node, evidence.challenge)
            stale = "" if window is not None else "its evidence answers no challenge that counts"
            if window is None and self._counts(shown):
                # What counts stays: the challenge of before may be on its way to be answered anew.
                self._shown[node] = replace(shown, problem=stale)
            else:
                window_ms = self._file.policy.window_ms
                self._shown[node] = _Shown(key, evidence, window, window_ms, stale)
        if self._settled:
            self._judge(node)

    def _shown_by(self, node: str, key: str) -> _Shown:
        """Return what a node has shown with this key."""
        shown = self._shown.get(node)
        return shown if shown is not None and shown.key == key else _Shown(key)

    def _shown_now(self, node: str) -> _Shown:
        """Return what a node has shown with the key that is on record."""
        known = self._identities(node)
        return self._shown_by(
            node, known.public_key if isinstance(known, Identity) else known or ""
        )

    def _answered(self, node: str, challenge: str | None) -> int | None:
        """Return the window whose challenge this is: the present one or the one before."""
        now = self._window_now()
        for window in (now, now - 1):
            if self._challenge(node, window) == challenge:
                return window
        return None

    def _counts(self, shown: _Shown) -> bool:
        return (
            shown.window is not None
            and shown.window_ms == self._file.policy.window_ms
            and shown.window >= self._window_now() - 1
        )

    def _challenge(self, node: str, window: int) -> str:
        return challenge_of(
            self._key,
            site=self._topics.site,
            node=node,
            window=window,
            window_ms=self._file.policy.window_ms,
        )

    def _window_now(self) -> int:
        return self._clock() // self._file.policy.window_ms

    # ---- judgement

    def _judgement(self, node: str, identity: Identity) -> Judgement:
        shown = self._shown_by(node, identity.public_key)
        counts = self._counts(shown)
        missing = shown.problem or (_MISSING if shown.evidence is None else "its evidence ran out")
        return judge_evidence(
            self._file.policy,
            node=node,
            attested=identity.attested,
            evidence=shown.evidence if counts else None,
            missing=missing,
        )

    def _judge(self, node: str) -> None:
        """Judge a node anew; say it, and have its rights changed, when that comes out otherwise."""
        found = self._identities(node)
        if not isinstance(found, Identity):
            if found is None:
                self._forget(node)
            return
        known = self._judged.get(node)
        before = known.judgement if known is not None else None
        judged = self._judgement(node, found)
        self._judged[node] = _Judged(found, judged)
        self._board.judge(node, self._opinion(self._shown_by(node, found.public_key), node, judged))
        if known is None or known.identity != found or known.judgement.withheld != judged.withheld:
            self._changed(node)
        if before == judged or (before is None and not judged.asked):
            return
        said = {
            "node": node,
            "trusted": not judged.problems,
            "reason": "; ".join(judged.problems),
            "withheld": judged.withheld.words(),
        }
        write = _log.warning if judged.problems else _log.info
        write("attestation.judged", **said)
        self._emit("attestation", said)

    def _opinion(self, shown: _Shown, node: str, judged: Judgement) -> Opinion | None:
        if not judged.asked:
            return None
        window_ms = self._file.policy.window_ms
        until = None
        if not judged.problems and shown.window is not None:
            until = (shown.window + 2) * window_ms
        return Opinion(
            trusted=not judged.problems,
            reason="; ".join(judged.problems),
            until=until,
            challenge=self._challenge(node, self._window_now()),
        )

    # ---- verbs

    async def _show(self, args: dict[str, Any], _asker: Requester) -> Any:
        only = _node_of(args, needed=False)
        if only is not None and only not in self._nodes():
            raise NotFound(f"no node {only!r} is a member", node=only)
        rows = [self._row(node) for node in sorted(self._nodes()) if only in {None, node}]
        return {
            "file": str(self._file.path),
            "problem": self._file.problem,
            "valid_for_ms": self._file.policy.valid_for,
            "rules": len(self._file.policy.rules),
            "nodes": rows[:_PAGE],
            "more": len(rows[_PAGE:]),
        }

    def _row(self, node: str) -> dict[str, Any]:
        shown = self._shown_now(node)
        known = self._judged.get(node)
        judged = known.judgement if known is not None else Judgement(asked=False)
        state = self._board.state(node)
        row: dict[str, Any] = {
            "node": node,
            "asked": judged.asked,
            "state": ("lapsed" if judged.problems else "trusted") if judged.asked else "not asked",
            "until": state.until if state is not None else None,
            "problems": list(judged.problems),
            "withheld": judged.withheld.words(),
            "last_refusal": shown.problem,
        }
        if shown.evidence is not None:
            row["evidence"] = shown.evidence.model_dump(
                mode="json", exclude={"signature", "v"}, exclude_none=True
            )
        return row

    async def _reference(self, args: dict[str, Any], _asker: Requester) -> Any:
        node = str(_node_of(args, needed=True))
        shown = self._shown_now(node)
        if shown.evidence is None:
            raise NotFound(f"node {node!r} has shown no evidence: is it running?", node=node)
        name = args.get("name", node)
        return {
            "node": node,
            "at": shown.evidence.at,
            "toml": reference_toml(str(name), shown.evidence.measurements),
        }


def _node_of(args: dict[str, Any], *, needed: bool) -> str | None:
    if unknown := sorted(args.keys() - {"node", "name"}):
        raise InvalidTask(f"unknown argument {unknown[0]!r}; this verb takes: node")
    node = args.get("node")
    if node is None and not needed:
        return None
    if not isinstance(node, str):
        raise InvalidTask("args.node: the name of a node is needed", field="args.node")
    return node
