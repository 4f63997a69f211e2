"""Who may join, and with which papers. Blocking, without MQTT: bytes in, an answer out.

A newcomer shows that it knows a join token (a proof over its whole request) and that it has the
keys it brings (signatures over them). It gets exactly what the token says: role, zones, grants and
data classes are attested here and never taken from the newcomer. A member renews by signing with
the key that is known of it. Every request is answered once: the same one again gets the same
answer, and an old one none.

Two registries may share the files: one at a time works on them, a grant is begun and ended there in
writing, and the answer is kept with it. So the next registry undoes what one began that was killed,
and repeats what it had granted.
"""

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from broker.access.authority import Authority, Certificate
from broker.access.credentials import Credential, CredentialStore
from broker.access.policy import Role
from capability_schemas.capability import CapabilityPolicy
from capability_schemas.enrollment import (
    ENROLL_LIMIT_BYTES,
    EnrollRequest,
    JoinToken,
    check_proof,
    prove,
    seal,
)
from capability_schemas.errors import (
    AccessDenied,
    ConfigurationError,
    Conflict,
    FoamError,
    NotFound,
    Overloaded,
    ProtocolError,
)
from capability_schemas.ids import check_identifier, now_ms
from capability_schemas.passport import CLOCK_SKEW_MS
from capability_schemas.signing import SigningKey, sign, verify
from capability_schemas.wire import decode
from registry.enrollment.book import EnrollmentBook, Token, Waiting
from registry.enrollment.grants import Answer, GrantLog
from registry.enrollment.papers import PaperOffice
from registry.enrollment.rotation import Rotation

MAX_TOKEN_MS: Final = 30 * 86_400_000

_REMEMBERED: Final = 4_096
_TOKENS: Final = 10_000
_WAITING: Final = 1_000


def _anybody(_role: Role) -> None:
    """Let everybody be decided over."""


class EnrollmentDesk:
    """Gives out join tokens, and papers for them. One thread at a time.

    ``rotation`` is what operators do with the authority.

    Args:
        path: File of tokens, of those who wait, and of what was revoked; mode 0600.
        site: The site.
        registry_id: Who vouches.
        key: Signs passports and replies.
        credentials: Who may log on at the broker; members are written there.
        authority: Signs certificates; None where the site has no TLS: everybody gets a password.
        brokers: Tells where members connect to.
        member_brokers: Tells where those with a certificate do, if elsewhere.
        certificates: Whether the broker takes certificates; else everybody gets a password.
        registries: Returns the public keys of all registries that members may believe.
        clock: UTC milliseconds.

    Raises:
        ConfigurationError: The file is damaged.
    """

    def __init__(
        self,
        *,
        path: Path,
        site: str,
        registry_id: str,
        key: SigningKey,
        credentials: CredentialStore,
        authority: Authority | None,
        brokers: Callable[[], Sequence[str]],
        member_brokers: Callable[[], Sequence[str]] = tuple,
        certificates: bool = True,
        registries: Callable[[], Mapping[str, str]] = dict,
        clock: Callable[[], int] = now_ms,
    ) -> None:
        self._site = site
        self._key = key
        self._credentials = credentials
        self._authority = authority
        self._clock = clock
        self._office = PaperOffice(
            site=site,
            registry_id=registry_id,
            key=key,
            authority=authority,
            brokers=brokers,
            member_brokers=member_brokers,
            certificates=certificates,
            registries=registries,
            clock=clock,
        )
        self._book = EnrollmentBook(path)
        self._grants = GrantLog(book=self._book, credentials=credentials, clock=clock)
        self.rotation = Rotation(
            authority=authority, credentials=credentials, tokens=self.tokens, clock=clock
        )
        self._answered: OrderedDict[tuple[str, str], tuple[bytes, Answer]] = OrderedDict()

    # ---- tokens

    def create_token(
        self,
        *,
        role: Role,
        ttl_ms: int,
        uses: int = 1,
        by: str,
        names: Sequence[str] = (),
        attested: CapabilityPolicy | None = None,
        approve: bool = False,
        replace: bool = False,
    ) -> JoinToken:
        """Make a join token, which can log on at once.

        Args:
            role: Role it gives.
            ttl_ms: How long it may be used, 1 to 2,592,000,000 ms (30 days).
            uses: How many newcomers, 1 to 10,000.
            by: Who makes it.
            names: Identities it is good for; any when empty.
            attested: What it vouches for, for nodes.
            approve: Whether an operator decides on each newcomer.
            replace: Whether members of these names may be enrolled again.

        Raises:
            ConfigurationError: A value out of range, or the files cannot be written.
            Overloaded: There are 10,000 tokens.
        """
        if role in {Role.ENROLLEE, Role.REGISTRY}:
            raise ConfigurationError(f"nobody joins as {role.value} by token")
        if not 1 <= ttl_ms <= MAX_TOKEN_MS:
            raise ConfigurationError("a token lasts between 1 ms and 30 days")
        if not 1 <= uses <= _TOKENS:
            raise ConfigurationError(f"a token has 1 to {_TOKENS} uses")
        if replace and not names:
            raise ConfigurationError("a token that replaces members has to name them")
        for name in names:
            check_identifier(name, "identity")
        token = JoinToken.make(
            authority=self._authority.server_root() if self._authority is not None else b""
        )
        now = self._clock()
        made = Token(
            role=role,
            proof_key=token.proof_key.hex(),
            expires_at=now + ttl_ms,
            uses=uses,
            names=tuple(names),
            attested=attested,
            approve=approve,
            replace=replace,
            created_at=now,
            created_by=by,
        )
        with self._grants.alone():
            self._drop_old()
            if len(self._book.tokens) >= _TOKENS:
                raise Overloaded("there are 10,000 tokens: revoke some", retry_after_ms=60_000)
            self._credentials.add(
                token.id,
                Role.ENROLLEE,
                password=token.password.get_secret_value(),
                expires_at=now + ttl_ms,
            )
            self._book.write(tokens={**self._book.tokens, token.id: made})
        return token

    def tokens(self) -> Mapping[str, Token]:
        """Tokens that may still be used."""
        now = self._clock()
        return {
            name: token
            for name, token in self._book.tokens.items()
            if token.uses and now < token.expires_at
        }

    def revoke_token(self, token: str, *, allow: Callable[[Role], None] = _anybody) -> None:
        """Make a token worthless, an old one too; whoever waits on it waits no more.

        Args:
            token: Its name.
            allow: Raises where somebody of this role may not be decided over.

        Raises:
            NotFound: It is not known.
            AccessDenied: As ``allow`` says.
        """
        with self._grants.alone():
            known = self._book.tokens.get(token)
            if known is None:
                raise NotFound(f"token {token!r} is not known", token=token)
            allow(known.role)
            self._drop_tokens({token})

    # ---- requests

    def consider(self, level: str, payload: bytes) -> Answer:
        """Decide on a request.

        Args:
            level: Level of its topic: the token's name, or a member's own.
            payload: As received.

        Raises:
            ConfigurationError: The files cannot be written; nothing was granted.
        """
        try:
            request: EnrollRequest = decode(EnrollRequest, payload, limit_bytes=ENROLL_LIMIT_BYTES)
        except ProtocolError as error:
            return Answer(level, None, "ignored", reason=error.message)
        with self._grants.alone():
            return self._consider(level, request, payload)

    def _consider(self, level: str, request: EnrollRequest, payload: bytes) -> Answer:
        known = self._answered.get((level, request.nonce))
        if known is not None:
            return self._again(level, request, payload, known)
        token = self._book.tokens.get(level)
        try:
            if token is None:
                proof_key = None
                self._check_member(level, request, payload)
            else:
                proof_key = bytes.fromhex(token.proof_key)
                check_proof(payload, proof_key)
        except FoamError as error:
            # Whoever proves nothing learns nothing, not even that the token exists.
            return Answer(level, None, "ignored", request.id, error.message)
        if (granted := self._grants.before(level, payload)) is not None:
            return granted
        changes: dict[str, Any] = {}
        try:
            self._check_request(request, payload)
            if token is None:
                answer, changes = self._renew(level, request)
            else:
                answer, changes = self._join(level, token, request, payload)
        except ConfigurationError:
            raise
        except FoamError as error:
            answer = self._refusal(level, request, error)
        finished = self._finished(answer, proof_key)
        if changes:
            self._grants.end(finished, payload, changes)
        self._answered[(level, request.nonce)] = (payload, finished)
        if len(self._answered) > _REMEMBERED:
            self._answered.popitem(last=False)
        return finished

    @staticmethod
    def _again(
        level: str, request: EnrollRequest, payload: bytes, known: tuple[bytes, Answer]
    ) -> Answer:
        before, answer = known
        if before != payload:
            return Answer(level, None, "ignored", request.id, "the nonce was used before")
        given = answer.happened in {"granted", "renewed"}
        return replace(answer, happened="repeated") if given else answer

    def refresh(self) -> None:
        """Read what another registry has written.

        Raises:
            Unavailable: It is at it now.
            ConfigurationError: A file cannot be read or is damaged.
        """
        with self._grants.alone():
            self._credentials.refresh()

    @property
    def waiting(self) -> Mapping[str, Waiting]:
        """Newcomers that an operator has to decide on, by the identity they want."""
        return self._book.waiting

    def decide(self, identity: str, *, granted: bool, reason: str = "") -> Answer:
        """Decide on one who waits.

        Args:
            identity: Who.
            granted: Whether it may join.
            reason: Why not.

        Raises:
            NotFound: Nobody of that name waits.
            ConfigurationError: The files cannot be written.
        """
        with self._grants.alone():
            return self._decide(identity, granted=granted, reason=reason)

    def _decide(self, identity: str, *, granted: bool, reason: str) -> Answer:
        waiting = self._book.waiting.get(identity)
        token = self._book.tokens.get(waiting.token) if waiting is not None else None
        if waiting is None or token is None:
            raise NotFound(f"no {identity!r} waits to be enrolled", identity=identity)
        request: EnrollRequest = decode(EnrollRequest, waiting.request.encode())
        left = {name: one for name, one in self._book.waiting.items() if name != identity}
        payload = waiting.request.encode()
        changes: dict[str, Any] = {}
        if granted:
            try:
                answer, changes = self._grant(waiting.token, token, request, payload)
            except ConfigurationError:
                raise
            except FoamError as error:
                answer = self._refusal(waiting.token, request, error)
        else:
            denial = AccessDenied(reason or "the operator refused it")
            answer = self._refusal(waiting.token, request, denial)
        finished = self._finished(answer, bytes.fromhex(token.proof_key))
        if changes:
            self._grants.end(finished, payload, {**changes, "waiting": left})
        else:
            self._book.write(waiting=left)
        return finished

    def revoke(self, identity: str, *, allow: Callable[[Role], None] = _anybody) -> None:
        """Throw a member out: no password, no certificate, no passport of it counts any more.

        Args:
            identity: Who.
            allow: Raises where somebody of this role may not be thrown out.

        Raises:
            NotFound: It is not known.
            AccessDenied: As ``allow`` says.
            ConfigurationError: The files cannot be read or written; the same order, given again,
                does what is left.
        """
        with self._grants.alone():
            self._credentials.refresh()  # commands on this machine make members too
            role = self.role(identity)
            if role is None or identity not in self._credentials.identities():
                raise NotFound(f"identity {identity!r} is unknown", identity=identity)
            allow(role)
            # First what voids its papers: once the credential is gone, nobody can ask for that.
            self._void({identity}, members=self._book.members - {identity})
            self._credentials.remove(identity)

    def follow_members(self) -> Sequence[str]:
        """Void the papers of those who have vanished from the credentials since the last look.

        A command on this machine may remove a member without the registry. When nobody is left at
        all the file is missing or a mishap, and changes nothing.

        Returns:
            Who has vanished.

        Raises:
            ConfigurationError: The files cannot be read or written.
        """
        with self._grants.alone():
            self._credentials.refresh()
            members = {
                name
                for name, known in self._credentials.identities().items()
                if known.role is not Role.ENROLLEE
            }
            before = self._book.members
            if not members or members == before:
                return ()
            self._void(before - members, members=members)
            return sorted(before - members)

    def _void(self, names: Collection[str], *, members: Collection[str]) -> None:
        self._book.write(
            revoked={**self._book.revoked, **dict.fromkeys(names, self._clock())},
            asked={name: at for name, at in self._book.asked.items() if name not in names},
            members=members,
        )

    def role(self, identity: str) -> Role | None:
        """Return what a member is, or what a token is for; None where it is neither."""
        token = self._book.tokens.get(identity)
        if token is not None:
            return token.role
        known = self._credentials.identities().get(identity)
        return known.role if known is not None else None

    def administrators(self) -> list[str]:
        """Return who administrates now."""
        now = self._clock()
        known = self._credentials.identities().items()
        return [name for name, one in known if one.role is Role.ADMIN and one.counts(now)]

    @property
    def revoked(self) -> Mapping[str, int]:
        """Identities and when they were revoked, UTC milliseconds: older passports are void."""
        return self._book.revoked

    # ---- one request

    def _check_request(self, request: EnrollRequest, payload: bytes) -> None:
        """Check what holds for newcomers and members alike."""
        if request.site != self._site:
            raise AccessDenied(f"this is site {self._site}, not {request.site}")
        apart_ms = request.at - self._clock()
        if abs(apart_ms) > CLOCK_SKEW_MS:
            raise AccessDenied(
                f"the clocks are {abs(apart_ms) // 1000} s apart: set the clock of {request.id}"
            )
        if request.public_key is not None:
            verify(payload, request.public_key)

    def _check_member(self, level: str, request: EnrollRequest, payload: bytes) -> None:
        known = self._credentials.identities().get(level)
        if known is None or not known.counts(self._clock()) or known.public_key is None:
            raise AccessDenied(f"{level} is neither a token nor a member with a key")
        verify(payload, known.public_key)
        if (request.id, request.role) != (level, known.role.value):
            raise AccessDenied(f"{level} may renew its own papers only")

    def _join(
        self, level: str, token: Token, request: EnrollRequest, payload: bytes
    ) -> tuple[Answer, dict[str, Any]]:
        if not token.uses:
            raise AccessDenied("the token is used up: ask for a new one")
        if self._clock() >= token.expires_at:
            raise AccessDenied("the token has run out: ask for a new one")
        if request.role != token.role.value:
            raise AccessDenied(f"the token is for a {token.role.value}, not a {request.role}")
        if token.names and request.id not in token.names:
            raise AccessDenied(f"the token is not for {request.id}")
        if not token.approve:
            return self._grant(level, token, request, payload)
        self._check_name(token, request)
        if request.id in self._book.waiting:
            raise Conflict(f"somebody who wants to be {request.id} waits already")
        if len(self._book.waiting) >= _WAITING:
            raise Overloaded("too many wait for an operator", retry_after_ms=60_000)
        self._certify(request, token.role)  # what cannot be granted need not wait
        one = Waiting(token=level, request=payload.decode(), asked_at=self._clock())
        self._book.write(waiting={**self._book.waiting, request.id: one})
        reply = self._office.reply(request, "pending", reason="an operator has to approve it")
        return Answer(level, reply, "pending", request.id), {}

    def _check_name(self, token: Token, request: EnrollRequest) -> Credential | None:
        known = self._credentials.identities().get(request.id)
        if known is None:
            return None
        if known.role is Role.ENROLLEE or known.role is not token.role or not token.replace:
            raise Conflict(
                f"{request.id} exists already: choose another name, or make a token with "
                f"--replace for {request.id}"
            )
        return known

    def _certify(self, request: EnrollRequest, role: Role) -> Certificate | None:
        """Certify a newcomer, or make sure that a password can reach it."""
        certificate = self._office.certify(request, role)
        if certificate is None:
            if request.seal_key is None:
                raise ProtocolError("without a csr a seal_key is needed, to seal the password to")
            seal({}, request.seal_key, nonce=request.nonce)
        return certificate

    def _grant(
        self, level: str, token: Token, request: EnrollRequest, payload: bytes
    ) -> tuple[Answer, dict[str, Any]]:
        """Make a member; what the book says of it then is written together with the answer."""
        known = self._check_name(token, request)
        certificate = self._certify(request, token.role)
        self._grants.begin(request.id, level, payload)
        if known is not None:
            self._credentials.remove(request.id)
        password = self._credentials.add(
            request.id,
            token.role,
            public_key=request.public_key,
            attested=token.attested,
            serial=certificate.serial if certificate is not None else None,
        )
        left = token.model_copy(update={"uses": token.uses - 1})
        revoked = dict(self._book.revoked)  # what was thrown out stays void: its keys are others
        if known is not None:
            revoked[request.id] = self._clock()
        sealed = None
        if password and request.seal_key is not None:
            sealed = seal({"password": password}, request.seal_key, nonce=request.nonce)
        reply = self._office.granted(request, token.role, token.attested, certificate, sealed)
        why = f"token {level} of {token.created_by}"
        return Answer(level, reply, "granted", request.id, why), {
            "tokens": {**self._book.tokens, level: left},
            "revoked": revoked,
        }

    def _renew(self, level: str, request: EnrollRequest) -> tuple[Answer, dict[str, Any]]:
        known = self._credentials.identities()[level]
        if request.public_key != known.public_key:
            raise AccessDenied(f"{level} has another key on record: enroll anew to change it")
        if request.at <= self._book.asked.get(level, 0):
            raise AccessDenied("this was asked before: a later request was answered already")
        certificate = self._office.certify(request, known.role)
        if certificate is not None:
            # The one before stays good until the next renewal: the new one may not arrive.
            self._credentials.update(level, serials=(certificate.serial, *known.serials[:1]))
        reply = self._office.granted(request, known.role, known.attested, certificate, None)
        asked = {**self._book.asked, level: request.at}
        return Answer(level, reply, "renewed", level), {"asked": asked}

    def _refusal(self, level: str, request: EnrollRequest, error: FoamError) -> Answer:
        reply = self._office.reply(
            request, "refused", reason=error.message, retryable=error.retryable
        )
        return Answer(level, reply, "refused", request.id, error.message)

    def _finished(self, answer: Answer, proof_key: bytes | None) -> Answer:
        if answer.reply is None:
            return answer
        proven = prove(answer.reply, proof_key) if proof_key is not None else answer.reply
        return Answer(
            answer.level,
            sign(proven, self._key),
            answer.happened,
            answer.identity,
            answer.reason,
        )

    # ---- the file

    def _drop_old(self) -> None:
        now = self._clock()
        waited_on = {one.token for one in self._book.waiting.values()}
        self._drop_tokens(
            {
                name
                for name, token in self._book.tokens.items()
                if now >= token.expires_at or (not token.uses and name not in waited_on)
            }
        )

    def _drop_tokens(self, names: set[str]) -> None:
        if not names:
            return
        for name in names & self._credentials.identities().keys():
            self._credentials.remove(name)
        self._book.write(
            tokens={name: one for name, one in self._book.tokens.items() if name not in names},
            waiting={
                name: one for name, one in self._book.waiting.items() if one.token not in names
            },
        )
