"""What a node says about itself unasked: its state, its claims and its load."""

import asyncio
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import structlog

from broker.lifecycle import Service
from broker.session.base import Session, Will
from capability_schemas.capability import CapabilityClaim, ModelInfo, Resources
from capability_schemas.errors import BrokerUnavailable, Overloaded
from capability_schemas.functions import FunctionSpec
from capability_schemas.node import NodeLoad, NodeState, Presence
from capability_schemas.signing import SigningKey, sign
from capability_schemas.topics import TopicKind, Topics
from capability_schemas.wire import encode
from node_agent.settings import NodeSettings

AGENT_VERSION: Final = "0.1.0"
"""Version of the node agent, told with its state."""

_RENEWALS: Final = 3
"""Renewals of a claim within one lease: two may be lost."""

_FAREWELL_LIMIT_S: Final = 3.0

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


def offline_will(*, topics: Topics, node: str, epoch: int, at: int) -> Will:
    """Return the last will of a node: it is offline, if this epoch is still its latest.

    Args:
        topics: The site's topics.
        node: The node.
        epoch: The agent's epoch, the one its births carry.
        at: Time of the connection, UTC milliseconds.
    """
    state = NodeState(node=node, state="offline", epoch=epoch, at=at, reason="connection lost")
    return Will(topics.build(TopicKind.NODE_STATE, node=node), encode(state), qos=1, retain=True)


def file_digest(path: Path) -> str:
    """Return ``sha256:`` and the hex digest of a file; blocks, run it in a thread.

    Raises:
        OSError: The file cannot be read.
    """
    with path.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


class Announcer(Service):
    """Publishes state, claims and load; owned by the agent's event loop.

    Claims and state are births: retained, and published again on every connection. A claim gets a
    new revision when it changes and when it is renewed.

    Args:
        session: The node's session.
        topics: The site's topics.
        settings: The node's settings.
        functions: What the node offers.
        key: Signs the claims; they go unsigned when None.
        epoch: Start of the agent, UTC milliseconds.
        load: Makes the load message.
        clock: UTC milliseconds.
    """

    def __init__(
        self,
        *,
        session: Session,
        topics: Topics,
        settings: NodeSettings,
        functions: Mapping[str, FunctionSpec],
        key: SigningKey | None,
        epoch: int,
        load: Callable[[], NodeLoad],
        clock: Callable[[], int],
    ) -> None:
        super().__init__(service_id=settings.node)
        self._session = session
        self._topics = topics
        self._settings = settings
        self._functions = functions
        self._key = key
        self._epoch = epoch
        self._load = load
        self._clock = clock
        self._presence: Presence = "birth"
        self._reason = ""
        self._revisions = dict.fromkeys(functions, 0)
        self._claims: dict[str, tuple[int, bytes]] = {}
        self._models: dict[str, ModelInfo] = {}
        self._contexts: dict[str, int] = {}
        self._digests: dict[str, str] = {}
        self._changed = asyncio.Event()

    @property
    def state(self) -> Presence:
        """The state last announced."""
        return self._presence

    def set_state(self, state: Presence, reason: str = "") -> None:
        """Announce a state of the node."""
        self._presence, self._reason = state, reason
        topic = self._topics.build(TopicKind.NODE_STATE, node=self._settings.node)
        self._session.announce(topic, self._state_payload)
        self.hurry()

    def set_model(self, function: str, model: ModelInfo, *, context_tokens: int | None) -> None:
        """Tell which model is behind a function; a new revision when that is news."""
        if function in self._digests:
            model = model.model_copy(update={"digest": self._digests[function]})
        if self._models.get(function) == model and self._contexts.get(function) == context_tokens:
            return
        self._models[function] = model
        if context_tokens is not None:
            self._contexts[function] = context_tokens
        self._announce_claim(function, renew=True)

    def hurry(self) -> None:
        """Have the load sent soon: something changed that routers should know."""
        self._changed.set()

    async def farewell(self, reason: str) -> None:
        """Withdraw the claims and say that the node is offline; bounded, and best effort."""
        node = self._settings.node
        state_topic = self._topics.build(TopicKind.NODE_STATE, node=node)
        self._presence, self._reason = "offline", reason
        try:
            for function in self._functions:
                topic = self._topics.build(TopicKind.CAPABILITY, node=node, function=function)
                self._session.retract(topic)
                self._session.post(topic, b"", retain=True)
            self._session.retract(state_topic)
            await self._session.publish(
                state_topic, self._state_payload(), retain=True, timeout_s=_FAREWELL_LIMIT_S
            )
        except (BrokerUnavailable, Overloaded) as exc:
            _log.warning("node.farewell_unheard", node=node, error=exc.message)

    async def _on_start(self) -> None:
        self.set_state("birth")
        for function in self._functions:
            self._announce_claim(function, renew=True)
        self.spawn(self._renew_claims(), name="claims")
        self.spawn(self._send_load(), name="load")
        self.spawn(self._digest_models(), name="digests")

    def _state_payload(self) -> bytes:
        return encode(
            NodeState(
                node=self._settings.node,
                state=self._presence,
                epoch=self._epoch,
                at=self._clock(),
                reason=self._reason,
                agent=AGENT_VERSION,
                load_interval_s=self._settings.load_interval_s,
            )
        )

    def _announce_claim(self, function: str, *, renew: bool) -> None:
        if self._presence == "offline":  # what is learnt late must not bring a claim back
            return
        if renew:
            self._claims.pop(function, None)
        topic = self._topics.build(
            TopicKind.CAPABILITY, node=self._settings.node, function=function
        )
        self._session.announce(topic, lambda: self._claim_payload(function))

    def _claim_payload(self, function: str) -> bytes:
        """Return the claim as published; made anew when it is renewed or half its lease is over.

        Within a revision the bytes stay the same: equal order with other content is an alarm.
        """
        now = self._clock()
        lease_ms = round(self._settings.claim_lease_s * 1000)
        made = self._claims.get(function)
        if made is not None and made[0] - now > lease_ms // 2:
            return made[1]
        self._revisions[function] += 1
        claim = self._claim(self._functions[function], expires_at=now + lease_ms)
        if self._key is not None:
            claim = sign(claim, self._key)
        payload = encode(claim)
        self._claims[function] = (now + lease_ms, payload)
        return payload

    def _claim(self, spec: FunctionSpec, *, expires_at: int) -> CapabilityClaim:
        return CapabilityClaim(
            node=self._settings.node,
            function=spec.name,
            version=spec.version,
            epoch=self._epoch,
            revision=self._revisions[spec.name],
            description=spec.description,
            examples=spec.examples,
            skills=spec.skills,
            input_schema=spec.input_schema,
            output_schema=spec.output_schema,
            modalities=spec.modalities,
            resources=Resources(
                memory_bytes=spec.limits.memory_bytes,
                context_tokens=self._contexts.get(spec.name),
                concurrency=spec.concurrency,
            ),
            cost=spec.cost,
            policy=spec.policy,
            model=self._models.get(spec.name),
            expires_at=expires_at,
        )

    async def _renew_claims(self) -> None:
        while True:
            await asyncio.sleep(self._settings.claim_lease_s / _RENEWALS)
            for function in self._functions:
                self._announce_claim(function, renew=True)

    async def _send_load(self) -> None:
        """Send the load at every interval, and soon after a change."""
        topic = self._topics.build(TopicKind.NODE_LOAD, node=self._settings.node)
        while True:
            self._changed.clear()
            try:
                self._session.post(topic, encode(self._load()), qos=0)
            except (BrokerUnavailable, Overloaded):
                _log.debug("node.load_skipped", node=self._settings.node)
            await asyncio.sleep(self._settings.load_gap_s)
            try:
                async with asyncio.timeout(self._settings.load_interval_s):
                    await self._changed.wait()
            except TimeoutError:
                continue

    async def _digest_models(self) -> None:
        """Hash the model files in the background: a large one takes seconds, readiness does not."""
        done: dict[str, str] = {}
        for spec in self._functions.values():
            if spec.model is None:
                continue
            try:
                if spec.model not in done:
                    done[spec.model] = await asyncio.to_thread(file_digest, Path(spec.model))
            except OSError as exc:
                _log.warning("model.digest_failed", model=spec.model, error=str(exc))
                continue
            self._digests[spec.name] = done[spec.model]
            known = self._models.get(spec.name) or ModelInfo(name=Path(spec.model).stem)
            self.set_model(spec.name, known, context_tokens=self._contexts.get(spec.name))
