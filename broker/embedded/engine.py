"""Runs the embedded broker as a child process; imports nothing of amqtt itself."""

import json
import sys
from pathlib import Path

import broker
from broker.embedded.order import ServerOrder
from broker.engine import BrokerTraits, ChildEngine
from capability_schemas.errors import BrokerUnavailable, ConfigurationError


class EmbeddedBroker(ChildEngine):
    """Runs ``python -m broker.embedded``."""

    name = "embedded"
    traits = BrokerTraits(
        mqtt5=False,
        qos2=True,
        merges_overlap=True,
        redelivers_on_connect=True,
        survives_restart=False,
        keeps_retained=True,
        refuses_forbidden_filter=True,
        binds_client_id=True,
        guards_sessions=True,
        revokes_at_once=True,
        limits_packets=True,
        tls=True,
        websocket=True,
        certificates=True,
        cuts_certificates=True,
    )

    @staticmethod
    def available() -> bool:
        """Whether it can run here: always, its parts are dependencies of the broker extra."""
        return True

    async def _launch(self) -> int:
        """Start the child and take the port it found; no moment in which another may take it."""
        order = ServerOrder(
            settings=self.settings.model_copy(
                update={"data_dir": self.settings.data_dir.absolute()}  # it runs in another folder
            ),
            credentials=self.credentials.path.absolute(),
            site=self.topics.site,
            prefix=self.topics.prefix,
        )
        await self._child.start(
            [sys.executable, "-m", "broker.embedded"],
            piped=True,
            folder=Path(broker.__file__).parent.parent,  # -m finds us there, installed or not
        )
        stdin, stdout = self._child.process.stdin, self._child.process.stdout
        if stdin is None or stdout is None:
            raise BrokerUnavailable("the embedded broker has no pipe to us")
        stdin.write(order.model_dump_json().encode() + b"\n")
        await stdin.drain()
        line = await stdout.readline()
        answer = json.loads(line) if line else {"error": self._child.last_words()}
        if "port" not in answer:
            raise ConfigurationError(f"the embedded broker did not start: {answer['error']}")
        self._tls_port = int(answer["tls_port"])
        self._websocket_port = int(answer["websocket_port"])
        return int(answer["port"])

    def _write_access(self) -> None:
        """Nothing to write: the child reads the credentials file itself."""
