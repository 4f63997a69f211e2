"""Several nats-servers as one broker: who they are, and how each finds the others.

Every server keeps everything (JetStream with a replica on each of three): one may be lost at any
moment, and clients go on with the next one of their list. Two of three have to be there for
anything to be confirmed; with fewer, the rest refuses and waits, and goes on when they return.
"""

import asyncio
import json
import secrets
from pathlib import Path
from typing import Annotated, Final, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, model_validator

from broker.access.credentials import write_private
from broker.ports import free_port
from capability_schemas.errors import ConfigurationError
from capability_schemas.wire import first_problem

SIZES: Final = (3, 5)
REPLICAS: Final = 3
"""Most that the MQTT side of nats-server 2.9 uses, whatever the number of servers."""

_USER: Final = "foam"
_LOOPBACK: Final = "127.0.0.1"
_HEALTH_TIMEOUT_S: Final = 3.0
_HEALTH_LIMIT_BYTES: Final = 4096
_SECRET_BYTES: Final = 24


class ClusterServer(BaseModel):
    """One server as the others know it.

    Attributes:
        name: Its name. JetStream knows by it what it holds: it is kept for ever.
        host: Where it listens for the others.
        port: TCP port for that.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    host: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:-]+$")]
    port: Annotated[int, Field(ge=1, le=65535)]

    @property
    def address(self) -> str:
        """``host:port``."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class ClusterPlan(BaseModel):
    """All servers of a cluster; every one of them runs by the same plan.

    Attributes:
        servers: The servers: 3 or 5, so that a majority is more than half in one way only.
        secret: What they know each other by.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    servers: tuple[ClusterServer, ...]
    secret: SecretStr

    @model_validator(mode="after")
    def _is_a_cluster(self) -> Self:
        if len(self.servers) not in SIZES:
            raise ValueError(f"a cluster has {' or '.join(map(str, SIZES))} servers")
        for what in ("name", "address"):
            if len({getattr(server, what) for server in self.servers}) < len(self.servers):
                raise ValueError(f"two servers have the same {what}")
        return self

    @classmethod
    def of(cls, servers: "tuple[ClusterServer, ...]") -> Self:
        """Make a plan with a new secret.

        Raises:
            ConfigurationError: These are no cluster.
        """
        secret = SecretStr(secrets.token_urlsafe(_SECRET_BYTES))
        try:
            return cls(servers=servers, secret=secret)
        except ValidationError as error:
            raise ConfigurationError(f"cluster: {first_problem(error)[1]}") from error

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a plan that was written before.

        Raises:
            ConfigurationError: It is missing or damaged.
        """
        try:
            return cls.model_validate(json.loads(path.read_bytes()))
        except (OSError, ValueError) as error:
            raise ConfigurationError(
                f"{path} is no plan of a cluster ({error}): `foam up --brokers 3` writes one",
                path=str(path),
            ) from error

    def write(self, path: Path) -> None:
        """Write it, readable by its owner only.

        Raises:
            ConfigurationError: It cannot be written.
        """
        content = {
            "servers": [server.model_dump() for server in self.servers],
            "secret": self.secret.get_secret_value(),
        }
        try:
            write_private(path, json.dumps(content, indent=1) + "\n")
        except OSError as error:
            raise ConfigurationError(f"{path} cannot be written: {error.strerror}") from error

    def seat(self, number: int) -> "ClusterSeat":
        """Return the place of one server.

        Args:
            number: Which, from 1.

        Raises:
            ConfigurationError: There are not so many.
        """
        if not 1 <= number <= len(self.servers):
            raise ConfigurationError(
                f"there is no server {number}: the cluster has {len(self.servers)}"
            )
        return ClusterSeat(plan=self, server=self.servers[number - 1])


class ClusterSeat(BaseModel):
    """One server's place in its cluster.

    Attributes:
        plan: The cluster.
        server: Which of its servers.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    plan: ClusterPlan
    server: ClusterServer


class SeatedServer:
    """A server that runs on its seat: its part of the configuration, and how it stands.

    It is asked over the HTTP port that nats-server has for this, on loopback and below a path that
    nobody else knows: what it tells there of clients is for nobody else.

    Args:
        seat: Its place.
    """

    def __init__(self, seat: ClusterSeat) -> None:
        self._seat = seat
        self._path = f"/{secrets.token_urlsafe(_SECRET_BYTES)}"
        self._port = 0

    @property
    def name(self) -> str:
        """Name of the server."""
        return self._seat.server.name

    async def is_healthy(self) -> bool:
        """Tell whether it follows a leader and is up to date; False when it does not answer.

        Cancellation is safe.
        """
        ask = f"GET {self._path}/healthz HTTP/1.0\r\n\r\n".encode()
        try:
            async with asyncio.timeout(_HEALTH_TIMEOUT_S):
                reader, writer = await asyncio.open_connection(_LOOPBACK, self._port)
                try:
                    writer.write(ask)
                    answer = await reader.read(_HEALTH_LIMIT_BYTES)
                finally:
                    writer.close()
        except (OSError, TimeoutError):
            return False
        return answer.partition(b"\r\n")[0].split(b" ")[1:2] == [b"200"]

    def lines(self) -> list[str]:
        """Return the part ``cluster`` of its configuration, for one start; it holds the secret.

        A server learns of the others from the plan alone, and tells no client of them: what
        clients know is their own list.
        """
        secret = self._seat.plan.secret.get_secret_value()
        routes = [
            json.dumps(f"nats-route://{_USER}:{secret}@{one.address}")
            for one in self._seat.plan.servers
            if one != self._seat.server
        ]
        self._port = free_port(_LOOPBACK)
        return [
            f'http: "{_LOOPBACK}:{self._port}"',
            f"http_base_path: {json.dumps(self._path)}",
            "cluster {",
            '  name: "foam"',
            f"  listen: {json.dumps(self._seat.server.address)}",
            f"  authorization {{ user: {_USER}, password: {json.dumps(secret)}, timeout: 5 }}",
            f"  routes: [{', '.join(routes)}]",
            "  no_advertise: true",
            "}",
        ]

    @staticmethod
    def mqtt_lines() -> list[str]:
        """Return what the part ``mqtt`` says of it: everything stands on three servers."""
        return [f"  stream_replicas: {REPLICAS}", f"  consumer_replicas: {REPLICAS}"]
