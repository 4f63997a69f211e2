"""Where the broker of this machine listens, and the certificate it shows there.

Whatever is not loopback is TLS, unless somebody asks for plain text in so many words.
"""

import contextlib
import fcntl
import ipaddress
import socket
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from broker.access.authority import Authority, read_certificate
from broker.access.credentials import write_private
from broker.engine import WebSocketListener
from broker.session.settings import BrokerUrl
from broker.tls import TlsListener
from capability_schemas.errors import ConfigurationError
from capability_schemas.ids import now_ms
from foam.mesh import MeshFolder

__all__ = ["DEFAULT_TLS_PORT", "LOOPBACK", "BrokerPapers", "Listeners", "is_loopback", "own_names"]

DEFAULT_TLS_PORT: Final = 8883
LOOPBACK: Final = "127.0.0.1"
_RENEW_BELOW: Final = 1 / 3
_PORTS: Final = 65_536
_LIST_DAYS: Final = 7.0
_LIST_AGAIN_MS: Final = 24 * 3600 * 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Listeners:
    """Where a broker listens.

    Attributes:
        host: Address without TLS.
        port: Its port; 0 takes a free one.
        tls_host: Address with TLS; None: nowhere.
        tls_port: Its port; 0 takes a free one.
        members_port: Port with TLS for members with a certificate, on brokers that take either
            passwords or certificates on a port (Mosquitto); 0 takes a free one, None the one
            after ``tls_port``.
        names: Further names and addresses that clients reach it by, for its certificate.
        websocket_port: Port for MQTT over WebSocket: on ``tls_host``, with TLS, where there is one,
            else on ``host``; 0 takes a free one, None listens nowhere.
        websocket_origins: Origins of web pages that may connect there beside its own; ``*``: all.
    """

    host: str
    port: int
    tls_host: str | None = None
    tls_port: int = DEFAULT_TLS_PORT
    members_port: int | None = None
    names: tuple[str, ...] = ()
    websocket_port: int | None = None
    websocket_origins: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        host: str,
        port: int,
        *,
        tls_port: int = DEFAULT_TLS_PORT,
        members_port: int | None = None,
        names: Sequence[str] = (),
        plain: bool = False,
        tls: bool = False,
    ) -> "Listeners":
        """Decide from what an operator asked for.

        Args:
            host: Address to listen on.
            port: Port for plain text.
            tls_port: Port for TLS.
            members_port: Port for members with a certificate, where they need one of their own.
            names: Names for the certificate.
            plain: Whether plain text is wanted on an address that others reach.
            tls: Whether TLS is wanted on loopback too.
        """
        if is_loopback(host):
            return cls(
                host=host,
                port=port,
                tls_host=host if tls else None,
                tls_port=tls_port,
                members_port=members_port,
                names=tuple(names),
            )
        if plain:
            return cls(host=host, port=port)
        return cls(
            host=LOOPBACK,
            port=port,
            tls_host=host,
            tls_port=tls_port,
            members_port=members_port,
            names=tuple(names),
        )

    def where_it_was(self, facts: Mapping[str, Any]) -> "Listeners":
        """Return the same listeners with the ports that a broker had.

        Args:
            facts: What it said when it was ready.
        """
        public, url = facts.get("public", ()), BrokerUrl.parse(str(facts["url"]))
        ports = {} if url.tls else {"port": url.port}
        for name, urls in (
            ("tls_port", public),
            ("members_port", [one for one in facts.get("members", ()) if one not in public]),
            ("websocket_port", facts.get("websocket", ())),
        ):
            for one in urls:
                ports[name] = BrokerUrl.parse(str(one)).port
        return replace(self, **ports)  # type: ignore[arg-type]  # ports are numbers

    def shifted(self, by: int) -> "Listeners":
        """Return the listeners of a further server on the same machine: its ports come later.

        Args:
            by: How much later; ports that are free ones stay so.
        """
        moved = {
            name: port + by
            for name in ("port", "tls_port", "members_port", "websocket_port")
            if (port := getattr(self, name))
        }
        return replace(self, **moved)

    def websocket(self) -> WebSocketListener | None:
        """Return the listener for WebSocket, if there is to be one."""
        if self.websocket_port is None:
            return None
        return WebSocketListener(
            host=self.tls_host or self.host,
            port=self.websocket_port,
            secure=self.tls_host is not None,
            origins=self.websocket_origins,
        )

    def port_of_members(self) -> int:
        """Return the port for members with a certificate; 0 takes a free one."""
        if self.members_port is not None:
            return self.members_port
        return (self.tls_port + 1) % _PORTS if self.tls_port else 0

    def arguments(self) -> tuple[str, ...]:
        """Return the options of ``foam broker`` that mean the same."""
        said = ["--host", self.host, "--port", str(self.port)]
        if self.tls_host is not None:
            said += ["--tls-host", self.tls_host, "--tls-port", str(self.tls_port)]
            said += ["--members-port", str(self.port_of_members())]
            for name in self.names:
                said += ["--tls-name", name]
        if self.websocket_port is not None:
            said += ["--ws-port", str(self.websocket_port)]
            for origin in self.websocket_origins:
                said += ["--ws-origin", origin]
        return tuple(said)


def is_loopback(host: str) -> bool:
    """Tell whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def own_names(host: str) -> list[str]:
    """Return the names and addresses by which clients may reach a listener.

    Args:
        host: Its address; for that of every interface, those of this machine are looked up.
    """
    found = [host]
    try:
        everywhere = ipaddress.ip_address(host).is_unspecified
    except ValueError:
        everywhere = False
    if everywhere:
        name = socket.gethostname()
        found = ["localhost", LOOPBACK, name, *_addresses(name)]
    return list(dict.fromkeys(one for one in found if one))


def _addresses(name: str) -> list[str]:
    found = []
    try:
        found += [str(entry[4][0]).partition("%")[0] for entry in socket.getaddrinfo(name, None)]
    except OSError:
        found += []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # Nothing is sent: the kernel says which address it would use for the way out.
            probe.connect(("192.0.2.1", 9))
            found.append(str(probe.getsockname()[0]))
        except OSError:
            found += []
    return found


class BrokerPapers:
    """Key and certificate of our broker, made and renewed by the site's authority. Blocking.

    Args:
        folder: Data folder of the mesh.
        site: The site.
        names: What the certificate has to be good for.
        clock: UTC milliseconds.
    """

    def __init__(
        self,
        folder: MeshFolder,
        *,
        site: str,
        names: Sequence[str],
        clock: Callable[[], int] = now_ms,
    ) -> None:
        self._folder = folder
        self._site = site
        self.names = tuple(names)
        self._clock = clock
        self._cert = folder.broker_data / "server.crt"
        self._key = folder.broker_data / "server.key"
        self._ca = folder.broker_data / "authority.pem"
        self._crl = folder.broker_data / "revoked.pem"
        self._lock = folder.broker_data / "papers.lock"
        self._roots: frozenset[str] = frozenset()
        self._listed: tuple[int, str, frozenset[str]] = (0, "", frozenset())

    def listener(self, host: str, port: int, *, members_port: int = 0) -> TlsListener:
        """Return a listener that uses these files."""
        return TlsListener(
            host=host,
            port=port,
            cert_file=self._cert,
            key_file=self._key,
            ca_file=self._ca,
            members_port=members_port,
            crl_file=self._crl,
        )

    def list_revoked(self, on_record: Collection[str]) -> bool:
        """Write the revocation list: every certificate that is valid and not on record.

        Args:
            on_record: Serial numbers that count, hexadecimal.

        Returns:
            Whether the list was written: because others are on it, another authority signs, or it
            is a day old.

        Raises:
            ConfigurationError: It cannot be written, or the authority is damaged.
        """
        listed_at, bundle, listed = self._listed
        # Each list is later than the one before: a broker that holds both goes by the newest, and
        # the times in them are whole seconds (RFC 5280 section 5.1.2.4).
        at = max(self._clock(), listed_at + 1000)
        authority = Authority.create(self._folder.authority, site=self._site, clock=lambda: at)
        revoked = frozenset(authority.not_on_record(on_record))
        same = (bundle, listed) == (authority.bundle, revoked)
        if same and at - listed_at < _LIST_AGAIN_MS:
            return False
        try:
            text = authority.revocation_list(sorted(revoked), days=_LIST_DAYS)
            write_private(self._crl, text)
        except OSError as error:
            raise ConfigurationError(
                f"{self._crl} cannot be written: {error.strerror or error}"
            ) from error
        self._listed = (at, authority.bundle, revoked)
        return True

    def authority_changed(self) -> bool:
        """Tell whether the site's authority has another root than when the files were made."""
        found = self._folder.authority.glob("root-*.pem")
        return frozenset(path.name for path in found) != self._roots

    def refresh(self) -> bool:
        """Make the files where they are missing, and anew when they no longer fit or soon run out.

        Returns:
            Whether anything changed: the broker then has to read them again.

        Raises:
            ConfigurationError: They cannot be written, or the authority is damaged.
        """
        with self._alone():
            return self._refresh()

    def _refresh(self) -> bool:
        authority = Authority.create(self._folder.authority, site=self._site, clock=self._clock)
        self._roots = frozenset(f"root-{root.number}.pem" for root in authority.roots())
        changed = False
        try:
            if _text(self._ca) != authority.bundle:
                write_private(self._ca, authority.bundle)
                changed = True
            if changed or not self._is_fresh():
                key, made = authority.issue_server(self.names)
                write_private(self._key, key)
                write_private(self._cert, made.pem)
                changed = True
        except OSError as error:
            raise ConfigurationError(
                f"{self._folder.broker_data} cannot be written: {error.strerror or error}"
            ) from error
        return changed

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep the servers of a cluster, which share these files, from making them all at once.

        Raises:
            ConfigurationError: The folder cannot be written.
        """
        try:
            lock = self._lock.open("a")
        except OSError as error:
            raise ConfigurationError(
                f"{self._lock} cannot be written: {error.strerror or error}"
            ) from error
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _is_fresh(self) -> bool:
        found = read_certificate(_text(self._cert))
        return (
            found is not None
            and found.names == frozenset(self.names)
            and found.left(self._clock()) > _RENEW_BELOW
            and self._key.exists()
        )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except (FileNotFoundError, UnicodeDecodeError):
        return ""
