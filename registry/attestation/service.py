"""Attestation on the wire: challenges out, evidence in, rights taken and given back."""

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import structlog

from broker.access.orders import Requester
from broker.lifecycle import Service
from broker.session.base import Message, Session
from capability_schemas.errors import AccessDenied, FoamError, InvalidTask, NotFound
from capability_schemas.ids import now_ms
from capability_schemas.signing import SigningKey
from capability_schemas.topics import TopicKind, Topics
from capability_schemas.trust import Evidence
from registry.admin import Verb
from registry.admission import Identities, Identity
from registry.attestation.judgement import Judgement, challenge_of, judge_evidence, read_evidence
from registry.attestation.policy import AttestationFile, reference_toml
from registry.trust import Opinion, TrustBoard

_QUEUE: Final = 20_000
_LOOK_S: Final = 1.0
_MISSING: Final = "it has shown no evidence yet"
_PAGE: Final = 500
_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Shown:
    """What a node has shown.

    Attributes:
        evidence: The newest that was sound.
        window: Number of the window whose challenge it answers; None: of none that counts.
        window_ms: How long windows were then: with others the numbers mean other times.
        problem: What was wrong with what came last, if anything.
    """

    evidence: Evidence | None = None
    window: int | None = None
    window_ms: int = 0
    problem: str = ""


class AttestationService(Service):
    """Judges evidence; entered with the registry's session, and owned by its event loop.

    Evidence counts by the challenge it answers, not by the clock of its node: until the window
    after that of the challenge ends. What is heard right after a start is taken in for ``settle_s``
    before anybody loses a right that it had: the broker kept the evidence, the registry did not.

    Args:
        session: Connection of the registry.
        topics: The site's topics.
        file: What is asked; loaded by the caller.
        key: Makes the challenges.
        identities: Looks nodes up.
        nodes: Returns the names of the nodes that are members.
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
        self._board = board
        self._emit = emit
        self._changed = changed
        self._settle_s = settle_s
        self._clock = clock
        self._shown: dict[str, _Shown] = {}
        self._judged: dict[str, Judgement] = {}
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
        judged = self._judged.get(node) or self._judgement(node, found)
        if not judged.withheld:
            return found
        return replace(found, attested=judged.withheld.taken_from(found.attested))

    async def _on_start(self) -> None:
        try:
            await self._session.subscribe(
                self._topics.filter(TopicKind.EVIDENCE),
                self._on_evidence,
                queue_limit=_QUEUE,
                on_overflow=self._overflowed,
            )
        except AccessDenied as error:  # at a broker whose rules are not ours
            _log.warning("attestation.evidence_unseen", error=error.message)
        self.spawn(self._look(), name="look")

    def _overflowed(self, message: Message) -> None:
        self.counts["dropped"] += 1
        _log.warning("attestation.overflow", topic=message.topic)

    async def _look(self) -> None:
        """Follow the file, the members and the windows."""
        await asyncio.sleep(self._settle_s)
        self._settled = True
        while True:
            edited = await asyncio.to_thread(self._file.refresh)
            window = self._window_now()
            everybody = edited or window != self._window
            self._window = window
            members = self._nodes()
            for node in members:
                if everybody or node not in self._judged:
                    self._judge(node)
            for node in self._judged.keys() - set(members):
                self._judged.pop(node)
                self._shown.pop(node, None)
                self._board.judge(node, None)
            await asyncio.sleep(_LOOK_S)

    # ---- evidence

    async def _on_evidence(self, message: Message) -> None:
        if not message.payload:
            return
        try:
            node = self._topics.parse(message.topic).levels["node"]
            known = self._identities(node)
            if known is None:
                raise AccessDenied(f"node {node} has no signing key on record: enroll it first")
            key = known.public_key if isinstance(known, Identity) else known
        except FoamError as error:
            self.counts["refused"] += 1
            _log.warning("attestation.refused", topic=message.topic, error=error.message)
            return
        shown = self._shown.get(node, _Shown())
        try:
            evidence = read_evidence(message.payload, node=node, key=key, now=self._clock())
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
                self._shown[node] = _Shown(evidence, window, self._file.policy.window_ms, stale)
        if self._settled:
            self._judge(node)

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
        shown = self._shown.get(node, _Shown())
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
            return
        before = self._judged.get(node)
        judged = self._judgement(node, found)
        self._judged[node] = judged
        self._board.judge(node, self._opinion(node, judged))
        if before is not None and before == judged:
            return
        if judged.withheld != (before.withheld if before is not None else None):
            self._changed(node)
        if before is None and not judged.asked:
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

    def _opinion(self, node: str, judged: Judgement) -> Opinion | None:
        if not judged.asked:
            return None
        shown = self._shown.get(node, _Shown())
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
        shown = self._shown.get(node, _Shown())
        judged = self._judged.get(node, Judgement(asked=False))
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
        shown = self._shown.get(node)
        if shown is None or shown.evidence is None:
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
