"""nats-server with JetStream as the broker: the engine to grow into (a cluster speaks the same).

Only a generated configuration. nats-server cannot check the verifiers of the credential store, so
the plain passwords of the identities that may connect are handed in and stand in a file of mode
0600 beside the configuration. MQTT 3.1.1, QoS 0 and 1.

It has one MQTT listener. With TLS that one is the TLS listener, and the members of this machine use
it too (``url`` is ``mqtts://`` then). Identities are passwords: it could map certificates to users,
but then every client needs one.

With a seat in a cluster (``broker.nats_cluster``) it is one server of several that hold the same
sessions, messages and retained messages. It is ready when it has let somebody in: that takes a
leader, and a session written down by two of three servers. Before, it has 15 s to catch up with
what the others hold. Wills of the clients of a server that was killed are not published, by none of
the others either (2.9): heartbeats have to do.
"""

import asyncio
import json
import secrets
import time
from collections.abc import Iterator, Mapping
from typing import Final

from broker.access.compilers import nats_users
from broker.access.credentials import CredentialStore, write_private
from broker.access.policy import AccessPolicy
from broker.engine import (
    BrokerTraits,
    EngineSettings,
    ForeignEngine,
    find_binary,
    guarded,
    speaks_mqtt,
)
from broker.nats_cluster import ClusterSeat, SeatedServer
from broker.ports import free_port
from broker.tls import TlsListener
from capability_schemas.errors import ConfigurationError
from capability_schemas.topics import Topics

# The default of 100 halves the throughput.
_MAX_ACK_PENDING: Final = 1000
_ACK_WAIT_S: Final = 30
# A first start of a cluster elects four leaders, one after the other.
_CLUSTER_READY_S: Final = 60.0
_LOGIN_S: Final = 15.0
# Some of what it holds (2.9: consumers that nothing was sent to) may never count as up to date.
_CATCH_UP_S: Final = 15.0
_HEALTH_PAUSE_S: Final = 0.25
_PROBE: Final = "foam-probe"


class NatsBroker(ForeignEngine):
    """Runs ``nats-server`` 2.9 or later as a child process.

    Args:
        settings: How to run the broker; ``queue_limit`` and ``session_expiry_s`` have no
            counterpart, and its MQTT side takes packets of any size (2.9).
        credentials: Who may connect.
        topics: The grammar that access rules are made for.
        passwords: Plain passwords by identity; identities without one cannot connect.
        seat: Its place in a cluster; None: it stands alone.
    """

    name = "nats"
    traits = BrokerTraits(
        mqtt5=False,
        qos2=False,
        merges_overlap=False,
        redelivers_on_connect=False,
        survives_restart=True,
        keeps_retained=True,
        refuses_forbidden_filter=True,
        binds_client_id=False,
        guards_sessions=False,
        revokes_at_once=True,
        limits_packets=False,
        tls=True,
        websocket=True,
        certificates=False,
        cuts_certificates=False,
    )

    def __init__(
        self,
        *,
        settings: EngineSettings,
        credentials: CredentialStore,
        topics: Topics,
        passwords: Mapping[str, str],
        seat: ClusterSeat | None = None,
    ) -> None:
        super().__init__(settings=settings, credentials=credentials, topics=topics)
        self._passwords = passwords
        self._seat = None if seat is None else SeatedServer(seat)
        self._patient_until = 0.0
        self._probe_password = secrets.token_urlsafe(24)
        if seat is not None:
            self.ready_timeout_s = _CLUSTER_READY_S

    @staticmethod
    def available() -> bool:
        """Whether the binary is on this machine."""
        return find_binary("nats-server") is not None

    @property
    def url(self) -> str:
        """``mqtt://host:port`` of the running broker; with TLS ``mqtts``, on its only port.

        Raises:
            BrokerUnavailable: It is not running.
        """
        plain, tls = super().url, self.settings.tls
        if tls is None:
            return plain
        host = _own_address(tls.host)
        return f"mqtts://{f'[{host}]' if ':' in host else host}:{self._tls_port}"

    def _wanted_ports(self) -> Iterator[tuple[str, int]]:
        wanted = super()._wanted_ports()
        if self.settings.tls is not None:
            next(wanted)  # there is no listener without TLS then
        yield from wanted

    async def _answers(self, port: int) -> bool:
        tls = self.settings.tls
        host = self.settings.host if tls is None else _own_address(tls.host)
        where = (host, port if tls is None else self._tls_port)
        if self._seat is None:
            return await speaks_mqtt(*where, tls=tls is not None)
        if time.monotonic() < self._patient_until and not await self._seat.is_healthy():
            await asyncio.sleep(_HEALTH_PAUSE_S)  # it writes a line of its log for each time
            return False  # it has no leader yet, or what it holds is behind the others
        login = (_PROBE, self._probe_password)
        return await speaks_mqtt(*where, tls=tls is not None, login=login, timeout_s=_LOGIN_S)

    def _write_access(self) -> None:
        users = nats_users(
            self.credentials.identities(), AccessPolicy(self.topics), self._passwords
        )
        if self._seat is not None:
            nothing = {"deny": [">"]}
            probe = {
                "user": _PROBE,
                "password": self._probe_password,
                "allowed_connection_types": ["MQTT"],
                "permissions": {"publish": nothing, "subscribe": nothing},
            }
            users = json.dumps([*json.loads(users), probe], indent=1)
        write_private(self.settings.data_dir / "nats-users.conf", f"users: {users}\n")

    def _command(self, port: int) -> list[str]:
        self._patient_until = time.monotonic() + _CATCH_UP_S
        binary = find_binary("nats-server")
        if binary is None:
            raise ConfigurationError(
                "there is no nats-server binary on this machine: install the nats-server package, "
                "or use the embedded broker"
            )
        path = self.settings.data_dir / "nats.conf"
        write_private(path, self._configuration(port))
        return guarded(binary, "-c", str(path))

    def _configuration(self, port: int) -> str:
        settings, tls, seat = self.settings, self.settings.tls, self._seat

        def quoted(host: str, number: int) -> str:
            return json.dumps(f"{host}:{number}")

        return "\n".join(
            (
                f"server_name: {f'foam-{port}' if seat is None else seat.name}",
                f"listen: {quoted(settings.host, free_port(settings.host))}",
                f"jetstream {{ store_dir: {json.dumps(str(settings.data_dir / 'jetstream'))} }}",
                "mqtt {",
                f"  listen: {quoted(settings.host, port)}"
                if tls is None
                else f"  listen: {quoted(tls.host, self._tls_port)}",
                f"  max_ack_pending: {_MAX_ACK_PENDING}",
                f'  ack_wait: "{_ACK_WAIT_S}s"',
                *([] if seat is None else seat.mqtt_lines()),
                *_papers(tls),
                "}",
                *([] if seat is None else seat.lines()),
                *self._websocket_lines(),
                "authorization { include ./nats-users.conf }",
                "",
            )
        )

    def _websocket_lines(self) -> list[str]:
        """Return the listener for WebSocket: MQTT is at its path ``/mqtt``."""
        ws, tls = self.settings.websocket, self.settings.tls
        if ws is None:
            return []
        papers = _papers(tls) if ws.secure else ["  no_tls: true"]
        listen = json.dumps(f"{ws.host}:{self._websocket_port}")
        return ["websocket {", f"  listen: {listen}", *papers, "}"]


def _papers(tls: TlsListener | None) -> list[str]:
    if tls is None:
        return []
    return [
        "  tls {",
        f"    cert_file: {json.dumps(str(tls.cert_file))}",
        f"    key_file: {json.dumps(str(tls.key_file))}",
        "  }",
    ]


def _own_address(host: str) -> str:
    """Return where this machine reaches a listener of its own."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - every interface
