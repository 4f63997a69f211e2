"""The node's side of attestation: challenges in, evidence out."""

import asyncio
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import structlog

from broker.lifecycle import Service
from broker.session.base import Message, Session
from capability_schemas.errors import FoamError
from capability_schemas.functions import FunctionSpec
from capability_schemas.ids import now_ms
from capability_schemas.signing import SigningKey, digest, sign
from capability_schemas.topics import TopicKind, Topics
from capability_schemas.trust import (
    EVIDENCE_LIMIT_BYTES,
    MAX_MEASUREMENTS,
    TRUST_LIMIT_BYTES,
    Evidence,
    Statement,
    TrustState,
    read_trust,
)
from capability_schemas.wire import decode, encode
from node_agent.attestation.base import EvidenceSource, Findings
from node_agent.attestation.software import boot_id

_GAP_S: Final = 1.0
"""Least time between two pieces of evidence: a challenge costs a node some tens of milliseconds."""

_LOOK_S: Final = 2.0
_QUEUE: Final = 20_000
_SOURCE_LIMIT_S: Final = 40.0
_MOST_STATEMENTS: Final = 16
_NO_NAME: Final = re.compile(r"[^A-Za-z0-9._:@/+ -]")
_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Offer:
    """What a node offers at the moment.

    Attributes:
        functions: Its functions.
        models: Digests of their models' files by name, as far as they are known.
    """

    functions: tuple[FunctionSpec, ...]
    models: Mapping[str, str]


class Attester(Service):
    """Publishes the evidence of a node; owned by the event loop it was started on.

    Retained, and published again on every connection. A source that fails, or takes longer than 40
    seconds, is left out of the evidence, and the log says so.

    Args:
        session: The node's session.
        topics: The site's topics.
        node: The node.
        epoch: Start of the agent, UTC milliseconds.
        key: Signs the evidence.
        offer: Returns what the node offers; asked every two seconds.
        sources: Further sources; the functions and models are measured here.
        registries: Returns public keys of the registries by id, whose challenges count; with none,
            the broker's word has to do, for a challenge can do no harm.
        clock: UTC milliseconds.
    """

    def __init__(
        self,
        *,
        session: Session,
        topics: Topics,
        node: str,
        epoch: int,
        key: SigningKey,
        offer: Callable[[], Offer],
        sources: Sequence[EvidenceSource],
        registries: Callable[[], Mapping[str, str]],
        clock: Callable[[], int] = now_ms,
    ) -> None:
        super().__init__(service_id=node)
        self._session = session
        self._topics = topics
        self._node = node
        self._epoch = epoch
        self._key = key
        self._offer = offer
        self._sources = tuple(sources)
        self._registries = registries
        self._clock = clock
        self._challenge: str | None = None
        self._wake = asyncio.Event()
        self._busy: dict[str, asyncio.Future[Findings]] = {}
        self.made = 0

    async def _on_start(self) -> None:
        await self._session.subscribe(
            self._topics.filter(TopicKind.TRUST), self._on_trust, queue_limit=_QUEUE
        )
        self.spawn(self._show(), name="evidence")

    async def _on_trust(self, message: Message) -> None:
        if message.topic != self._topics.build(TopicKind.TRUST, member=self._node):
            return  # the filter is that of the agent, which hears of everybody who was thrown out
        if not message.payload:
            return
        try:
            state = self._read(message.payload)
        except FoamError as error:
            _log.warning("attestation.challenge_ignored", node=self._node, error=error.message)
            return
        if state.challenge is not None and state.challenge != self._challenge:
            self._challenge = state.challenge
            self._wake.set()

    def _read(self, payload: bytes) -> TrustState:
        if registries := self._registries():
            return read_trust(payload, member=self._node, registries=registries)
        return decode(TrustState, payload, limit_bytes=TRUST_LIMIT_BYTES)

    async def _show(self) -> None:
        """Make evidence at the start, and whenever the challenge or the offer is another one."""
        topic = self._topics.build(TopicKind.EVIDENCE, node=self._node)
        shown: tuple[str | None, Offer] | None = None
        while True:
            self._wake.clear()
            wanted = self._challenge, self._offer()
            if wanted != shown:
                shown = wanted
                payload = await self._payload(*wanted)
                self._session.announce(topic, lambda payload=payload: payload)  # type: ignore[misc]  # bound at once
                self.made += 1
                await asyncio.sleep(_GAP_S)
            try:
                async with asyncio.timeout(_LOOK_S):
                    await self._wake.wait()
            except TimeoutError:
                continue

    async def _payload(self, challenge: str | None, offer: Offer) -> bytes:
        measurements = offered(offer)
        platform: dict[str, str] = {}
        statements: list[Statement] = []
        for source in self._sources:
            found = await self._collect(source, challenge)
            if found is None:
                continue
            measurements |= {
                _name(f"{source.name}/{what}"): value for what, value in found.measurements.items()
            }
            platform |= found.platform
            if found.statement is not None and len(statements) < _MOST_STATEMENTS:
                statements.append(Statement(source=source.name, data=dict(found.statement)))
        fields: dict[str, Any] = {
            "node": self._node,
            "epoch": self._epoch,
            "at": self._clock(),
            "challenge": challenge,
            "boot": boot_id(),
        }
        try:
            evidence = Evidence(
                **fields,
                platform=platform,
                measurements=folded(measurements),
                statements=tuple(statements),
            )
            payload = encode(sign(evidence, self._key))
        except (FoamError, ValueError) as error:  # of a source: the measurements are ours
            _log.warning("attestation.sources_left_out", node=self._node, error=str(error))
            payload = b""
        if not 0 < len(payload) <= EVIDENCE_LIMIT_BYTES:
            short = Evidence(**fields, measurements=folded(offered(offer)))
            payload = encode(sign(short, self._key))
        return payload

    async def _collect(self, source: EvidenceSource, challenge: str | None) -> Findings | None:
        before = self._busy.get(source.name)
        if before is not None and not before.done():
            _log.warning("attestation.source_hangs", node=self._node, source=source.name)
            return None
        looking = asyncio.get_running_loop().run_in_executor(None, source.collect, challenge)
        self._busy[source.name] = looking
        try:
            async with asyncio.timeout(_SOURCE_LIMIT_S):
                return await asyncio.shield(looking)
        except TimeoutError:
            problem = f"took longer than {_SOURCE_LIMIT_S:.0f} s"
        except Exception as exc:  # noqa: BLE001 - supervision boundary: code of another distribution
            problem = str(exc)
        _log.warning(
            "attestation.source_failed", node=self._node, source=source.name, error=problem
        )
        return None


def offered(offer: Offer) -> dict[str, str]:
    """Return the digests of what a node offers: how each function is declared, and each model."""
    found = {
        _name(f"function/{spec.name}"): digest(
            {
                "runtime": spec.runtime,
                "entry": spec.entry and spec.entry.rpartition("/")[2],
                "code": spec.code,
                "options": spec.model_dump(mode="json")["options"],
                "model": spec.model and spec.model.rpartition("/")[2],
            }
        )
        for spec in offer.functions
    }
    return found | {
        _name(f"model/{model.rpartition('/')[2]}"): value for model, value in offer.models.items()
    }


def folded(measurements: Mapping[str, str]) -> dict[str, str]:
    """Put the largest groups into one digest each where there are more than may be shown.

    Args:
        measurements: Digests by ``group/name``.

    Returns:
        At most ``MAX_MEASUREMENTS`` of them; a group that was put together stands as ``group/all``.
    """
    found = dict(measurements)
    while len(found) > MAX_MEASUREMENTS:
        groups: dict[str, dict[str, str]] = {}
        for what, value in found.items():
            groups.setdefault(what.partition("/")[0], {})[what] = value
        name, largest = max(groups.items(), key=lambda group: len(group[1]))
        if len(largest) == 1:  # so many groups: they are one
            return {"all": digest(found)}
        found = {what: value for what, value in found.items() if what not in largest}
        found[f"{name}/all"] = digest(largest)
    return found


def _name(text: str) -> str:
    return _NO_NAME.sub("_", text)[:200]
