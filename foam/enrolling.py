"""Joining a mesh from the newcomer's side: keys made here, papers asked for over MQTT.

Nothing secret leaves this machine: the private keys are made and stay here, of the join token only
a derived password (over TLS) and proofs. Nothing the other side says is believed before it has
shown that it knows the token too.
"""

import asyncio
import contextlib
import platform
import ssl
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, TypeVar

import structlog

from broker.access.authority import check_certificate, make_key_and_request
from broker.access.credentials import write_private
from broker.access.policy import Role
from broker.session.base import Message
from broker.session.mqtt import MqttSession
from broker.session.settings import BrokerUrl, SessionSettings
from broker.tls import TlsSettings
from capability_schemas.enrollment import (
    ENROLL_LIMIT_BYTES,
    EnrollReply,
    EnrollRequest,
    JoinToken,
    SealKey,
    check_proof,
    prove,
)
from capability_schemas.errors import (
    AccessDenied,
    BadSignature,
    ConfigurationError,
    FoamError,
    ProtocolError,
    Unavailable,
)
from capability_schemas.ids import check_identifier, new_uuid7, now_ms
from capability_schemas.signing import SigningKey, sign, verify
from capability_schemas.topics import TopicKind, Topics
from capability_schemas.wire import decode, encode
from foam import standing
from foam.listening import is_loopback
from foam.mesh import Identity

__all__ = [
    "Papers",
    "enroll",
    "is_still_member",
    "renewal_request",
    "renewed",
    "store_papers",
    "store_renewal",
]

_ASK_AGAIN_S: Final = 5.0
_CONNECT_S: Final = 10.0
_DOUBT_S: Final = 3.0
"""How long a refusal is not believed: some brokers hear of new logins up to a second later."""
_DOUBT_AGAIN_S: Final = 0.7
SIGNING_ROLES: Final = frozenset({Role.NODE, Role.ROUTER, Role.ADMIN, Role.OPERATOR})
_T = TypeVar("_T")
_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Papers:
    """What a newcomer has in the end; ``repr`` shows no secret.

    Attributes:
        reply: The grant.
        password: Its password, where it got one.
        signing_key: Its Ed25519 key, where its role signs.
        tls_key: Its TLS key, PEM, where it got a certificate.
        broker: Where it connects to from now on: the brokers in the grant, separated by commas,
            those on the hosts that were named first.
    """

    reply: EnrollReply
    password: str | None
    signing_key: SigningKey | None
    tls_key: str | None
    broker: str | None = None

    def __repr__(self) -> str:
        """Show whose papers these are."""
        return f"Papers(id={self.reply.id!r}, role={self.reply.role!r})"


async def enroll(
    *,
    url: str,
    token: JoinToken,
    identity: str,
    role: Role,
    site: str,
    timeout_s: float,
    certificate: bool = True,
    waiting: Callable[[str], None] = lambda _: None,
    clock: Callable[[], int] = now_ms,
) -> Papers:
    """Ask for papers and wait for the decision.

    Args:
        url: Broker, ``mqtts://host:port`` (``mqtt://`` on loopback only, unless the token says
            that the site has no TLS); of a cluster several, separated by commas.
        token: Join token.
        identity: Name wanted.
        role: Role wanted.
        site: Site to join.
        timeout_s: How long to wait, an operator's decision included.
        certificate: Whether a certificate is wanted rather than a password.
        waiting: Told why it takes longer.
        clock: UTC milliseconds.

    Raises:
        AccessDenied: The token is not (or no longer) good, or the request was refused; the message
            is the registry's.
        BrokerUnavailable: The broker cannot be reached, or is not the one of the token.
        Unavailable: No decision in time.
        ConfigurationError: The broker would see the join password in clear.
    """
    check_identifier(identity, "identity")
    addresses = BrokerUrl.parse_all(url)
    if token.authority and (plain := [str(one) for one in addresses if not one.tls]):
        raise ConfigurationError(
            "this token is for a broker with TLS: use mqtts:// (or wss://) instead of "
            + ", ".join(plain)
        )
    key = SigningKey.generate() if role in SIGNING_ROLES else None
    tls_key, csr = make_key_and_request(identity) if certificate else (None, None)
    sealing = SealKey()
    request = EnrollRequest(
        nonce=new_uuid7(),
        id=identity,
        role=role.value,
        site=site,
        at=clock(),
        public_key=key.public if key is not None else None,
        csr=csr,
        seal_key=sealing.public,
        facts=_facts(),
    )
    request = prove(request, token.proof_key)
    if key is not None:
        request = sign(request, key)
    topics = Topics(site=site)
    with TemporaryDirectory(prefix="foam-enroll-") as name:
        folder = Path(name)
        tls = TlsSettings()
        if token.authority:
            tls = TlsSettings(ca_file=folder / "authority.pem")
            (folder / "authority.pem").write_text(ssl.DER_cert_to_PEM_cert(token.authority))
        settings = SessionSettings(
            urls=tuple(one.anonymous for one in addresses),
            client_id=f"{token.id}-{request.nonce}",
            username=token.id,
            password=token.password,
            tls=tls,
            unverified_is_final=True,
        )
        reply = await _patiently(
            lambda: _ask(MqttSession(settings=settings), topics, token, request, timeout_s, waiting)
        )
        papers = _checked(reply, request, key, tls_key, sealing)
        hosts = [one.host for one in addresses]
        papers = replace(papers, broker=_nearest_first(reply.brokers, hosts))
        await _try_out(papers, topics, folder, reached=hosts)
    return papers


async def is_still_member(identity: Identity, folder: Path, *, url: str, site: str) -> bool:
    """Tell whether a broker takes the papers that a machine has; doubts a refusal for seconds.

    Args:
        identity: The member.
        folder: Folder of its identity file.
        url: The broker, where the identity file names none, or the same one by another name.
        site: The site, likewise.

    Raises:
        BrokerUnavailable: The broker cannot be reached.
        TimeoutError: Nor within ten seconds.
        ConfigurationError: A file beside the identity file cannot be read.
    """
    broker = identity.broker or url
    ports = {one.port for one in BrokerUrl.parse_all(url)}
    if ports & {one.port for one in BrokerUrl.parse_all(broker)}:
        broker = url  # under the name that is known here; another port is for other papers
    shown = standing.Papers(identity, folder, broker, Topics(site=identity.site or site))

    async def ask() -> None:
        if not await standing.is_known(shown):
            raise AccessDenied(f"{shown.url} does not take the papers of {identity.id}")

    try:
        await _patiently(ask)
    except AccessDenied:
        return False
    return True


async def _patiently(attempt: Callable[[], Awaitable[_T]]) -> _T:
    """Try again for some seconds when the broker refuses what it may only not know yet."""
    loop = asyncio.get_running_loop()
    believed_at = loop.time() + _DOUBT_S
    while True:
        try:
            return await attempt()
        except AccessDenied:
            if loop.time() + _DOUBT_AGAIN_S > believed_at:
                raise
        await asyncio.sleep(_DOUBT_AGAIN_S)


def _nearest_first(brokers: Sequence[str], hosts: Sequence[str]) -> str | None:
    """Join the brokers of a grant to a list, those on the hosts that were reached first.

    A broker's own machine knows it by its loopback address too; from elsewhere that is another one.
    """
    known = [url for text in brokers for url in BrokerUrl.parse_all(text)]
    if not any(map(is_loopback, hosts)):
        known = [url for url in known if not is_loopback(url.host)] or known
    known.sort(key=lambda url: url.host not in hosts)
    return ",".join(map(str, known)) or None


async def _try_out(papers: Papers, topics: Topics, folder: Path, *, reached: Sequence[str]) -> None:
    """Wait, for some seconds at most, until the broker knows the new member.

    Whoever starts the member next shall not be refused. A broker that is still behind then, or that
    cannot be reached from here, is no reason to throw papers away that are good.
    """
    if papers.broker is None or BrokerUrl.parse_all(papers.broker)[0].host not in reached:
        return
    identity = str(papers.reply.id)
    for name, text in _tls_texts(papers).items():
        (folder / f"{identity}.{name}").write_text(text)
    member = Identity.model_validate(
        {
            "id": identity,
            "role": papers.reply.role,
            "username": identity,
            "password": papers.password,
            "tls": bool(_tls_texts(papers)),
        }
    )
    shown = standing.Papers(member, folder, papers.broker, topics)
    try:
        await _patiently(lambda: standing.log_on(shown, client_id=identity))
    except (FoamError, TimeoutError) as error:
        _log.warning("enrollment.not_known_yet", id=identity, error=str(error))


async def _ask(
    session: MqttSession,
    topics: Topics,
    token: JoinToken,
    request: EnrollRequest,
    timeout_s: float,
    waiting: Callable[[str], None],
) -> EnrollReply:
    """Publish the request until there is a decision; the same request is answered once."""
    decided: asyncio.Future[EnrollReply] = asyncio.get_running_loop().create_future()

    async def on_reply(message: Message) -> None:
        try:
            reply: EnrollReply = decode(
                EnrollReply, message.payload, limit_bytes=ENROLL_LIMIT_BYTES
            )
            if reply.nonce != request.nonce:
                return  # to another newcomer with the same token
            check_proof(message.payload, token.proof_key)
        except ProtocolError as error:
            _log.warning("enrollment.reply_ignored", error=error.message)
            return
        if reply.status == "pending":
            waiting(reply.reason)
        elif not decided.done():
            decided.set_result(reply)

    payload = encode(request)
    topic = topics.build(TopicKind.ENROLL, request=token.id)
    try:
        async with asyncio.timeout(timeout_s), session:
            await session.wait_connected(min(0.8 * timeout_s, _CONNECT_S))
            await session.subscribe(
                topics.build(TopicKind.ENROLL_REPLY, request=token.id), on_reply
            )
            while True:
                session.post(topic, payload)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_ASK_AGAIN_S):
                        return await asyncio.shield(decided)
    except AccessDenied as error:
        raise AccessDenied(
            "the broker does not know the join token: it has run out, was revoked, or is of "
            "another site; ask for a new one"
        ) from error
    except TimeoutError as error:
        raise Unavailable(
            f"no decision within {timeout_s:.0f} s: is the registry running, and did an operator "
            "approve it? (foam admin enrollments)"
        ) from error


def _checked(
    reply: EnrollReply,
    request: EnrollRequest,
    key: SigningKey | None,
    tls_key: str | None,
    sealing: SealKey,
) -> Papers:
    """Make sure that the grant is what was asked for, and fits our keys."""
    if reply.status == "refused":
        raise AccessDenied(f"the registry refused: {reply.reason}", retryable=reply.retryable)
    if (reply.id, reply.role, reply.site) != (request.id, request.role, request.site):
        raise BadSignature("the grant is for somebody else")
    password = None
    if reply.sealed is not None:
        password = str(sealing.open(reply.sealed, nonce=request.nonce).get("password", "")) or None
    if (reply.certificate is None) == (password is None):
        raise BadSignature("the grant holds neither a certificate nor a password, or both")
    if reply.certificate is not None:
        check_certificate(reply.certificate, key=tls_key or "", identity=request.id)
    if key is not None:
        passport = reply.passport
        if passport is None or passport.public_key != key.public:
            raise BadSignature("the grant holds no passport for our key")
        verify(passport, reply.registries.get(passport.registry, ""))
    return Papers(reply, password, key, tls_key if reply.certificate is not None else None)


def renewal_request(
    identity: Identity, key: SigningKey, *, site: str, clock: Callable[[], int] = now_ms
) -> tuple[EnrollRequest, str | None]:
    """Make the request of a member for new papers, signed with the key that is known of it.

    Args:
        identity: The member.
        key: Its signing key.
        site: Its site.
        clock: UTC milliseconds.

    Returns:
        The request, and the new TLS key (PEM) that it asks a certificate for, if it has one.
    """
    tls_key, csr = make_key_and_request(identity.id) if identity.tls else (None, None)
    request = EnrollRequest(
        nonce=new_uuid7(),
        id=identity.id,
        role=identity.role.value,
        site=site,
        at=clock(),
        public_key=key.public,
        csr=csr,
        facts=_facts(),
    )
    return sign(request, key), tls_key


def renewed(
    payload: bytes, request: EnrollRequest, tls_key: str | None, identity: Identity
) -> Papers | None:
    """Check the answer to a renewal.

    Args:
        payload: As received.
        request: What was asked.
        tls_key: The key the certificate is for.
        identity: Who asked; its registries are believed, and nobody else.

    Returns:
        The papers; None when the message is no answer to this request.

    Raises:
        AccessDenied: The registry refused.
        ProtocolError: The answer is no grant of a registry that we know.
    """
    reply: EnrollReply = decode(EnrollReply, payload, limit_bytes=ENROLL_LIMIT_BYTES)
    if reply.nonce != request.nonce:
        return None
    if not any(_is_by(payload, public) for public in identity.registries.values()):
        raise BadSignature("the answer is not signed by a registry that we know")
    if reply.status == "refused":
        raise AccessDenied(f"the registry refused: {reply.reason}", retryable=reply.retryable)
    passport = reply.passport
    if passport is None or passport.public_key != request.public_key:
        raise BadSignature("the answer holds no passport for our key")
    if reply.certificate is not None:
        check_certificate(reply.certificate, key=tls_key or "", identity=request.id)
    return Papers(reply, None, None, tls_key if reply.certificate is not None else None)


def _is_by(payload: bytes, public: str) -> bool:
    try:
        verify(payload, public)
    except BadSignature:
        return False
    return True


def store_renewal(papers: Papers, identity: Identity, folder: Path) -> Identity:
    """Write renewed papers beside an identity file, and the file itself.

    Args:
        papers: As ``renewed`` returned them.
        identity: Whose.
        folder: Folder of the identity file.

    Returns:
        The identity as it is now.

    Raises:
        ConfigurationError: A file cannot be written.
    """
    reply = papers.reply
    made = identity.model_copy(
        update={
            "passport": reply.passport,
            "registries": {**identity.registries, **reply.registries},
            "renew_at": reply.renew_at,
        }
    )
    try:
        for name, text in _tls_texts(papers).items():
            write_private(folder / f"{identity.id}.{name}", text)
        write_private(
            folder / f"{identity.id}.json",
            made.model_dump_json(indent=1, exclude_none=True) + "\n",
        )
    except OSError as error:
        raise ConfigurationError(
            f"{folder} cannot be written: {error.strerror or error}"
        ) from error
    return made


def _facts() -> dict[str, str]:
    """What an operator would like to know who decides."""
    return {"host": platform.node()[:256], "system": f"{platform.system()} {platform.machine()}"}


def store_papers(papers: Papers, folder: Path) -> Path:
    """Write an identity with its keys, each file readable by its owner only.

    Args:
        papers: What was granted.
        folder: Where to; made when it is missing.

    Returns:
        The identity file, written last: what it names is there.

    Raises:
        ConfigurationError: A file cannot be written, or such an identity is there already.
    """
    reply = papers.reply
    identity = str(reply.id)
    path = folder / f"{identity}.json"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.exists():
            raise ConfigurationError(
                f"{path} exists: remove it to join anew, or name another folder"
            )
        if papers.signing_key is not None:
            with contextlib.suppress(FileNotFoundError):
                (folder / f"{identity}.key").unlink()  # of an enrollment that was cut off
            papers.signing_key.save(folder / f"{identity}.key")
        for name, text in _tls_texts(papers).items():
            write_private(folder / f"{identity}.{name}", text)
        made = Identity.model_validate(
            {
                "id": identity,
                "role": reply.role,
                "username": identity,
                "password": papers.password,
                "signing_key": f"{identity}.key" if papers.signing_key is not None else None,
                "broker": papers.broker or ",".join(reply.brokers) or None,
                "site": reply.site,
                "attested": reply.passport.attested if reply.passport is not None else None,
                "tls": bool(papers.tls_key or reply.authority),
                "passport": reply.passport,
                "registries": reply.registries,
                "renew_at": reply.renew_at,
            }
        )
        write_private(path, made.model_dump_json(indent=1, exclude_none=True) + "\n")
    except OSError as error:
        raise ConfigurationError(
            f"{folder} cannot be written: {error.strerror or error}"
        ) from error
    return path


def _tls_texts(papers: Papers) -> Mapping[str, str]:
    """Return what belongs into which file; key and certificate in one, so that they always fit."""
    reply, found = papers.reply, {}
    if reply.authority is not None:
        found["tls.ca"] = reply.authority
    if papers.tls_key is not None and reply.certificate is not None:
        found["tls.pem"] = papers.tls_key + reply.certificate
    return found
