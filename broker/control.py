"""One conversation with Mosquitto's dynamic security plugin, over the broker's own control topic.

A connection of its own for each conversation, in plain MQTT 3.1.1: it needs no session that
survives anything, and those of ``broker.session`` never publish to topics that start with ``$``.
"""

import asyncio
import contextlib
import json
import secrets
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Final, Self

from broker.access.dynamic_security import (
    CONTROL_TOPIC,
    CONTROL_USER,
    DynamicClient,
    read_client,
)
from capability_schemas.errors import BrokerUnavailable

_TIMEOUT_S: Final = 20.0
_GOODBYE_S: Final = 2.0
# The broker does nothing else meanwhile, and writes its whole file for each command: 17 ms with
# 1,500 identities. Between two batches it serves others.
_BATCH: Final = 10
_PAGE: Final = 500
# MQTT 3.1.1 section 2.2.1, with the flags each packet must have.
_CONNECT: Final = 0x10
_CONNACK: Final = 0x20
_PUBLISH: Final = 0x30
_SUBSCRIBE: Final = 0x82
_SUBACK: Final = 0x90
_DISCONNECT: Final = b"\xe0\x00"


class DynamicSecurity:
    """A conversation; ``async with`` connects.

    Args:
        host: Where the broker listens.
        port: Its port.
        password: Password of the control client.
    """

    def __init__(self, *, host: str, port: int, password: str) -> None:
        self._host = host
        self._port = port
        self._password = password

    async def __aenter__(self) -> Self:
        """Connect and log on.

        Raises:
            BrokerUnavailable: The broker does not answer, or refuses the control client.
        """
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                self._reader, self._writer = await asyncio.open_connection(self._host, self._port)
                try:
                    await self._log_on()
                except BaseException:
                    await self._hang_up()
                    raise
        except (OSError, TimeoutError, asyncio.IncompleteReadError) as exc:
            raise BrokerUnavailable(f"mosquitto does not take commands: {exc!r}") from exc
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Say goodbye and hang up."""
        self._writer.write(_DISCONNECT)
        await self._hang_up()

    async def clients(self) -> dict[str, DynamicClient | None]:
        """Return the clients the broker holds, by name; None for one that is nothing of ours."""
        return {
            str(listed["username"]): read_client(listed)
            for listed in await self._listed("listClients", "clients", verbose=True)
        }

    async def roles(self) -> list[str]:
        """Return the names of the roles the broker holds."""
        return [str(name) for name in await self._listed("listRoles", "roles", verbose=False)]

    async def run(self, commands: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Give commands and return the answers, in the same order.

        Raises:
            BrokerUnavailable: The connection broke, no answer came within 20 seconds, or a command
                was refused.
        """
        answers: list[dict[str, Any]] = []
        for start in range(0, len(commands), _BATCH):
            batch = commands[start : start + _BATCH]
            try:
                async with asyncio.timeout(_TIMEOUT_S):
                    self._send(
                        _PUBLISH,
                        _text(CONTROL_TOPIC) + json.dumps({"commands": list(batch)}).encode(),
                    )
                    found = json.loads(await self._receive(_PUBLISH))["responses"]
            except (OSError, TimeoutError, asyncio.IncompleteReadError, ValueError) as exc:
                raise BrokerUnavailable(f"mosquitto does not take commands: {exc!r}") from exc
            for command, answer in zip(batch, found, strict=True):
                if "error" in answer:
                    raise BrokerUnavailable(
                        f"mosquitto refuses {command['command']} "
                        f"{command.get('username') or command.get('rolename') or ''}: "
                        f"{answer['error']}"
                    )
            answers += found
        return answers

    async def _listed(self, command: str, field: str, *, verbose: bool) -> list[Any]:
        found: list[Any] = []
        while True:
            (answer,) = await self.run(
                [{"command": command, "verbose": verbose, "count": _PAGE, "offset": len(found)}]
            )
            page = answer["data"][field]
            found += page
            if len(page) < _PAGE:
                return found

    async def _hang_up(self) -> None:
        self._writer.close()
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(_GOODBYE_S):
                await self._writer.wait_closed()

    async def _log_on(self) -> None:
        name = f"foam-control-{secrets.token_hex(6)}"
        flags = 0xC2  # user name, password, clean session
        head = _text("MQTT") + bytes((4, flags)) + (60).to_bytes(2, "big")
        self._send(_CONNECT, head + _text(name) + _text(CONTROL_USER) + _text(self._password))
        answer = await self._receive(_CONNACK)
        if answer[1]:
            raise BrokerUnavailable(f"mosquitto refuses the control client (code {answer[1]})")
        topic = f"{CONTROL_TOPIC}/response"
        self._send(_SUBSCRIBE, (1).to_bytes(2, "big") + _text(topic) + b"\0")
        await self._receive(_SUBACK)

    def _send(self, kind: int, body: bytes) -> None:
        length, head = len(body), bytearray((kind,))
        while True:  # MQTT 3.1.1 section 2.2.3
            length, digit = divmod(length, 128)
            head.append(digit | (0x80 if length else 0))
            if not length:
                break
        self._writer.write(bytes(head) + body)

    async def _receive(self, kind: int) -> bytes:
        """Return the body of the next packet of a kind; of a PUBLISH (QoS 0), its payload."""
        while True:
            first = (await self._reader.readexactly(1))[0]
            length = shift = 0
            while True:
                digit = (await self._reader.readexactly(1))[0]
                length |= (digit & 0x7F) << shift
                shift += 7
                if not digit & 0x80:
                    break
            body = await self._reader.readexactly(length)
            if first & 0xF0 != kind:
                continue
            return body[2 + int.from_bytes(body[:2], "big") :] if kind == _PUBLISH else body


def _text(value: str) -> bytes:
    data = value.encode()
    return len(data).to_bytes(2, "big") + data
