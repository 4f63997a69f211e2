"""Eclipse Mosquitto as the broker, when its binary is on the machine.

Own configuration, port and data folder; nothing of the system's installation is touched. Access is
a password file and an access file compiled from the one table, read again on SIGHUP.

With TLS it shows its certificate and checks passwords as without.

What it does not do: take identities from certificates, as we run it; bind a client id to an
identity (a device may take over the session of another client id; its rights stay its own). Its
dynamic security plugin can, at the price of rules that live in the broker.
"""

import os
from pathlib import Path
from typing import Final

from broker.access.compilers import mosquitto_acl, mosquitto_passwords
from broker.access.credentials import write_private
from broker.access.policy import AccessPolicy
from broker.engine import BrokerTraits, ForeignEngine, find_binary, guarded
from capability_schemas.errors import ConfigurationError

# Seconds between saves when something changed; each save writes the whole store.
_AUTOSAVE_S: Final = 2


class MosquittoBroker(ForeignEngine):
    """Runs ``mosquitto`` 2.x as a child process."""

    name = "mosquitto"
    traits = BrokerTraits(
        mqtt5=True,
        qos2=True,
        merges_overlap=True,
        redelivers_on_connect=True,
        survives_restart=True,
        refuses_forbidden_filter=False,
        binds_client_id=False,
        revokes_at_once=True,
        limits_packets=True,
        tls=True,
        certificates=False,
    )

    @staticmethod
    def available() -> bool:
        """Whether the binary is on this machine."""
        return find_binary("mosquitto") is not None

    @property
    def _access_files(self) -> tuple[Path, Path]:
        folder = self.settings.data_dir
        return folder / "mosquitto.passwords", folder / "mosquitto.acl"

    def _write_access(self) -> None:
        identities = self.credentials.identities()
        passwords, acl = self._access_files
        write_private(passwords, mosquitto_passwords(identities))
        write_private(acl, mosquitto_acl(identities, AccessPolicy(self.topics)))

    def _command(self, port: int) -> list[str]:
        binary = find_binary("mosquitto")
        if binary is None:
            raise ConfigurationError(
                "there is no mosquitto binary on this machine: install the mosquitto package, "
                "or use the embedded broker"
            )
        path = self.settings.data_dir / "mosquitto.conf"
        write_private(path, self._configuration(port))
        return guarded(binary, "-c", str(path))

    def _configuration(self, port: int) -> str:
        settings = self.settings
        passwords, acl = self._access_files
        lines = [
            "per_listener_settings false",
            f"listener {port} {settings.host}",
            *self._tls_lines(),
            "allow_anonymous false",
            f"password_file {passwords}",
            f"acl_file {acl}",
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

    def _tls_lines(self) -> list[str]:
        tls = self.settings.tls
        if tls is None:
            return []
        return [
            f"listener {self.tls_port} {tls.host}",
            f"cafile {tls.ca_file}",
            f"certfile {tls.cert_file}",
            f"keyfile {tls.key_file}",
            "tls_version tlsv1.2",  # at least
        ]
