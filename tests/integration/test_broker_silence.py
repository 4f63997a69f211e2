"""What a session says of a broker that takes its connection, and lets nobody in."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from broker.session.mqtt import MqttSession
from broker.session.settings import SessionSettings
from capability_schemas.errors import BrokerUnavailable

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

CONNECTED = b"\x20\x02\x00\x00"  # CONNACK of MQTT 3.1.1, section 3.2


async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(1024)
    writer.close()


async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while await reader.read(1024):
            pass
    writer.close()


class LetsInOnce:
    """Serves the first connection, until it is told to end it, and hangs up on others."""

    def __init__(self) -> None:
        self.served = 0
        self.over = asyncio.Event()

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1024)
        if self.served == 0:
            self.served = 1
            writer.write(CONNECTED)
            await self.over.wait()
        writer.close()


@contextlib.asynccontextmanager
async def listening(serve: Serve) -> AsyncIterator[str]:
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        port = server.sockets[0].getsockname()[1]
        yield f"mqtt://127.0.0.1:{port}"
    finally:
        server.close()


def session(*urls: str) -> MqttSession:
    return MqttSession(
        settings=SessionSettings(
            urls=urls,
            client_id="who",
            version="3.1.1",
            connect_timeout_s=1.0,
            reconnect_floor_s=0.0,
        )
    )


async def why_not(*urls: str) -> str:
    async with session(*urls) as asking:
        for _ in range(20):
            with pytest.raises(BrokerUnavailable) as failure:
                await asking.wait_connected(1.5)
            if reason := failure.value.detail["reason"]:
                return str(reason)
    raise AssertionError("no try came to an end")


async def test_one_that_hangs_up_may_want_something_else_on_that_port() -> None:
    async with listening(hang_up) as url:
        assert await why_not(url) == (
            f"{url} closed the connection before it let us in: perhaps the port wants mqtts:// or "
            "ws://, or it starts or stops, or it is of a cluster without a majority"
        )


async def test_one_of_a_cluster_that_hangs_up_has_no_majority() -> None:
    async with listening(hang_up) as url, listening(hang_up) as other:
        said = await why_not(url, other)
    assert said.startswith(
        f"{url} closed the connection before it let us in: perhaps it is of a cluster without a "
        "majority, or the port wants mqtts:// or ws://, or it starts or stops"
    )


async def test_one_that_served_before_is_no_matter_of_the_port(eventually) -> None:
    serve = LetsInOnce()
    async with listening(serve) as url, session(url) as asking:
        await asking.wait_connected(20)
        serve.over.set()
        await eventually(lambda: "perhaps" in asking.brokers[0].reason, timeout_s=30)
        assert asking.brokers[0].reason == (
            f"{url} closed the connection before it let us in: perhaps it starts or stops, or it "
            "is of a cluster without a majority"
        )


async def test_one_that_hangs_is_said_to_hang() -> None:
    async with listening(hang) as url:
        assert await why_not(url) == (
            f"{url} took the connection and gave no answer in 1 s: perhaps it hangs, or has too "
            "much to do, or something else than a broker listens there"
        )


async def test_a_cluster_that_hangs_may_have_no_majority() -> None:
    async with listening(hang) as url, listening(hang) as other:
        assert "perhaps its cluster has no majority, or it hangs" in await why_not(url, other)
