"""What a node file says of the node itself: its id, and where its operator places it.

::

    [node]
    id = "press-hall"
    zones = ["hall-3"]        # where it stands
    grants = ["controls"]     # rights it holds
    data = ["public"]         # classes of data it may see; all of them when not said
    settings = { peers = ["edge-2"], keep_warm_most_s = 600 }

A node only claims these; they count once the mesh attests them. `foam up` and `foam node` on the
data folder of the mesh do so, for there the operator of the mesh wrote the file. A node that joins
from elsewhere has what ``foam device add ID --role node --zone … --grant …`` gave it.
"""

import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from capability_schemas.capability import CapabilityPolicy
from capability_schemas.errors import ConfigurationError
from capability_schemas.functions import FunctionSpec
from capability_schemas.ids import Identifier
from capability_schemas.problem import Problem, field_problems
from capability_schemas.task import DataClass, ShortText
from node_agent.declaration import Declaration
from node_agent.settings import NodeSettings

__all__ = ["NodeHead", "place_problems", "placed"]


class NodeHead(BaseModel):
    """The table ``[node]`` of a node file; a Python file or a module has only a name.

    Attributes:
        id: Id of the node; None when the file does not say.
        zones: Zones it stands in.
        grants: Rights it holds.
        data: Classes of data it may see.
        settings: Fields of `node_agent.settings.NodeSettings`, the id excepted: queue, peers, how
            long instances stay warm. They count from the start of the node on.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: Identifier | None = None
    zones: tuple[ShortText, ...] = ()
    grants: tuple[ShortText, ...] = ()
    data: tuple[DataClass, ...] = ("public", "internal", "private")
    settings: dict[str, Any] = Field(default_factory=dict)

    @field_validator("settings")
    @classmethod
    def _are_settings(cls, settings: dict[str, Any]) -> dict[str, Any]:
        if "node" in settings:
            raise ValueError("the node's id is `id` under [node]")
        try:
            NodeSettings.model_validate({"node": "any", **settings})
        except ValidationError as exc:
            raise ValueError(
                "; ".join(f"{field}: {what}" for field, what in field_problems(exc))
            ) from exc
        return settings

    def tuned(self, node: str) -> NodeSettings:
        """Return how the node behaves.

        Args:
            node: Its identity.
        """
        return NodeSettings.model_validate({"node": node, **self.settings})

    @classmethod
    def read(cls, source: str | Path) -> Self:
        """Read it; the id is that of the file, else made of the name of the file.

        Args:
            source: Node file, Python file or dotted module name.

        Raises:
            ConfigurationError: The file cannot be read, or the table has mistakes.
        """
        text = str(source)
        content: dict[str, Any] = {}
        if text.endswith(".toml"):
            try:
                content = tomllib.loads(Path(text).read_text(encoding="utf-8"))
            except OSError as exc:
                raise ConfigurationError(
                    f"node file {text}: {exc.strerror or exc}", path=text
                ) from exc
            except ValueError as exc:
                raise ConfigurationError(f"node file {text}: {exc}", path=text) from exc
        return cls.of(content.get("node", {}), text)

    @classmethod
    def of(cls, table: Any, source: str) -> Self:
        """Read it from its table, as parsed.

        Args:
            table: The table; an empty one where the source has none.
            source: Where it stands; names the node when the table does not.

        Raises:
            ConfigurationError: The table has mistakes; the message has a line for each.
        """
        try:
            read = cls.model_validate(table)
        except ValidationError as exc:
            lines = [str(problem) for problem in _problems(exc, source)]
            raise ConfigurationError("\n".join(lines), path=source) from exc
        if read.id is not None:
            return read
        is_file = source.endswith((".toml", ".py"))
        stem = Path(source).stem if is_file else source.rpartition(".")[2]
        return read.model_copy(update={"id": stem.replace(" ", "-").replace(".", "-")})

    @property
    def attested(self) -> CapabilityPolicy | None:
        """What the file places the node under; None when it says nothing of the kind."""
        if not self.model_fields_set & {"zones", "grants", "data"}:
            return None
        return CapabilityPolicy(zones=self.zones, grants=self.grants, data=self.data)


def place_problems(declaration: Declaration, source: str) -> list[Problem]:
    """Return what is wrong with the table of the node, and with claims of its functions.

    Args:
        declaration: What the source declares.
        source: Where it was read from.
    """
    try:
        head = NodeHead.model_validate(declaration.head)
    except ValidationError as exc:
        return [problem for problem in _problems(exc, source) if problem.field != "id"]
    found = []
    for spec in declaration.functions:
        claims = (
            ("policy.zones", set(spec.policy.zones) - set(head.zones)),
            ("policy.grants", set(spec.policy.grants) - set(head.grants)),
        )
        found += [
            Problem(
                file=source,
                line=declaration.lines.get(spec.name),
                what=f'function "{spec.name}"',
                field=field,
                message=f"{', '.join(sorted(beyond))} is not under [node]: it counts only if the "
                "mesh attests it (`foam device add`)",
                warning=True,
            )
            for field, beyond in claims
            if beyond
        ]
    return found


def _problems(error: ValidationError, source: str) -> list[Problem]:
    return [
        Problem(file=source, what="[node]", field=field, message=message)
        for field, message in field_problems(error)
    ]


def placed(
    functions: Iterable[FunctionSpec], policy: CapabilityPolicy | None
) -> list[FunctionSpec]:
    """Let the functions of a node claim its zones and grants.

    A function that names zones (or grants) of its own keeps those.

    Args:
        functions: As declared.
        policy: What the node was given; None for nothing.
    """
    if policy is None:
        return list(functions)
    return [
        spec.model_copy(
            update={
                "policy": spec.policy.model_copy(
                    update={
                        "zones": spec.policy.zones or policy.zones,
                        "grants": spec.policy.grants or policy.grants,
                    }
                )
            }
        )
        for spec in functions
    ]
