"""TLS on both sides: modern settings only, and failures said in a sentence.

TLS 1.2 with forward secrecy and authenticated encryption, or 1.3 (RFC 9325 section 3 and 4.2).
"""

import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field, model_validator

from capability_schemas.errors import ConfigurationError

_CIPHERS: Final = "ECDHE+AESGCM:ECDHE+CHACHA20"


class TlsSettings(BaseModel):
    """How an ``mqtts://`` connection proves and checks identities.

    Attributes:
        ca_file: PEM file of the authorities to trust; the system's when omitted.
        cert_file: Own certificate, PEM.
        key_file: Its private key, PEM.
        check_hostname: Whether the broker's certificate must name its host.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
    check_hostname: bool = True

    @model_validator(mode="after")
    def _pair(self) -> "TlsSettings":
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("cert_file and key_file go together: give both or neither")
        return self


class TlsListener(BaseModel):
    """A listener with TLS.

    Attributes:
        host: Address to listen on.
        port: TCP port; 0 takes a free one.
        cert_file: Certificate of the broker, PEM, with what leads to its root.
        key_file: Its private key, PEM.
        ca_file: Authorities whose client certificates count, PEM.
        members_port: Port of one more listener, for clients with certificates alone, on brokers
            that take either passwords or certificates on a port (Mosquitto); 0 takes a free one.
        crl_file: Revocation list of the authorities, PEM. Brokers that do not ask the store for
            the serial number of a certificate (Mosquitto) take certificates only with one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = "0.0.0.0"  # noqa: S104 - it is there to be reached, and asks everybody who he is
    port: int = Field(default=8883, ge=0, le=65535)
    cert_file: Path
    key_file: Path
    ca_file: Path
    members_port: int = Field(default=0, ge=0, le=65535)
    crl_file: Path | None = None


@dataclass(frozen=True, slots=True)
class PeerCertificate:
    """What a client's certificate says, its chain having been checked.

    Attributes:
        identity: Its common name.
        serial: Its serial number, hexadecimal in lower case, without leading zeros.
    """

    identity: str
    serial: str


def server_context(listener: TlsListener) -> ssl.SSLContext:
    """Make the context of a listener: certificates of clients are checked where they bring one.

    Raises:
        ConfigurationError: A file is missing or does not fit.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _harden(context)
    try:
        context.load_cert_chain(listener.cert_file, listener.key_file)
        context.load_verify_locations(listener.ca_file)
    except (OSError, ssl.SSLError) as error:
        raise ConfigurationError(
            f"TLS files of the broker cannot be used ({listener.cert_file}, {listener.key_file}, "
            f"{listener.ca_file}): {error}"
        ) from error
    context.verify_mode = ssl.CERT_OPTIONAL
    return context


_HUNG_UP: Final = (
    "the other side hung up in the TLS handshake: perhaps the port speaks no TLS (use mqtt:// or "
    "ws://, or the port for TLS)"
)


class _TidySocket(ssl.SSLSocket):
    """A socket that remembers what broke it, and closes itself when the handshake fails.

    For paho forgets such a socket open. So does Python (up to 3.13) when the other side hangs up
    between connecting and wrapping.
    """

    failure: ssl.SSLError | None = None

    def __del__(self) -> None:
        self.close()

    def do_handshake(self, block: bool = False) -> None:
        try:
            super().do_handshake(block)
        except ssl.SSLError:
            self.close()
            raise
        except ConnectionError as error:
            self.close()
            raise ConnectionResetError(_HUNG_UP) from error
        except OSError:
            self.close()
            raise

    def recv(self, size: int = 1024, flags: int = 0) -> bytes:
        # With TLS 1.3 a broker says after the handshake that it does not take our certificate, and
        # paho throws away what it says.
        try:
            return super().recv(size, flags)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except ssl.SSLError as error:
            self.failure = error
            raise


def client_context(tls: TlsSettings) -> ssl.SSLContext:
    """Make the context of a connection to a broker.

    Raises:
        ConfigurationError: A file is missing or does not fit.
    """
    try:
        context = ssl.create_default_context(cafile=tls.ca_file)
        context.sslsocket_class = _TidySocket
        _harden(context)
        context.check_hostname = tls.check_hostname
        if tls.cert_file is not None:
            context.load_cert_chain(tls.cert_file, tls.key_file)
    except (OSError, ssl.SSLError) as error:
        raise ConfigurationError(f"certificate files cannot be used: {error}") from error
    return context


def _harden(context: ssl.SSLContext) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(_CIPHERS)
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION


def peer_certificate(tls: Any) -> PeerCertificate | None:
    """Read the certificate a client has shown.

    Args:
        tls: The ``ssl_object`` of its connection.

    Returns:
        None when it has shown none, or one without exactly one common name.
    """
    shown = tls.getpeercert() if tls is not None else None
    if not shown:
        return None
    names = [
        value for part in shown.get("subject", ()) for name, value in part if name == "commonName"
    ]
    if len(names) != 1:
        return None
    return PeerCertificate(names[0], f"{int(shown['serialNumber'], 16):x}")


# Codes of X509_verify_cert (OpenSSL, x509_vfy.h).
_EXPIRED: Final = 10
_NOT_YET: Final = 9
_UNKNOWN_ISSUER: Final = frozenset({18, 19, 20, 21})
_WRONG_HOST: Final = frozenset({62, 64})
_WRONG_PURPOSE: Final = 26

_REVOKED: Final = "CERTIFICATE_REVOKED"
_ALERTS: Final = {
    "UNKNOWN_CA": "the broker does not know the authority of our certificate: enroll again",
    "CERTIFICATE_EXPIRED": "our certificate has run out: enroll again",
    _REVOKED: "our certificate was revoked: enroll again",
    "BAD_CERTIFICATE": "the broker refuses our certificate: enroll again",
    "CERTIFICATE_REQUIRED": "the broker wants a certificate: enroll, or use another port",
    "WRONG_VERSION_NUMBER": "the port speaks no TLS: use mqtt://, or the port for mqtts://",
    "UNEXPECTED_EOF": _HUNG_UP,
    "UNSUPPORTED_PROTOCOL": "the other side speaks old TLS only, at least 1.2 is needed",
    "PROTOCOL_VERSION": "the other side speaks old TLS only, at least 1.2 is needed",
    "HANDSHAKE_FAILURE": "no cipher that both sides accept, or no certificate where one is needed",
    "NO_SHARED_CIPHER": "no cipher that both sides accept",
}


def explain(error: BaseException) -> str | None:
    """Say in a sentence what went wrong with TLS, and what to do.

    Args:
        error: What was raised; its causes are looked at too.

    Returns:
        None when TLS has nothing to do with it.
    """
    for seen in _causes(error):
        if isinstance(seen, ssl.SSLCertVerificationError):
            return _explain_verification(seen)
        if isinstance(seen, ssl.SSLError):
            reason = (seen.reason or "").upper()
            known = (words for name, words in _ALERTS.items() if name in reason)
            return next(known, f"TLS failed: {seen.reason or seen}")
    return None


def is_unverified(error: BaseException) -> bool:
    """Tell whether the other side's certificate did not verify; causes are looked at too."""
    return any(isinstance(one, ssl.SSLCertVerificationError) for one in _causes(error))


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def never_connected(error: BaseException) -> bool:
    """Tell whether an error is of the network or its names, before anybody was there to talk to.

    Args:
        error: What was raised; its causes are looked at too.
    """
    return any(
        isinstance(one, ConnectionRefusedError)
        or (isinstance(one, OSError) and not isinstance(one, (ssl.SSLError, ConnectionError)))
        for one in _causes(error)
    )


def says_revoked(connection: object) -> bool:
    """Tell whether the broker has said, after the handshake, that our certificate is revoked.

    Args:
        connection: Socket of a connection made with ``client_context``.
    """
    failure = connection.failure if isinstance(connection, _TidySocket) else None
    return failure is not None and _REVOKED in (failure.reason or "").upper()


def failure_of(connection: object) -> str | None:
    """Say in a sentence what broke a connection made with ``client_context``; None: nothing did.

    Args:
        connection: Its socket.
    """
    failure = connection.failure if isinstance(connection, _TidySocket) else None
    return None if failure is None else explain(failure)


def _explain_verification(error: ssl.SSLCertVerificationError) -> str:
    code = error.verify_code
    if code == _EXPIRED:
        return "the broker's certificate has run out: renew it there (is our clock right?)"
    if code == _NOT_YET:
        return "the broker's certificate is not valid yet: is our clock right?"
    if code in _UNKNOWN_ISSUER:
        return (
            "the broker's certificate is signed by nobody we trust: is it the right broker, and "
            "the right authority file?"
        )
    if code in _WRONG_HOST:
        return f"the broker's certificate is for another host: {error.verify_message}"
    if code == _WRONG_PURPOSE:
        return "the other side shows a certificate that is not for brokers"
    return f"the broker's certificate cannot be checked: {error.verify_message}"
