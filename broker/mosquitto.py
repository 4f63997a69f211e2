"""Eclipse Mosquitto as the broker, when its binary is on the machine.

Own configuration, port and data folder; nothing of the system's installation is touched. Passwords
are verifiers in a password file, read again on SIGHUP. Rights come from the one table in one of two
ways (`EngineSettings.access`):

- ``dynamic``: the dynamic security plugin. Its file is compiled at the start; from then on the
  broker is asked what it holds, and told what differs. Forbidden filters are refused, nodes,
  routers and registries are bound to their client id, whoever is removed is cut off. The default
  where the plugin is installed, up to 1,000 identities.
- ``static``: an access file, read again on SIGHUP. Needs no plugin.

Mosquitto 2.0 takes either passwords or certificates on a port, so TLS has two listeners: the first
for passwords (devices, newcomers with a join token), the second for members with a certificate,
whose common name is the identity. Which certificates count it learns from a revocation list, for it
cannot ask the store for a serial number: without the list there is no second listener.

What it does not do: keep sessions of different identities apart (a device may take over the session
of another client id; its rights stay its own); bind a client id on the listener for certificates.
"""

import os
import secrets
from dataclasses import replace
from pathlib import Path
from typing import Final

import structlog

from broker.access.compilers import mosquitto_acl, mosquitto_passwords
from broker.access.credentials import CredentialStore, Pbkdf2, write_private
from broker.access.dynamic_security import DynamicAccess
from broker.access.policy import AccessPolicy
from broker.control import DynamicSecurity
from broker.engine import (
    BrokerTraits,
    EngineSettings,
    ForeignEngine,
    find_binary,
    guarded,
)
from broker.tls import TlsListener
from capability_schemas.errors import ConfigurationError
from capability_schemas.topics import Topics

# Seconds between saves when something changed; each save writes the whole store.
_AUTOSAVE_S: Final = 2
_PLUGIN: Final = "mosquitto_dynamic_security.so"
# Beyond, the plugin stalls the broker noticeably at each change: it writes its whole file.
_DYNAMIC_MOST: Final = 1000
# Where distributions and the project's own installer put it.
_PLUGIN_FOLDERS: Final = ("/usr/lib", "/usr/lib64", "/usr/local/lib", "/opt/homebrew/lib")
_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


def find_plugin() -> Path | None:
    """Look for the dynamic security plugin where distributions put it."""
    for folder in map(Path, _PLUGIN_FOLDERS):
        for found in (*folder.glob(_PLUGIN), *folder.glob(f"*/{_PLUGIN}")):
            return found
    return None


class MosquittoBroker(ForeignEngine):
    """Runs ``mosquitto`` 2.x as a child process.

    Args:
        settings: How to run the broker.
        credentials: Who may connect.
        topics: The grammar that access rules are made for.

    Raises:
        ConfigurationError: Dynamic access is wanted, and the plugin is not on this machine.
    """

    name = "mosquitto"
    certificates_apart = True
    traits = BrokerTraits(
        mqtt5=True,
        qos2=True,
        merges_overlap=True,
        redelivers_on_connect=True,
        survives_restart=True,
        keeps_retained=True,
        refuses_forbidden_filter=False,
        binds_client_id=False,
        guards_sessions=False,
        revokes_at_once=True,
        limits_packets=True,
        tls=True,
        websocket=True,
        certificates=True,
        cuts_certificates=False,
    )

    def __init__(
        self, *, settings: EngineSettings, credentials: CredentialStore, topics: Topics
    ) -> None:
        super().__init__(settings=settings, credentials=credentials, topics=topics)
        many = len(credentials.identities()) > _DYNAMIC_MOST
        wanted = settings.access or ("static" if many else None)
        self._plugin = None if wanted == "static" else find_plugin()
        self._control = secrets.token_urlsafe(24)
        if self._plugin is not None:
            self.traits = replace(
                self.traits,
                refuses_forbidden_filter=True,
                binds_client_id=True,
                cuts_certificates=True,
            )
        elif settings.access == "dynamic":
            raise ConfigurationError(
                f"{_PLUGIN} is not on this machine (it comes with Mosquitto 2.0 or later): "
                "install it, or use static access"
            )
        if settings.tls is not None and settings.tls.crl_file is None:
            self.traits = replace(self.traits, certificates=False, cuts_certificates=False)

    @staticmethod
    def available() -> bool:
        """Whether the binary is on this machine."""
        return find_binary("mosquitto") is not None

    @property
    def access(self) -> str:
        """How it learns of rights: ``dynamic`` or ``static``."""
        return "static" if self._plugin is None else "dynamic"

    async def reload_access(self) -> None:
        """Make changed credentials, and certificate files, count, for connected clients too.

        Raises:
            BrokerUnavailable: The broker is not running, or does not take commands.
            ConfigurationError: The credentials cannot be read.
        """
        # First what lets in, so that nobody who is cut off by a command comes back.
        await super().reload_access()
        if self._plugin is not None:
            await self._align(self.settings.host, self._port)

    async def _launch(self) -> int:
        port = await super()._launch()
        if self._plugin is not None:
            drift = await self._align(self.settings.host, port)
            if drift:
                _log.warning("broker.access_drift", broker=self.name, mended=drift)
        return port

    async def _align(self, host: str, port: int) -> int:
        """Make the broker hold what the table says, and nothing else; return what differed."""
        wanted = DynamicAccess.of(self.credentials.identities(), AccessPolicy(self.topics))
        async with DynamicSecurity(host=host, port=port, password=self._control) as broker:
            commands = wanted.changes(await broker.clients(), await broker.roles())
            await broker.run(commands)
        return len(commands)

    def _file(self, name: str) -> Path:
        return self.settings.data_dir / f"mosquitto.{name}"

    def _write_access(self) -> None:
        identities = self.credentials.identities()
        write_private(self._file("passwords"), mosquitto_passwords(identities))
        if self._plugin is None:
            write_private(self._file("acl"), mosquitto_acl(identities, AccessPolicy(self.topics)))

    def _command(self, port: int) -> list[str]:
        binary = find_binary("mosquitto")
        if binary is None:
            raise ConfigurationError(
                "there is no mosquitto binary on this machine: install the mosquitto package, "
                "or use the embedded broker"
            )
        if self._plugin is not None:  # the broker's own file from here on: written once a start
            access = DynamicAccess.of(self.credentials.identities(), AccessPolicy(self.topics))
            write_private(self._file("dynamic.json"), access.document(Pbkdf2.of(self._control)))
        write_private(self._file("conf"), self._configuration(port))
        return guarded(binary, "-c", str(self._file("conf")))

    def _configuration(self, port: int) -> str:
        settings = self.settings
        lines = [
            "per_listener_settings false",
            *self._listener_lines(port),
            "allow_anonymous false",
            f"password_file {self._file('passwords')}",
            *self._access_lines(),
            # Off by default; a QoS 1 round trip then takes 44 ms instead of 0.5 ms.
            "set_tcp_nodelay true",
            f"max_inflight_messages {settings.inflight_limit}",
            f"max_queued_messages {settings.queue_limit}",
            f"max_packet_size {settings.packet_limit_bytes}",
            f"persistent_client_expiration {max(1, settings.session_expiry_s // 3600)}h",
            "persistence true",
            f"persistence_location {settings.data_dir}/",
            "persistence_file mosquitto.db",
            f"autosave_interval {_AUTOSAVE_S}",
            "log_dest stderr",
            "log_type error",
            "log_type warning",
            "log_type notice",
            "connection_messages false",
        ]
        if os.geteuid() == 0:
            # It would otherwise become the user "mosquitto", who cannot enter our private folder.
            # Started by root it keeps the rights its parent has anyway; run FOAM as a user.
            lines.append("user root")
        return "\n".join(lines) + "\n"

    def _access_lines(self) -> list[str]:
        if self._plugin is None:
            return [f"acl_file {self._file('acl')}"]
        return [
            f"plugin {self._plugin}",
            f"plugin_opt_config_file {self._file('dynamic.json')}",
        ]

    def _listener_lines(self, port: int) -> list[str]:
        lines = [f"listener {port} {self.settings.host}", *self._websocket_lines()]
        tls = self.settings.tls
        if tls is None:
            return lines
        lines += [f"listener {self._tls_port} {tls.host}", *_papers(tls)]
        if self._members_port:
            lines += [
                f"listener {self._members_port} {tls.host}",
                *_papers(tls),
                "require_certificate true",
                "use_identity_as_username true",
                f"crlfile {tls.crl_file}",
            ]
        return lines

    def _websocket_lines(self) -> list[str]:
        ws, tls = self.settings.websocket, self.settings.tls
        if ws is None:
            return []
        lines = [f"listener {self._websocket_port} {ws.host}", "protocol websockets"]
        return [*lines, *_papers(tls)] if ws.secure and tls is not None else lines


def _papers(tls: TlsListener) -> list[str]:
    return [
        f"cafile {tls.ca_file}",
        f"certfile {tls.cert_file}",
        f"keyfile {tls.key_file}",
        "tls_version tlsv1.2",  # at least
    ]
