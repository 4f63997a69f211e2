"""What a node file says of the node itself: its id, and where its operator places it.

::

    [node]
    id = "press-hall"
    zones = ["hall-3"]        # where it stands
    grants = ["controls"]     # rights it holds
    data = ["public"]         # classes of data it may see; all of them when not said

A node only claims these; they count once the mesh attests them. `foam up` and `foam node` on the
data folder of the mesh do so, for there the operator of the mesh wrote the file. A node that joins
from elsewhere has what ``foam device add ID --role node --zone … --grant …`` gave it.
"""

import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from capability_schemas.capability import CapabilityPolicy
from capability_schemas.errors import ConfigurationError
from capability_schemas.functions import FunctionSpec
from capability_schemas.ids import Identifier
from capability_schemas.task import DataClass, ShortText
from capability_schemas.wire import first_problem

__all__ = ["NodeHead", "placed"]


class NodeHead(BaseModel):
    """The table ``[node]`` of a node file; a Python file or a module has only a name.

    Attributes:
        id: Id of the node; None when the file does not say.
        zones: Zones it stands in.
        grants: Rights it holds.
        data: Classes of data it may see.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: Identifier | None = None
    zones: tuple[ShortText, ...] = ()
    grants: tuple[ShortText, ...] = ()
    data: tuple[DataClass, ...] = ("public", "internal", "private")

    @classmethod
    def read(cls, source: str | Path) -> Self:
        """Read it; the id is that of the file, else made of the name of the file.

        Args:
            source: Node file, Python file or dotted module name.

        Raises:
            ConfigurationError: The file cannot be read, or the table has a mistake.
        """
        text = str(source)
        head: dict[str, Any] = {}
        if text.endswith(".toml"):
            try:
                head = tomllib.loads(Path(text).read_text(encoding="utf-8")).get("node", {})
            except OSError as exc:
                raise ConfigurationError(
                    f"node file {text}: {exc.strerror or exc}", path=text
                ) from exc
            except ValueError as exc:
                raise ConfigurationError(f"node file {text}: {exc}", path=text) from exc
        try:
            read = cls.model_validate(head)
        except ValidationError as exc:
            field, problem = first_problem(exc)
            raise ConfigurationError(
                f"node file {text}: {'.'.join(filter(None, ('node', field)))}: {problem}", path=text
            ) from exc
        if read.id is not None:
            return read
        stem = Path(text).stem if text.endswith((".toml", ".py")) else text.rpartition(".")[2]
        return read.model_copy(update={"id": stem.replace(" ", "-").replace(".", "-")})

    @property
    def attested(self) -> CapabilityPolicy | None:
        """What the file places the node under; None when it says nothing of the kind."""
        if not self.model_fields_set & {"zones", "grants", "data"}:
            return None
        return CapabilityPolicy(zones=self.zones, grants=self.grants, data=self.data)


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
