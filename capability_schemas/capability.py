"""Versioned capability vectors (PROTOCOL section 4): claims of nodes, records of the registry.

A claim says what one node offers under one function name. Its order is ``(epoch, revision)``: the
epoch is made when the node starts, the revision grows with every change. The registry embeds the
description and examples itself and publishes a ``CatalogRecord``, the only thing routers read. The
shape follows the Versioned Capability Vector of Federation of Agents (arXiv 2509.20175, section 3).
"""

from typing import Annotated, Any, Final, Literal

from pydantic import Field, StringConstraints, field_validator
from semantic_version import Version

from capability_schemas.ids import Identifier
from capability_schemas.task import DataClass, ShortText
from capability_schemas.wire import MAX_COUNT, Count, WireModel, WirePart

Continues = Literal["none", "restart", "skip", "prefix", "any"]
"""What becomes of a task whose node is lost, as its function declares it.

``none``: at most once, nobody else is asked once a node may have begun. ``restart``: another node
is asked as long as nothing was shown. The others go on in mid-answer: ``skip`` runs again and
passes over what was shown, after checking that it comes again (deterministic functions);
``prefix`` continues the text that was shown on a node with the very same model file; ``any`` does
so with another model, too.
"""

Utterance = Annotated[str, StringConstraints(min_length=1, max_length=2_000)]


EVERY_TENANT: Final = "*"
"""Tenant of a node that serves all of them, and those who are of none."""

Tenant = Annotated[str, StringConstraints(pattern=r"^([A-Za-z0-9_-]{1,64}|\*)$")]


def check_version(value: str) -> str:
    """Return ``value`` when it is a semantic version (semver.org 2.0.0).

    Raises:
        ValueError: It is not.
    """
    Version(value)
    return value


class EncoderSpace(WirePart):
    """Identity of a vector space; vectors of different spaces are never compared.

    Attributes:
        model: Model name.
        revision: Anything that changes the vectors: weights, quantisation, file hash.
        dimension: Number of components.
    """

    model: str
    revision: str
    dimension: Annotated[int, Field(ge=1, le=65_536)]


class Resources(WirePart):
    """Needs and guarantees of a function on its node.

    Attributes:
        memory_bytes: Memory one instance takes.
        context_tokens: Longest prompt and answer together; None for functions without tokens.
        concurrency: Tasks it runs at a time.
        first_ms: Measured time to the first output.
        token_ms: Measured time for each further token.
        max_input_bytes: Longest input it takes.
    """

    memory_bytes: Count | None = None
    context_tokens: Annotated[int, Field(ge=1, le=MAX_COUNT)] | None = None
    concurrency: Annotated[int, Field(ge=1, le=MAX_COUNT)] = 1
    first_ms: Annotated[float, Field(ge=0)] | None = None
    token_ms: Annotated[float, Field(ge=0)] | None = None
    max_input_bytes: Annotated[int, Field(ge=1, le=MAX_COUNT)] | None = None


class Cost(WirePart):
    """Price of one call.

    Attributes:
        money: In the unit the site uses.
        energy_j: Energy, joules.
    """

    money: Annotated[float, Field(ge=0, le=MAX_COUNT)] = 0.0
    energy_j: Annotated[float, Field(ge=0, le=MAX_COUNT)] = 0.0


class CapabilityPolicy(WirePart):
    """Where a node stands and what it is cleared for.

    In a claim these are wishes; the admitted record holds only what the registry attests.

    Attributes:
        zones: Zones the node belongs to.
        data: Classes of data it may see.
        grants: Rights it holds.
        external: Whether it hands the task to a service outside the site.
        tenant: Whom the node serves: members of this tenant alone; ``*`` for everybody; None for
            those who are of no tenant.
    """

    zones: tuple[ShortText, ...] = ()
    data: tuple[DataClass, ...] = ("public", "internal", "private")
    grants: tuple[ShortText, ...] = ()
    external: bool = False
    tenant: Tenant | None = None

    def serves(self, tenant: str | None) -> bool:
        """Tell whether a node of this policy serves members of a tenant; None: of no tenant."""
        return self.tenant in {tenant, EVERY_TENANT}


class ModelInfo(WirePart):
    """The model behind a function.

    Attributes:
        name: Model name.
        digest: ``sha256:`` and the hex digest of the file; None while it is being computed.
        quantisation: Weight format, as the file says.
        engine: Library that runs it.
    """

    name: str
    digest: str | None = None
    quantisation: str | None = None
    engine: str | None = None


class _Capability(WireModel):
    """Fields a claim and a record share."""

    node: Identifier
    function: Identifier
    version: Annotated[str, StringConstraints(max_length=64)]
    epoch: Count
    revision: Count
    description: Utterance
    examples: Annotated[tuple[Utterance, ...], Field(max_length=256)] = ()
    skills: Annotated[tuple[ShortText, ...], Field(max_length=128)] = ()
    input_schema: dict[str, Any] | None = None
    output_schema: dict[str, Any] | None = None
    modalities: tuple[ShortText, ...] = ("text",)
    resources: Resources = Resources()
    cost: Cost = Cost()
    policy: CapabilityPolicy = CapabilityPolicy()
    model: ModelInfo | None = None
    continues: Continues = "restart"
    idempotent: bool = False
    expires_at: Count | None = None
    embedding: str | None = None
    space: EncoderSpace | None = None
    signature: str | None = None

    _version = field_validator("version")(check_version)

    @property
    def key(self) -> tuple[str, str]:
        """``(node, function)``, the identity of a capability in the catalogue."""
        return self.node, self.function

    @property
    def order(self) -> tuple[int, int]:
        """``(epoch, revision)``; of two claims for one key the greater is the newer."""
        return self.epoch, self.revision


class CapabilityClaim(_Capability):
    """What a node says it can do.

    Attributes:
        node: The claiming node.
        function: Function name, unique on the node.
        version: Version of the function (semver).
        epoch: Start of the node's process, UTC milliseconds; grows with every start.
        revision: Grows with every change within an epoch.
        description: What it does, in words; embedded by the registry.
        examples: Utterances it should be chosen for; embedded by the registry.
        skills: Names of skills it offers.
        input_schema: JSON Schema (2020-12) of the input; anything goes when None.
        output_schema: JSON Schema of the output.
        modalities: Kinds of data it takes.
        resources: Needs and guarantees.
        cost: Price of a call.
        policy: What it would like to be attested.
        model: The model behind it.
        continues: What becomes of an answer whose node is lost.
        idempotent: Whether running it twice does no more than running it once: then a slow node
            may be overtaken by another one.
        expires_at: End of the lease, UTC milliseconds; renewed by a new revision.
        embedding: Optional own vector, base64 of little-endian float32; checked, never trusted.
        space: Space of ``embedding``.
        signature: Ed25519 over the canonical bytes.
    """


class CatalogRecord(_Capability):
    """What the registry admits: the claim checked, embedded, attested and signed.

    Attributes:
        registry: Who admitted it.
        term: In which term that registry led then; of two records of one claim, or of a claim and
            an earlier one, readers pass over the one of the lower term.
        admitted_at: When, UTC milliseconds.
        claim_digest: ``sha256:`` and the hex digest of the claim's canonical bytes.
        embedding: Unit vector of description and examples, base64 of little-endian float32.
        parts: The single vectors behind ``embedding``: base64 of int8 rows, that of name and
            description first, then one for each example; a row scaled to length 1 is the vector.
            None where nothing but the description was embedded.
        space: Space of ``embedding`` and ``parts``.
        policy: Attested, never self-claimed.
    """

    parts: str | None = None
    registry: Identifier
    term: Count | None = None
    admitted_at: int
    claim_digest: str
