"""Settings of an MQTT session."""

import re
from dataclasses import dataclass, replace
from typing import Annotated, Final, Literal
from urllib.parse import unquote, urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from broker.tls import TlsSettings
from capability_schemas.errors import ConfigurationError

# RFC 6455 section 3 for ws and wss.
DEFAULT_PORTS: Final = {"mqtt": 1883, "mqtts": 8883, "ws": 80, "wss": 443}
WEBSOCKET_PATH: Final = "/mqtt"
MAX_PAYLOAD_BYTES: Final = 16 * 1024 * 1024
_BETWEEN_URLS: Final = re.compile(r",(?=\s*[a-z]+://)")  # a comma may stand in a password

Version = Literal["3.1.1", "5"]


@dataclass(frozen=True, slots=True)
class BrokerUrl:
    """A broker's address taken apart.

    Attributes:
        host: Name or address.
        port: TCP port.
        tls: Whether the connection is encrypted.
        username: From the user part of the URL, if it has one.
        password: Likewise.
        path: Where MQTT is served over WebSocket; None for MQTT straight over TCP.
    """

    host: str
    port: int
    tls: bool
    username: str | None = None
    password: SecretStr | None = None
    path: str | None = None

    @classmethod
    def parse(cls, text: str) -> "BrokerUrl":
        """Read ``mqtt://[user[:password]@]host[:port]``; or ``mqtts``, ``ws``, ``wss`` likewise.

        Over WebSocket there may be a path; it is ``/mqtt`` when there is none.

        Raises:
            ConfigurationError: It is no such URL. The message repeats no password.
        """
        try:
            parts = urlsplit(text)
            port = parts.port
        except ValueError as error:
            raise ConfigurationError(f"broker URL cannot be read: {error}") from error
        if parts.scheme not in DEFAULT_PORTS or not parts.hostname:
            shown = f"{parts.scheme}://{parts.hostname or ''}" if "@" in text else text
            raise ConfigurationError(
                f"broker URL {shown!r} is not usable: write mqtt://host:port or mqtts://host:port "
                "(ws://host:port/mqtt or wss://host:port/mqtt over WebSocket)"
            )
        websocket = parts.scheme in {"ws", "wss"}
        if parts.query or parts.fragment or (not websocket and parts.path not in {"", "/"}):
            raise ConfigurationError(
                "a broker URL ends with the port (with the path for ws:// and wss://): it has no "
                "query"
            )
        if any(not "!" <= character <= "~" for character in parts.path):
            raise ConfigurationError("the path of a broker URL is plain ASCII without spaces")
        return cls(
            host=parts.hostname,
            port=DEFAULT_PORTS[parts.scheme] if port is None else port,
            tls=parts.scheme in {"mqtts", "wss"},
            username=None if parts.username is None else unquote(parts.username),
            password=None if parts.password is None else SecretStr(unquote(parts.password)),
            path=(parts.path if len(parts.path) > 1 else WEBSOCKET_PATH) if websocket else None,
        )

    @classmethod
    def parse_all(cls, text: str) -> "tuple[BrokerUrl, ...]":
        """Read the URLs of one broker, or of the brokers of a cluster, separated by commas.

        Raises:
            ConfigurationError: One of them is no such URL.
        """
        return tuple(cls.parse(url.strip()) for url in _BETWEEN_URLS.split(text))

    @property
    def anonymous(self) -> "BrokerUrl":
        """The same address without credentials."""
        return replace(self, username=None, password=None)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        scheme = "mqtt" if self.path is None else "ws"
        return f"{scheme}{'s' if self.tls else ''}://{host}:{self.port}{self.path or ''}"


class SessionSettings(BaseModel):
    """Settings of one session. Every duration is in seconds.

    Attributes:
        urls: Brokers of one cluster, tried in turn (``broker.session.ring``); what stands in the
            user part of one overrides ``username`` and ``password`` there.
        client_id: Name of the session at the broker.
        username: Identity; the access rules go by it.
        password: Its secret.
        version: MQTT version; "auto" tries 5 and falls back to 3.1.1, remembered per URL.
        clean: Whether the broker forgets the session when the connection ends.
        session_expiry_s: How long it remembers one that is not clean (MQTT 5 only).
        keepalive_s: Silence after which the broker, and this side, probe the connection.
        connect_timeout_s: Limit of TCP, TLS and CONNECT together.
        probe_timeout_s: Limit for the answer to a CONNECT of MQTT 5 with "auto": some 3.1.1
            brokers never answer it.
        window: QoS 1 messages under way at once; a broker's Receive Maximum may lower it.
        outbox_limit: Unconfirmed QoS 1 messages kept; beyond it senders get ``Overloaded``.
        publish_timeout_s: Default limit of ``publish``.
        subscribe_timeout_s: Limit for the answer to a SUBSCRIBE.
        doubt_s: How long a refused subscription is asked for again, where a cluster of brokers
            refuses for want of a leader (``broker.session.grants``).
        ack_timeout_s: Age at which an unconfirmed message condemns the connection: it is cut
            and made anew. Guards against brokers that stop acknowledging but keep the socket.
        flush_timeout_s: How long ``stop`` waits for the outbox to empty.
        max_payload_bytes: Largest payload sent or accepted.
        backoff_base_s: Longest wait before the second try; doubles with each further one.
        backoff_cap_s: Longest wait of all: so long a member may be away once its broker is back,
            however long that was gone. Not less than the jitter needs: of 500 members 200 a second
            try, evenly spread, and a port that is closed refuses them for nothing.
        reconnect_floor_s: Shortest wait before the same client id is used again at a broker
            that had accepted it. NATS drops quicker returns as flapping.
        tls: For ``mqtts`` and ``wss`` URLs.
        unverified_is_final: Whether a broker whose certificate does not verify ends the session;
            otherwise it is tried again, for it may get a better one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    urls: Annotated[tuple[str | BrokerUrl, ...], Field(min_length=1)]
    client_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,128}$")]
    username: str | None = None
    password: SecretStr | None = None
    version: Literal["auto", "3.1.1", "5"] = "auto"
    clean: bool = True
    session_expiry_s: Annotated[int, Field(gt=0, lt=2**32)] = 3600
    keepalive_s: Annotated[int, Field(ge=1, le=65535)] = 15
    connect_timeout_s: Annotated[float, Field(gt=0)] = 5.0
    probe_timeout_s: Annotated[float, Field(gt=0)] = 2.0
    window: Annotated[int, Field(ge=1, le=1000)] = 64
    outbox_limit: Annotated[int, Field(ge=1)] = 10_000
    publish_timeout_s: Annotated[float, Field(gt=0)] = 10.0
    subscribe_timeout_s: Annotated[float, Field(gt=0)] = 10.0
    doubt_s: Annotated[float, Field(ge=0)] = 20.0
    ack_timeout_s: Annotated[float, Field(gt=0)] = 30.0
    flush_timeout_s: Annotated[float, Field(ge=0)] = 2.0
    max_payload_bytes: Annotated[int, Field(ge=1, le=200 * 1024 * 1024)] = MAX_PAYLOAD_BYTES
    backoff_base_s: Annotated[float, Field(gt=0)] = 0.25
    backoff_cap_s: Annotated[float, Field(gt=0)] = 5.0
    reconnect_floor_s: Annotated[float, Field(ge=0)] = 1.0
    tls: TlsSettings = TlsSettings()
    unverified_is_final: bool = False

    @field_validator("urls")
    @classmethod
    def _readable(cls, urls: tuple[str | BrokerUrl, ...]) -> tuple[str | BrokerUrl, ...]:
        for url in urls:
            try:
                _parsed(url)
            except ConfigurationError as error:
                raise ValueError(error.message) from error
        return urls

    @property
    def brokers(self) -> tuple[BrokerUrl, ...]:
        """The brokers, taken apart."""
        return tuple(map(_parsed, self.urls))

    def login_at(self, url: BrokerUrl) -> tuple[str | None, str | None]:
        """Return user name and password in clear for one broker.

        A URL with a user brings the password, too, or none: that of another user is not for it.
        """
        username, secret = self.username, self.password
        if url.username is not None:
            username, secret = url.username, url.password
        return username, None if secret is None else secret.get_secret_value()

    @model_validator(mode="after")
    def _password_has_owner(self) -> "SessionSettings":
        if self.password is not None and self.username is None:
            raise ValueError("a password needs a username (MQTT 3.1.1 section 3.1.2.9)")
        return self


def _parsed(url: str | BrokerUrl) -> BrokerUrl:
    return url if isinstance(url, BrokerUrl) else BrokerUrl.parse(url)
