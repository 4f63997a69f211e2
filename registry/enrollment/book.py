"""What the registry remembers of enrollment: one private file, replaced atomically."""

import contextlib
import fcntl
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from broker.access.credentials import write_private
from broker.access.policy import Role
from capability_schemas.capability import CapabilityPolicy
from capability_schemas.errors import ConfigurationError, Unavailable
from capability_schemas.ids import Identifier
from capability_schemas.wire import first_problem

_LOCK_S: Final = 2.0
_LOCK_AGAIN_S: Final = 0.02


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


class Granting(BaseModel):
    """A grant that was begun: its credential may be there already, its answer is not.

    Attributes:
        level: Level of the request.
        digest: SHA-256 of the request, hexadecimal.
        at: When, UTC milliseconds.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    level: str
    digest: str
    at: int


class Answered(BaseModel):
    """A grant that was given, kept for a while: whoever asks the same again gets the same.

    Attributes:
        level: Level of the request.
        digest: SHA-256 of the request, hexadecimal.
        identity: Who was granted something.
        happened: ``granted`` or ``renewed``.
        reply: The reply, as signed.
        at: When, UTC milliseconds.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    level: str
    digest: str
    identity: str
    happened: str
    reply: str
    at: int


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    v: Literal[1] = 1
    tokens: dict[Identifier, Token] = {}
    waiting: dict[Identifier, Waiting] = {}
    revoked: dict[Identifier, int] = {}
    asked: dict[Identifier, int] = {}
    members: tuple[Identifier, ...] = ()
    granting: dict[Identifier, Granting] = {}
    answered: tuple[Answered, ...] = ()


class EnrollmentBook:
    """The file. Blocking; whoever writes holds it (``held``), for two registries may share it.

    Args:
        path: Where it is; made on the first change.

    Raises:
        ConfigurationError: It cannot be read or is damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp: tuple[int, int, int] | None = None
        self._state = self._read()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the file for one change of several steps, and read it anew before.

        A registry that was stopped in the middle of a change keeps others waiting, and ends the
        change when it goes on: nothing is half done that somebody else relies on.

        Raises:
            Unavailable: Another registry has held it for two seconds.
            ConfigurationError: It cannot be read, or is damaged.
        """
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            lock = self._path.with_suffix(".lock").open("a")
        except OSError as exc:
            raise ConfigurationError(f"{self._path} cannot be locked: {exc}") from exc
        with lock:
            give_up_at = time.monotonic() + _LOCK_S
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as exc:
                    if time.monotonic() >= give_up_at:
                        raise Unavailable(
                            f"another registry works on {self._path}: ask again"
                        ) from exc
                    time.sleep(_LOCK_AGAIN_S)
                else:
                    break
            if self._found() != self._stamp:
                self._state = self._read()
            yield

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

    @property
    def granting(self) -> Mapping[str, Granting]:
        """Grants that were begun, by identity."""
        return self._state.granting

    @property
    def answered(self) -> Sequence[Answered]:
        """The latest grants, oldest first."""
        return self._state.answered

    def write(
        self,
        *,
        tokens: Mapping[str, Token] | None = None,
        waiting: Mapping[str, Waiting] | None = None,
        revoked: Mapping[str, int] | None = None,
        asked: Mapping[str, int] | None = None,
        members: Iterable[str] | None = None,
        granting: Mapping[str, Granting] | None = None,
        answered: Sequence[Answered] | None = None,
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
            granting=dict(state.granting if granting is None else granting),
            answered=tuple(state.answered if answered is None else answered),
        )
        document = made.model_dump(mode="json", exclude_none=True)
        try:
            write_private(self._path, json.dumps(document, indent=1) + "\n")
        except OSError as exc:
            raise ConfigurationError(f"{self._path} cannot be written: {exc}") from exc
        self._state, self._stamp = made, self._found()

    def _found(self) -> tuple[int, int, int] | None:
        """Return what tells whether somebody else has written the file."""
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_ino, found.st_size

    def _read(self) -> _File:
        self._stamp = self._found()
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
