"""Runs a broker as a child process: what the engines share, and the Protocol they implement.

An engine starts its broker, waits until it speaks MQTT, tells the URL, hands on changed
credentials, and ends it; no process is left behind even when this one is killed.
"""

import asyncio
import os
import secrets
import shutil
import signal
import socket
import ssl
import sys
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, Protocol, Self

import structlog
from pydantic import BaseModel, ConfigDict, Field, model_validator

from broker import guard
from broker.access.credentials import CredentialStore
from broker.ports import free_port
from broker.tls import TlsListener
from capability_schemas.errors import BrokerUnavailable, ConfigurationError
from capability_schemas.topics import Topics

_log = structlog.get_logger(__name__)

_STOP_TIMEOUT_S: Final = 8.0
_PORT_TRIES: Final = 3
_PROBE_TIMEOUT_S: Final = 2.0
_CONNACK: Final = 0x20
_ACCEPTED: Final = b"\x20\x02\x00\x00"  # MQTT 3.1.1 section 3.2


class WebSocketListener(BaseModel):
    """A listener for MQTT over WebSocket, at the path ``/mqtt``.

    Attributes:
        host: Address to listen on.
        port: TCP port; 0 takes a free one.
        secure: With TLS (``wss``), with the certificate of the TLS listener.
        origins: Origins (``https://host:port``) of web pages that may connect beside those of the
            same host and port; ``*``: all. Embedded broker only: Mosquitto and NATS, as we run
            them, ask no page where it comes from.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = "127.0.0.1"
    port: int = Field(default=0, ge=0, le=65535)
    secure: bool = False
    origins: tuple[str, ...] = ()


class EngineSettings(BaseModel):
    """How to run a broker.

    Attributes:
        data_dir: Folder of its own; configuration, log and stored messages go there.
        host: Address to listen on.
        port: TCP port; 0 takes a free one.
        packet_limit_bytes: Largest packet taken from a client. Well above the largest task, so that
            a task somewhat too large still reaches the router and gets a clear answer.
        inflight_limit: QoS 1 messages on their way to one client.
        queue_limit: Messages kept for one client that is slow or away; newer ones are dropped.
        session_expiry_s: How long a client that is away keeps its session, seconds.
        connect_timeout_s: How long a connection may take to send its CONNECT, seconds; embedded
            broker only, others have limits of their own.
        connection_limit: Most connections at once, those included that are not logged on yet;
            embedded broker only, as the next one.
        address_limit: Most of them from one address. When either is reached, whoever has connected
            without a CONNECT so far makes room, the oldest first.
        return_s: How long clients of a broker that died have to come back before their last wills
            are published, seconds; embedded broker only.
        tls: A second listener, with TLS; the first one is for this machine alone then.
        websocket: A further listener, for MQTT over WebSocket.
        access: How Mosquitto learns of rights: ``dynamic`` by the commands of its dynamic security
            plugin, ``static`` by files; None takes the plugin where it is installed, unless the
            site has more than 1,000 identities.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    data_dir: Path
    host: str = "127.0.0.1"
    port: int = Field(default=0, ge=0, le=65535)
    packet_limit_bytes: int = Field(default=16 * 1024 * 1024, ge=1024, le=268_435_455)
    inflight_limit: int = Field(default=200, ge=1, le=65_535)
    queue_limit: int = Field(default=20_000, ge=1)
    session_expiry_s: int = Field(default=24 * 3600, ge=1)
    connect_timeout_s: float = Field(default=5.0, gt=0)
    connection_limit: int = Field(default=4096, ge=1)
    address_limit: int = Field(default=2048, ge=1)
    return_s: float = Field(default=20.0, ge=0)
    tls: TlsListener | None = None
    websocket: WebSocketListener | None = None
    access: Literal["static", "dynamic"] | None = None

    @model_validator(mode="after")
    def _secure_with_papers(self) -> "EngineSettings":
        if self.websocket is not None and self.websocket.secure and self.tls is None:
            raise ValueError("a secure websocket listener needs the certificate of tls: give both")
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerTraits:
    """What a broker can and cannot do, each one asserted by the conformance suite.

    Attributes:
        mqtt5: Speaks MQTT 5; otherwise it refuses such a CONNECT at once.
        qos2: Takes a QoS 2 publish; otherwise it drops the connection.
        merges_overlap: One copy for overlapping filters of one client, not one per filter.
        redelivers_on_connect: Unacknowledged QoS 1 messages come again with the next connection,
            not after a fixed time.
        survives_restart: Sessions outlive the process.
        keeps_retained: Retained messages do.
        refuses_forbidden_filter: SUBACK says 0x80 for a filter outside the access table.
        binds_client_id: Nodes, routers and registries that come with a password cannot connect
            under another client id.
        guards_sessions: Nobody can take over the session of another identity.
        revokes_at_once: Connections of a removed identity are cut on reload.
        limits_packets: Enforces ``packet_limit_bytes``; otherwise every receiver has to.
        tls: Can listen with TLS.
        websocket: Can listen for MQTT over WebSocket.
        certificates: Takes the identity from a client's certificate; others want a password.
        cuts_certificates: Connections made with a certificate are cut on reload when it no longer
            counts; otherwise they stay, without any rights.
    """

    mqtt5: bool
    qos2: bool
    merges_overlap: bool
    redelivers_on_connect: bool
    survives_restart: bool
    keeps_retained: bool
    refuses_forbidden_filter: bool
    binds_client_id: bool
    guards_sessions: bool
    revokes_at_once: bool
    limits_packets: bool
    tls: bool
    websocket: bool
    certificates: bool
    cuts_certificates: bool


class BrokerEngine(Protocol):
    """A broker that runs as our child while the context is entered."""

    traits: BrokerTraits

    @property
    def url(self) -> str:
        """``mqtt://host:port`` of the running broker."""
        ...

    @property
    def tls_port(self) -> int:
        """TCP port of the listener with TLS, 0 where there is none."""
        ...

    @property
    def members_port(self) -> int:
        """TCP port where certificates are taken, 0 where they are not."""
        ...

    @property
    def websocket_port(self) -> int:
        """TCP port of the listener for WebSocket, 0 where there is none."""
        ...

    async def reload_access(self) -> None:
        """Make changed credentials, and certificate files, count, for connected clients too."""
        ...

    async def wait(self) -> int:
        """Wait until the broker process ends, whoever ends it, and return its exit status."""
        ...

    async def __aenter__(self) -> Self:
        """Start the broker."""
        ...

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None:
        """Stop it."""
        ...


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def find_binary(name: str) -> Path | None:
    """Look for a program on the path, and where distributions put servers."""
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin:/sbin")
    return Path(found) if found else None


def check_port(host: str, port: int) -> None:
    """Make sure that nobody listens on a port.

    Raises:
        ConfigurationError: Somebody does, or the address is not ours.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as exc:
            raise ConfigurationError(
                f"cannot listen on {host} port {port}: {exc.strerror}; "
                "stop what uses it, or choose another port (0 takes a free one)",
                port=port,
            ) from exc


async def speaks_mqtt(
    host: str,
    port: int,
    *,
    tls: bool = False,
    login: tuple[str, str] | None = None,
    timeout_s: float = _PROBE_TIMEOUT_S,
) -> bool:
    """Tell whether something on a port answers an MQTT CONNECT, be it with a refusal.

    Cancellation is safe.

    Args:
        host: Its address.
        port: The port.
        tls: Whether to ask with TLS, whoever answers: nothing is said but a name of ours.
        login: User and password to ask with; then only being let in counts.
        timeout_s: How long to wait for the answer, seconds.
    """
    context = None
    if tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(host, port, ssl=context)
            try:
                writer.write(_probe_connect(login))
                answer = await reader.readexactly(1 if login is None else len(_ACCEPTED))
            finally:
                writer.close()
    except (OSError, TimeoutError, asyncio.IncompleteReadError):
        return False
    return answer[0] == _CONNACK if login is None else answer == _ACCEPTED


def _probe_connect(login: tuple[str, str] | None) -> bytes:
    """Make a CONNECT (MQTT 3.1.1 section 3.1): clean session, keepalive 5 s, an id of its own."""
    fields = [f"foam-probe-{secrets.token_hex(4)}", *(login or ())]
    flags = 0x02 if login is None else 0xC2
    body = b"\x00\x04MQTT\x04" + bytes((flags, 0, 5))
    body += b"".join(len(one).to_bytes(2, "big") + one.encode() for one in fields)
    return bytes((0x10, len(body))) + body


def guarded(program: Path, *arguments: str) -> list[str]:
    """Return the command line that runs a program so that it dies with this process."""
    script = str(Path(guard.__file__).resolve())
    return [sys.executable, "-I", "-S", script, str(os.getpid()), str(program), *arguments]


class BrokerProcess:
    """One child process with its log file.

    Args:
        name: What to call it in logs and errors.
        log_path: Where its output goes; appended to.
    """

    def __init__(self, *, name: str, log_path: Path) -> None:
        self.name = name
        self.log_path = log_path
        self._process: asyncio.subprocess.Process | None = None

    @property
    def process(self) -> asyncio.subprocess.Process:
        """The running or ended process.

        Raises:
            BrokerUnavailable: It was never started.
        """
        if self._process is None:
            raise BrokerUnavailable(f"the {self.name} broker is not running")
        return self._process

    @property
    def is_running(self) -> bool:
        """Whether it was started and has not ended."""
        return self._process is not None and self._process.returncode is None

    async def start(
        self, command: Sequence[str], *, piped: bool = False, folder: Path | None = None
    ) -> None:
        """Start the child.

        Args:
            command: Program and arguments.
            piped: Connect its standard input and output to us; else only the log file.
            folder: Working folder; ours when omitted.

        Raises:
            ConfigurationError: The program or the log file cannot be opened.
        """
        pipe, none = asyncio.subprocess.PIPE, asyncio.subprocess.DEVNULL
        try:
            with self.log_path.open("ab") as log:
                self._process = await asyncio.create_subprocess_exec(
                    *command,
                    stdin=pipe if piped else none,
                    stdout=pipe if piped else log,
                    stderr=log,
                    cwd=folder,
                    start_new_session=True,  # Ctrl-C reaches us, and we end it in order
                )
        except OSError as exc:
            raise ConfigurationError(f"cannot run the {self.name} broker: {exc}") from exc

    def signal(self, number: signal.Signals) -> None:
        """Send a signal.

        Raises:
            BrokerUnavailable: It is not running.
        """
        if not self.is_running:
            raise BrokerUnavailable(f"the {self.name} broker is not running")
        self.process.send_signal(number)

    async def stop(self) -> None:
        """End the child: SIGTERM, and SIGKILL when it takes longer than 8 seconds. Idempotent."""
        if self._process is None:
            return
        if self._process.stdin is not None:
            self._process.stdin.close()
        if self._process.returncode is None:
            try:
                self._process.terminate()
                async with asyncio.timeout(_STOP_TIMEOUT_S):
                    await self._process.wait()
            except ProcessLookupError:
                pass
            except TimeoutError:
                _log.warning("broker.killed", broker=self.name, after_s=_STOP_TIMEOUT_S)
                self._process.kill()
        await self._process.wait()

    def last_words(self) -> str:
        """Return the end of the log, for an error message."""
        try:
            text = self.log_path.read_text(errors="replace")
        except OSError:
            return ""
        return text[-800:].strip()


class ChildEngine:
    """What all engines do alike; a subclass writes the configuration and names the program.

    Life cycle: ``async with``; once, a second entry raises.

    Args:
        settings: How to run the broker.
        credentials: Who may connect.
        topics: The grammar that access rules are made for.
    """

    name = "broker"
    traits: BrokerTraits
    certificates_apart = False
    """Whether it takes certificates on a port of their own."""
    ready_timeout_s = 20.0
    """How long it may take to answer after its start, seconds."""

    def __init__(
        self, *, settings: EngineSettings, credentials: CredentialStore, topics: Topics
    ) -> None:
        self.settings = settings
        self.credentials = credentials
        self.topics = topics
        self._port = 0
        self._tls_port = 0
        self._members_port = 0
        self._websocket_port = 0
        self._child = BrokerProcess(name=self.name, log_path=settings.data_dir / f"{self.name}.log")

    @property
    def url(self) -> str:
        """``mqtt://host:port`` of the running broker.

        Raises:
            BrokerUnavailable: It is not running.
        """
        if not self._port:
            raise BrokerUnavailable(f"the {self.name} broker is not running")
        return f"mqtt://{_bracketed(self.settings.host)}:{self._port}"

    @property
    def port(self) -> int:
        """TCP port of the running broker, 0 before."""
        return self._port

    @property
    def tls_port(self) -> int:
        """TCP port of the listener with TLS, 0 where there is none."""
        return self._tls_port

    @property
    def members_port(self) -> int:
        """TCP port where certificates are taken, 0 where they are not."""
        return self._members_port or (self._tls_port if self.traits.certificates else 0)

    @property
    def websocket_port(self) -> int:
        """TCP port of the listener for WebSocket, 0 where there is none."""
        return self._websocket_port

    @property
    def pid(self) -> int:
        """Process id of the broker.

        Raises:
            BrokerUnavailable: It was never started.
        """
        return self._child.process.pid

    async def wait(self) -> int:
        """Wait until the broker process ends, whoever ends it; cancellation is safe.

        Returns:
            Its exit status; negative for a signal.
        """
        return await self._child.process.wait()

    async def reload_access(self) -> None:
        """Make changed credentials count, for connected clients too.

        Raises:
            BrokerUnavailable: The broker is not running.
            ConfigurationError: The credentials cannot be read.
        """
        self.credentials.refresh()
        self._write_access()
        self._child.signal(signal.SIGHUP)

    async def __aenter__(self) -> Self:
        """Start the broker and wait until it answers.

        Raises:
            ConfigurationError: The port is taken, the program is missing, or the broker refuses
                its configuration.
            BrokerUnavailable: It does not answer within ``ready_timeout_s``.
            RuntimeError: Entered twice.
        """
        if self._port or self._child.is_running:
            raise RuntimeError(f"{type(self).__name__} is entered already")
        self.settings.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        for host, port in self._wanted_ports():
            if port:
                check_port(host, port)
        self.credentials.refresh()
        try:
            async with asyncio.timeout(self.ready_timeout_s):
                self._port = await self._launch()
        except TimeoutError as exc:
            await self._child.stop()
            raise BrokerUnavailable(
                f"the {self.name} broker does not answer after {self.ready_timeout_s:.0f} s; "
                f"its log is {self._child.log_path}: {self._child.last_words()}"
            ) from exc
        except BaseException:
            await self._child.stop()
            raise
        _log.info("broker.ready", broker=self.name, port=self._port, pid=self.pid)
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop the broker."""
        self._port = 0
        await self._child.stop()
        _log.info("broker.stopped", broker=self.name)

    def _wanted_ports(self) -> Iterator[tuple[str, int]]:
        """Name every address it will listen on; port 0 for a free one."""
        settings, tls = self.settings, self.settings.tls
        yield settings.host, settings.port
        if tls is not None:
            yield tls.host, tls.port
            yield tls.host, tls.members_port if self.certificates_apart else 0
        if settings.websocket is not None:
            yield settings.websocket.host, settings.websocket.port

    @abstractmethod
    async def _launch(self) -> int:
        """Start the child and return its port once it answers."""

    @abstractmethod
    def _write_access(self) -> None:
        """Write what the broker reads about identities and their rights."""


class ForeignEngine(ChildEngine):
    """An engine whose broker is a program of its own, with a configuration file."""

    async def _launch(self) -> int:
        """Start the child on the port asked for, or on a free one, and wait until it answers."""
        for attempt in range(_PORT_TRIES):
            port = self.settings.port or free_port(self.settings.host)
            tls = self.settings.tls
            self._tls_port = 0 if tls is None else tls.port or free_port(tls.host)
            self._members_port = 0
            if tls is not None and tls.crl_file is not None and self.certificates_apart:
                self._members_port = tls.members_port or free_port(tls.host)
            ws = self.settings.websocket
            self._websocket_port = 0 if ws is None else ws.port or free_port(ws.host)
            self._write_access()
            await self._child.start(self._command(port))
            while self._child.is_running:
                if await self._answers(port) and self._child.is_running:
                    return port
                await asyncio.sleep(0.02)
            taken = "in use" in self._child.last_words()
            if self.settings.port or not taken or attempt == _PORT_TRIES - 1:
                break
        raise ConfigurationError(
            f"the {self.name} broker ended with status {self._child.process.returncode}: "
            f"{self._child.last_words()}"
        )

    async def _answers(self, port: int) -> bool:
        return await speaks_mqtt(self.settings.host, port)

    @abstractmethod
    def _command(self, port: int) -> list[str]:
        """Write the configuration for a port and return the command line."""
