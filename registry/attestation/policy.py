"""``attestation.toml``: which digests are good, how long evidence counts, and which rights need it.

::

    valid_for = "1h"

    [references.plant]
    "code/*" = ["sha256:…", "sha256:…"]    # one of these
    "function/convert" = ["sha256:…"]
    "model/*" = "any"

    [[rules]]
    nodes = ["press-*"]                     # or: zones = ["hall-3"]
    references = ["plant"]                  # one of them has to fit
    gates = { data = ["private"], grants = ["actuate"] }
    pcrs = ["5f…"]                          # asks for a quote of a TPM too
    registers = "sha256:0,1,2,3,4,7"        # of these and no others

    [tpm2]
    press-7 = "-----BEGIN PUBLIC KEY-----…"
"""

import re
import tomllib
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from broker.followed import FollowedFile
from capability_schemas.capability import CapabilityPolicy
from capability_schemas.errors import ConfigurationError
from capability_schemas.ids import Identifier
from capability_schemas.task import DataClass
from capability_schemas.trust import Sha256
from capability_schemas.wire import first_problem
from registry.attestation.tpm import DEFAULT_REGISTERS, registers_text

ANY: Final = "any"
_MOST_BYTES: Final = 4 * 1024 * 1024
_LEAST_MS: Final = 10_000
_MOST_MS: Final = 30 * 86_400_000
_UNITS: Final = {"s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}


def _milliseconds(value: Any) -> Any:
    found = re.fullmatch(r"([1-9][0-9]{0,5})([smhd])", value) if isinstance(value, str) else None
    if found is None:
        raise ValueError(f'{value!r}: write a text with a number and s, m, h or d, such as "1h"')
    length = int(found[1]) * _UNITS[found[2]]
    if not _LEAST_MS <= length <= _MOST_MS:
        raise ValueError(f"{value!r}: evidence counts from 10 s to 30 d")
    return length


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


Pattern = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Reference = dict[Pattern, Literal["any"] | tuple[Sha256, ...]]
"""Accepted digests by what they are of; a name may hold ``*``, and the longest name that fits
counts. Everything a node measures has to be named; every name without ``*`` has to be measured."""


class Gates(_Table):
    """Rights that need evidence.

    Attributes:
        zones: Zones of the node.
        grants: Rights it holds.
        data: Classes of data it may see.
    """

    zones: tuple[str, ...] = ()
    grants: tuple[str, ...] = ()
    data: tuple[DataClass, ...] = ()

    def __or__(self, other: "Gates") -> "Gates":
        """Return the rights of both."""
        return Gates(
            zones=tuple(dict.fromkeys((*self.zones, *other.zones))),
            grants=tuple(dict.fromkeys((*self.grants, *other.grants))),
            data=tuple(dict.fromkeys((*self.data, *other.data))),
        )

    def __bool__(self) -> bool:
        """Tell whether there is any."""
        return bool(self.zones or self.grants or self.data)

    def taken_from(self, policy: CapabilityPolicy) -> CapabilityPolicy:
        """Return a policy without these rights."""
        return policy.model_copy(
            update={
                "zones": tuple(one for one in policy.zones if one not in self.zones),
                "grants": tuple(one for one in policy.grants if one not in self.grants),
                "data": tuple(one for one in policy.data if one not in self.data),
            }
        )

    def words(self) -> str:
        """Name them in a line."""
        named = [f"zone {one}" for one in self.zones] + [f"grant {one}" for one in self.grants]
        return ", ".join(named + [f"data {one}" for one in self.data])


NO_GATES: Final = Gates()


class Rule(_Table):
    """What some nodes have to show for some rights.

    Attributes:
        nodes: Whom it is for: names, ``*`` allowed; all when empty.
        zones: Whom it is for: nodes that the operator put into one of these zones; all when empty.
        references: Names of references, one of which has to fit; none: any evidence will do.
        gates: Rights that need it.
        pcrs: Digests of the platform's registers that a TPM has to quote, one of them,
            hexadecimal; none: no TPM is asked for.
        registers: Of which registers they are, ``BANK:NUMBER,…``. A quote of others is none: the
            node may write what it likes into those that are free for programs, such as 16.
    """

    nodes: tuple[Pattern, ...] = ()
    zones: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    gates: Gates
    pcrs: tuple[Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")], ...] = ()
    registers: Annotated[str, AfterValidator(registers_text)] = DEFAULT_REGISTERS

    @model_validator(mode="after")
    def _gates_something(self) -> "Rule":
        if not self.gates:
            raise ValueError("gates: name at least one zone, grant or class of data")
        if "registers" in self.model_fields_set and not self.pcrs:
            raise ValueError("registers: name in pcrs too what these registers have to come to")
        return self

    def concerns(self, node: str, attested: CapabilityPolicy) -> bool:
        """Tell whether a node has to follow it.

        Args:
            node: Its name.
            attested: What the operator vouches for.
        """
        named = not self.nodes or any(fnmatchcase(node, pattern) for pattern in self.nodes)
        return named and (not self.zones or bool(set(self.zones) & set(attested.zones)))


class AttestationPolicy(_Table):
    """The file.

    Attributes:
        valid_for: How long evidence counts; in the file a text such as ``"1h"``, here milliseconds.
        references: Sets of good digests by name.
        rules: Who needs what.
        tpm2: Public attestation keys of the nodes' TPMs, PEM.
    """

    valid_for: Annotated[int, BeforeValidator(_milliseconds)] = 3_600_000
    references: dict[Annotated[str, StringConstraints(max_length=64)], Reference] = {}
    rules: Annotated[tuple[Rule, ...], Field(max_length=1_000)] = ()
    tpm2: dict[Identifier, Annotated[str, StringConstraints(max_length=8_192)]] = {}

    @model_validator(mode="after")
    def _references_exist(self) -> "AttestationPolicy":
        for number, rule in enumerate(self.rules, 1):
            for name in rule.references:
                if name not in self.references:
                    raise ValueError(
                        f"rule {number} names the reference {name!r}: there is no such table "
                        f"[references.{name}]"
                    )
        return self

    @property
    def window_ms(self) -> int:
        """How long a challenge is put; the one before it is still taken. Milliseconds."""
        return self.valid_for // 2

    def rules_of(self, node: str, attested: CapabilityPolicy) -> tuple[Rule, ...]:
        """Return the rules that concern a node."""
        return tuple(rule for rule in self.rules if rule.concerns(node, attested))


def parse_policy(text: str, name: str) -> AttestationPolicy:
    """Read the text of a file.

    Args:
        text: TOML.
        name: Of the file, for messages.

    Raises:
        ConfigurationError: It is no TOML, or says something that cannot be meant.
    """
    try:
        return AttestationPolicy.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as exc:
        raise ConfigurationError(f"{name}: {exc}") from exc
    except ValidationError as exc:
        problem = ": ".join(filter(None, first_problem(exc)))
        raise ConfigurationError(f"{name}: {problem}") from exc
    except ValueError as exc:  # such as a number of thousands of digits
        raise ConfigurationError(f"{name}: {exc}") from exc
    except RecursionError as exc:
        raise ConfigurationError(f"{name}: tables or lists are nested too deeply") from exc


def reference_toml(name: str, measurements: Mapping[str, str]) -> str:
    """Write a reference that fits what a node measured, as a table to be put into the file.

    Args:
        name: Of the reference.
        measurements: Digests by what they are of.
    """
    lines = [f'"{what}" = ["{digest}"]' for what, digest in sorted(measurements.items())]
    return "\n".join([f'[references."{name}"]', *lines]) + "\n"


class AttestationFile(FollowedFile[AttestationPolicy]):
    """Keeps the policy of a file, and takes up its edits as ``FollowedFile`` says.

    A file that was removed means that nothing is asked. A registry must not start where ``load``
    raises: rights would be given that somebody meant to hold back.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, what="attestation", parse=parse_policy, most_bytes=_MOST_BYTES)

    @property
    def policy(self) -> AttestationPolicy:
        """What is asked."""
        return self.value
