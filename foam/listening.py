"""Where the broker of this machine listens, and the certificate it shows there.

Whatever is not loopback is TLS, unless somebody asks for plain text in so many words.
"""

import ipaddress
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from broker.access.authority import Authority, read_certificate
from broker.access.credentials import write_private
from broker.tls import TlsListener
from capability_schemas.errors import ConfigurationError
from capability_schemas.ids import now_ms
from foam.mesh import MeshFolder

__all__ = ["DEFAULT_TLS_PORT", "BrokerPapers", "Listeners", "is_loopback", "own_names"]

DEFAULT_TLS_PORT: Final = 8883
_LOOPBACK: Final = "127.0.0.1"
_RENEW_BELOW: Final = 1 / 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Listeners:
    """Where a broker listens.

    Attributes:
        host: Address without TLS.
        port: Its port; 0 takes a free one.
        tls_host: Address with TLS; None: nowhere.
        tls_port: Its port; 0 takes a free one.
        names: Further names and addresses that clients reach it by, for its certificate.
    """

    host: str
    port: int
    tls_host: str | None = None
    tls_port: int = DEFAULT_TLS_PORT
    names: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        host: str,
        port: int,
        *,
        tls_port: int = DEFAULT_TLS_PORT,
        names: Sequence[str] = (),
        plain: bool = False,
        tls: bool = False,
    ) -> "Listeners":
        """Decide from what an operator asked for.

        Args:
            host: Address to listen on.
            port: Port for plain text.
            tls_port: Port for TLS.
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
                names=tuple(names),
            )
        if plain:
            return cls(host=host, port=port)
        return cls(host=_LOOPBACK, port=port, tls_host=host, tls_port=tls_port, names=tuple(names))

    def arguments(self) -> tuple[str, ...]:
        """Return the options of ``foam broker`` that mean the same."""
        said = ["--host", self.host, "--port", str(self.port)]
        if self.tls_host is not None:
            said += ["--tls-host", self.tls_host, "--tls-port", str(self.tls_port)]
            for name in self.names:
                said += ["--tls-name", name]
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
        found = ["localhost", _LOOPBACK, name, *_addresses(name)]
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

    def listener(self, host: str, port: int) -> TlsListener:
        """Return a listener that uses these files."""
        return TlsListener(
            host=host, port=port, cert_file=self._cert, key_file=self._key, ca_file=self._ca
        )

    def refresh(self) -> bool:
        """Make the files where they are missing, and anew when they no longer fit or soon run out.

        Returns:
            Whether anything changed: the broker then has to read them again.

        Raises:
            ConfigurationError: They cannot be written, or the authority is damaged.
        """
        authority = Authority.create(self._folder.authority, site=self._site, clock=self._clock)
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
