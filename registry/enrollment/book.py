"""What the registry remembers of enrollment: one private file, replaced atomically."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from broker.access.credentials import write_private
from broker.access.policy import Role
from capability_schemas.capability import CapabilityPolicy
from capability_schemas.errors import ConfigurationError
from capability_schemas.ids import Identifier
from capability_schemas.wire import first_problem


class Token(BaseModel):
    """A join token as the registry remembers it: what it gives, and how to check it.

    Attributes:
        role: Role that newcomers get.
        proof_key: Checks proofs, hexadecimal; says nothing about the secret.
        expires_at: UTC milliseconds.
        uses: How many newcomers may still join with it.
        names: The only identities it is good for; any when empty.
        attested: What newcomers are vouched for, for nodes.
        approve: Whether an operator decides on each newcomer.
        replace: Whether an existing member may be enrolled again under its name.
        created_at: UTC milliseconds.
        created_by: Who made it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    role: Role
    proof_key: str
    expires_at: int
    uses: Annotated[int, Field(ge=0)]
    names: tuple[Identifier, ...] = ()
    attested: CapabilityPolicy | None = None
    approve: bool = False
    replace: bool = False
    created_at: int
    created_by: str


class Waiting(BaseModel):
    """A newcomer that an operator has to decide on.

    Attributes:
        token: Token it came with.
        request: Its request, as received.
        asked_at: UTC milliseconds.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    token: str
    request: str
    asked_at: int


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    v: Literal[1] = 1
    tokens: dict[Identifier, Token] = {}
    waiting: dict[Identifier, Waiting] = {}
    revoked: dict[Identifier, int] = {}
    asked: dict[Identifier, int] = {}
    members: tuple[Identifier, ...] = ()


class EnrollmentBook:
    """The file. Blocking; one writer.

    Args:
        path: Where it is; made on the first change.

    Raises:
        ConfigurationError: It cannot be read or is damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._state = self._read()

    @property
    def tokens(self) -> Mapping[str, Token]:
        """Join tokens by name, old ones included."""
        return self._state.tokens

    @property
    def waiting(self) -> Mapping[str, Waiting]:
        """Newcomers that an operator has to decide on, by the identity they want."""
        return self._state.waiting

    @property
    def revoked(self) -> Mapping[str, int]:
        """Identities and when they were revoked, UTC milliseconds."""
        return self._state.revoked

    @property
    def asked(self) -> Mapping[str, int]:
        """Members and when they asked for papers last, by their own clocks, UTC milliseconds."""
        return self._state.asked

    @property
    def members(self) -> frozenset[str]:
        """Who was a member when that was looked at last."""
        return frozenset(self._state.members)

    def write(
        self,
        *,
        tokens: Mapping[str, Token] | None = None,
        waiting: Mapping[str, Waiting] | None = None,
        revoked: Mapping[str, int] | None = None,
        asked: Mapping[str, int] | None = None,
        members: Iterable[str] | None = None,
    ) -> None:
        """Replace what is given; the rest stays.

        Raises:
            ConfigurationError: The file cannot be written; nothing has changed.
        """
        state = self._state
        made = _File(
            tokens=dict(state.tokens if tokens is None else tokens),
            waiting=dict(state.waiting if waiting is None else waiting),
            revoked=dict(state.revoked if revoked is None else revoked),
            asked=dict(state.asked if asked is None else asked),
            members=state.members if members is None else tuple(sorted(members)),
        )
        document = made.model_dump(mode="json", exclude_none=True)
        try:
            write_private(self._path, json.dumps(document, indent=1) + "\n")
        except OSError as exc:
            raise ConfigurationError(f"{self._path} cannot be written: {exc}") from exc
        self._state = made

    def _read(self) -> _File:
        try:
            return _File.model_validate_json(self._path.read_bytes())
        except FileNotFoundError:
            return _File()
        except OSError as exc:
            raise ConfigurationError(f"{self._path} cannot be read: {exc}") from exc
        except ValidationError as exc:
            problem = ": ".join(filter(None, first_problem(exc)))
            raise ConfigurationError(
                f"{self._path} is damaged ({problem}); restore it from a copy, or delete it: every "
                "join token is then worthless"
            ) from exc
