"""What a node says about itself unasked: its state, its claims and its load."""

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import structlog

from broker.lifecycle import Service
from broker.session.base import Session, Will
from capability_schemas.capability import CapabilityClaim, ModelInfo, Resources
from capability_schemas.errors import BrokerUnavailable, ConfigurationError, Overloaded
from capability_schemas.functions import FunctionSpec
from capability_schemas.node import LOST, NodeLoad, NodeState, Presence
from capability_schemas.provenance import Signer
from capability_schemas.signing import SigningKey, sign
from capability_schemas.topics import TopicKind, Topics
from capability_schemas.wire import encode
from node_agent.continuation import continues_of
from node_agent.declaration.sources import Stamp, file_digest, stamp_of
from node_agent.settings import NodeSettings

AGENT_VERSION: Final = "0.1.0"
"""Version of the node agent, told with its state."""

_RENEWALS: Final = 3
"""Renewals of a claim within one lease: two may be lost."""

_FAREWELL_LIMIT_S: Final = 3.0
_NEWS: Final = 0.25
"""Relative change of a measured time from which it is told before the next renewal."""

_FIRST_MS: Final = 20.0
_TOKEN_MS: Final = 1.0
"""Least change of a time to the first output, and of a time per token, that is told at once."""

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


def offline_will(
    *,
    topics: Topics,
    node: str,
    epoch: int,
    at: int,
    since: int | None = None,
    place: str | None = None,
) -> Will:
    """Return the last will of a node: it is offline, if this epoch is still its latest.

    Args:
        topics: The site's topics.
        node: The node.
        epoch: The agent's epoch, the one its births carry.
        at: Time of the connection, UTC milliseconds.
        since: When the node was announced first, UTC milliseconds; None: not yet.
        place: Where it runs, in words.
    """
    state = NodeState(
        node=node,
        state="offline",
        epoch=epoch,
        at=at,
        reason=LOST,
        since=since,
        place=place,
    )
    return Will(topics.build(TopicKind.NODE_STATE, node=node), encode(state), qos=1, retain=True)


def is_news(old: Resources | None, new: Resources) -> bool:
    """Tell whether measured figures differ enough from those last told to tell them.

    Times jitter, and every claim costs the registry and all routers some work: those told are put
    right by the next renewal anyway.
    """
    if old is None:
        return True
    times = ((old.first_ms, new.first_ms, _FIRST_MS), (old.token_ms, new.token_ms, _TOKEN_MS))
    for before, now, least in times:
        if before is None or now is None:
            if before is not now:
                return True
        elif abs(now - before) > max(least, _NEWS * before):
            return True
    untimed = {"first_ms": None, "token_ms": None}
    return old.model_copy(update=untimed) != new.model_copy(update=untimed)


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
        signer: Its passport is shown with the state.
        epoch: Start of the agent, UTC milliseconds.
        place: Where it runs, in words.
        load: Makes the load message.
        model_file: Describes the model of a function, as far as is known while nothing runs, and
            names its file; None when there is none; blocks.
        model_digest: Returns the digest of such a file where it is known, else None: then the
            file is read.
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
        signer: Signer | None = None,
        epoch: int,
        place: str | None = None,
        load: Callable[[], NodeLoad],
        model_file: Callable[[FunctionSpec], tuple[ModelInfo, Path] | None],
        model_digest: Callable[[Path], str | None] = lambda _: None,
        clock: Callable[[], int],
    ) -> None:
        super().__init__(service_id=settings.node)
        self._session = session
        self._topics = topics
        self._settings = settings
        self._functions = dict(functions)
        self._key = key
        self._signer = signer
        self._epoch = epoch
        self._place = place
        self._load = load
        self._model_file = model_file
        self._model_digest = model_digest
        self._clock = clock
        self._presence: Presence = "birth"
        self._reason = ""
        self._since: int | None = None
        self._sleep_ms: int | None = None
        self._muted = False
        self._revisions: dict[str, int] = {}  # kept for ever: a function may come back
        self._claims: dict[str, tuple[int, bytes]] = {}
        self._models: dict[str, ModelInfo] = {}
        self._resources: dict[str, Resources] = {}
        self._told: dict[str, Resources] = {}
        self._digests: dict[str, tuple[Stamp | None, str]] = {}  # by model
        self._digesting: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()

    @property
    def state(self) -> Presence:
        """The state last announced."""
        return self._presence

    @property
    def model_digests(self) -> dict[str, str]:
        """Digests of the files of the models that are known by now, by name of the model."""
        return {model: digest for model, (_, digest) in self._digests.items()}

    def set_state(self, state: Presence, reason: str = "") -> None:
        """Announce a state of the node."""
        self._presence, self._reason = state, reason
        self.show_state()
        self.hurry()

    @property
    def since(self) -> int | None:
        """When the node was announced first, UTC milliseconds; None: not yet."""
        return self._since

    def sleep(self, asleep_s: float) -> int:
        """Announce that the node is away for a while, and lease its claims beyond that.

        Args:
            asleep_s: For how long, seconds.

        Returns:
            When it will be back, UTC milliseconds.
        """
        self._sleep_ms = round(1000 * asleep_s)
        for function in self._functions:
            self._announce_claim(function, renew=True)
        self.set_state("sleeping", "nothing to do")
        return self._clock() + self._sleep_ms

    def wake(self) -> None:
        """Take back that the node is away, before it connects again."""
        self._sleep_ms = None
        self.set_state("birth")

    def show_state(self) -> None:
        """Announce the state again, with the passport as it is now."""
        if self._muted:
            return
        topic = self._topics.build(TopicKind.NODE_STATE, node=self._settings.node)
        self._session.announce(topic, self._state_payload)

    def measured(self, function: str, model: ModelInfo | None, resources: Resources) -> None:
        """Take what running a function has shown; told at once when it is news.

        Args:
            function: Its name; one that was withdrawn meanwhile is passed over.
            model: The model behind it, if any.
            resources: What it needs and how fast it is.
        """
        spec = self._functions.get(function)
        if spec is None:
            return
        self._resources[function] = resources
        if model is not None and spec.model in self._digests:
            model = model.model_copy(update={"digest": self._digests[spec.model][1]})
        if model is not None and model != self._models.get(function):
            self._models[function] = model
        elif not is_news(self._told.get(function), resources):
            return
        self._announce_claim(function, renew=True)

    def replace(self, functions: Mapping[str, FunctionSpec]) -> None:
        """Claim other functions from now on: withdraw what is gone, renew what has changed.

        Args:
            functions: All that the node offers now, by name.
        """
        before, self._functions = self._functions, dict(functions)
        for function in before.keys() - functions.keys():
            self._session.announce(self._forget(function), lambda: b"")
        for function, spec in functions.items():
            if before.get(function) != spec:
                self._forget(function)
                self._announce_claim(function, renew=True)
        if self._digesting is not None:
            self._digesting.cancel()
        self._digesting = self.spawn(self._digest_models(), name="digests")
        self.hurry()

    def hurry(self) -> None:
        """Have the load sent soon: something changed that routers should know."""
        self._changed.set()

    def mute(self) -> None:
        """Say nothing any more, not even goodbye: the topics are another process's now."""
        self._muted = True
        node = self._settings.node
        self._session.retract(self._topics.build(TopicKind.NODE_STATE, node=node))
        for function in self._functions:
            self._session.retract(self._forget(function))

    async def farewell(self, reason: str) -> None:
        """Withdraw the claims and say that the node is offline; bounded, and best effort."""
        if self._muted:
            return
        node = self._settings.node
        state_topic = self._topics.build(TopicKind.NODE_STATE, node=node)
        self._presence, self._reason = "offline", reason
        try:
            for function in self._functions:
                topic = self._forget(function)
                self._session.retract(topic)
                self._session.post(topic, b"", retain=True)
            self._session.retract(state_topic)
            await self._session.publish(
                state_topic, self._state_payload(), retain=True, timeout_s=_FAREWELL_LIMIT_S
            )
        except (BrokerUnavailable, Overloaded) as exc:
            _log.warning("node.farewell_unheard", node=node, error=exc.message)

    async def _on_start(self) -> None:
        self._since = self._clock()
        self.set_state("birth")
        for function in self._functions:
            self._announce_claim(function, renew=True)
        self.spawn(self._renew_claims(), name="claims")
        self.spawn(self._send_load(), name="load")
        self._digesting = self.spawn(self._digest_models(), name="digests")

    def _state_payload(self) -> bytes:
        now = self._clock()
        asleep = self._presence == "sleeping" and self._sleep_ms is not None
        return encode(
            NodeState(
                node=self._settings.node,
                state=self._presence,
                epoch=self._epoch,
                at=now,
                reason=self._reason,
                since=self._since,
                place=self._place,
                wake_at=now + (self._sleep_ms or 0) if asleep else None,
                agent=AGENT_VERSION,
                load_interval_s=self._settings.load_interval_s,
                passport=self._signer.passport if self._signer is not None else None,
            )
        )

    def _forget(self, function: str) -> str:
        """Forget what was claimed for a function; returns the topic of its claim."""
        for known in (self._claims, self._models, self._resources, self._told):
            known.pop(function, None)
        node = self._settings.node
        return self._topics.build(TopicKind.CAPABILITY, node=node, function=function)

    def _announce_claim(self, function: str, *, renew: bool) -> None:
        if (
            self._presence == "offline" or self._muted
        ):  # what is learnt late must not bring a claim back
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
        lease_ms = round(self._settings.claim_lease_s * 1000) + (self._sleep_ms or 0)
        made = self._claims.get(function)
        if made is not None and made[0] - now > lease_ms // 2:
            return made[1]
        self._revisions[function] = self._revisions.get(function, 0) + 1
        spec = self._functions[function]
        self._told[function] = self._figures(spec)
        claim = self._claim(spec, expires_at=now + lease_ms)
        if self._key is not None:
            claim = sign(claim, self._key)
        payload = encode(claim)
        self._claims[function] = (now + lease_ms, payload)
        return payload

    def _figures(self, spec: FunctionSpec) -> Resources:
        """Return what was measured, or else declared."""
        return self._resources.get(spec.name) or Resources(
            memory_bytes=spec.limits.memory_bytes, concurrency=spec.concurrency
        )

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
            resources=self._told[spec.name],
            cost=spec.cost,
            policy=spec.policy,
            model=self._models.get(spec.name),
            continues=continues_of(spec),
            idempotent=spec.idempotent,
            expires_at=expires_at,
        )

    async def _renew_claims(self) -> None:
        while True:
            await asyncio.sleep(self._settings.claim_lease_s / _RENEWALS)
            for function in tuple(self._functions):
                self._announce_claim(function, renew=True)

    async def _send_load(self) -> None:
        """Send the load at every interval, and soon after a change."""
        topic = self._topics.build(TopicKind.NODE_LOAD, node=self._settings.node)
        while True:
            self._changed.clear()
            if self._muted:
                return
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
        for spec in tuple(self._functions.values()):
            if spec.model is None:
                continue
            try:
                found = await asyncio.to_thread(self._digest, spec)
            except (OSError, ConfigurationError) as exc:
                _log.warning("model.digest_failed", model=spec.model, error=str(exc))
                continue
            if found is not None:
                model, stamp, digest = found
                self._digests[spec.model] = stamp, digest
                self.measured(spec.name, self._models.get(spec.name, model), self._figures(spec))

    def _digest(self, spec: FunctionSpec) -> tuple[ModelInfo, Stamp | None, str] | None:
        """Describe and digest a model, the latter only when its file has changed; blocks."""
        found = self._model_file(spec)
        if found is None:
            return None
        model, path = found
        stamp = stamp_of(path)
        before = self._digests.get(str(spec.model))
        if before is not None and before[0] == stamp:
            return model, *before
        return model, stamp, self._model_digest(path) or file_digest(path)
