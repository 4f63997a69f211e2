"""A node whose link stalls in the middle of a stream: the function pauses, and goes on."""

import contextlib
import json
import time
from pathlib import Path

import pytest

from broker.session.base import Message
from broker.session.mqtt import MqttSession
from capability_schemas.functions import FunctionLimits, FunctionSpec
from capability_schemas.ids import now_ms
from capability_schemas.invocation import Invocation
from capability_schemas.topics import TopicKind
from capability_schemas.wire import encode
from node_agent.agent import NodeAgent
from node_agent.settings import NodeSettings
from support.broker_site import is_available, run_site
from tcp_proxy import TcpProxy

pytestmark = pytest.mark.broker

PIECES = 3_000
CREDIT = 16
SOURCE = f"""
import pathlib

def count(path: str):
    made = pathlib.Path(path)
    for number in range({PIECES}):
        made.write_text(str(number))
        yield {{"n": number, "filling": "x" * 1_000}}
"""


@pytest.fixture(params=["embedded", pytest.param("mosquitto", marks=pytest.mark.external_broker)])
def kind(request: pytest.FixtureRequest) -> str:
    if not is_available(request.param):
        pytest.skip(f"there is no {request.param} binary on this machine")
    return str(request.param)


@pytest.mark.timeout(180)
async def test_a_stalled_link_pauses_the_function_and_leaves_no_gap(
    kind: str, tmp_path: Path, eventually
) -> None:
    source, made = tmp_path / "functions.py", tmp_path / "made"
    source.write_text(SOURCE)
    events: list[dict[str, object]] = []

    async def on_reply(message: Message) -> None:
        events.append(json.loads(message.payload))

    async with contextlib.AsyncExitStack() as stack:
        site = await stack.enter_async_context(run_site(kind, tmp_path))
        proxy = await stack.enter_async_context(TcpProxy(host="127.0.0.1", port=site.port))
        router = await stack.enter_async_context(MqttSession(settings=site.settings("router-1")))
        device = await stack.enter_async_context(MqttSession(settings=site.settings("pump-1")))
        own = await stack.enter_async_context(
            MqttSession(settings=site.settings("edge-1", url=proxy.url, ack_timeout_s=120.0))
        )
        for session in (router, device, own):
            await session.wait_connected(30)
        await device.subscribe(
            site.topics.filter(TopicKind.REPLY, client="pump-1"), on_reply, queue_limit=10_000
        )
        agent = NodeAgent(
            session=own,
            topics=site.topics,
            settings=NodeSettings(node="edge-1", unconfirmed_limit=CREDIT, cut_off_s=120.0),
            functions=[
                FunctionSpec(
                    description="d",
                    entry=f"{source}:count",
                    name="count",
                    limits=FunctionLimits(output_bytes=4_000_000),
                )
            ],
        )
        await stack.enter_async_context(agent)
        invocation = Invocation(
            task="t",
            client="pump-1",
            router="router-1",
            function="count",
            version="1.0.0",
            input=str(made),
            deadline=now_ms() + 150_000,
            reply=f"{site.topics.root}/reply/pump-1/t",
            sent_at=now_ms(),
        )
        await router.publish(site.topics.build(TopicKind.INVOKE, node="edge-1"), encode(invocation))
        await eventually(lambda: len(events) > 20, timeout_s=60)
        proxy.stall()
        before, since = -1, time.monotonic()

        def at_rest() -> bool:  # nothing was made for two seconds
            nonlocal before, since
            now = int(made.read_text() or 0)
            if now != before:
                before, since = now, time.monotonic()
            return time.monotonic() - since > 2

        await eventually(at_rest, timeout_s=60)
        paused_at = int(made.read_text())
        assert paused_at < PIECES - 500, "the function was paused"
        assert own.outbox_size <= CREDIT + 8, "reports and heartbeats come on top"
        proxy.flow()
        await eventually(lambda: events[-1]["event"] == "result", timeout_s=120)
    chunks = [event for event in events if event["event"] == "chunk"]
    seqs = list(dict.fromkeys(event["seq"] for event in chunks))
    assert seqs == list(range(PIECES))
    numbers = {event["seq"]: event["data"]["n"] for event in chunks}  # type: ignore[index]
    assert [numbers[seq] for seq in seqs] == seqs
    assert events[-1]["seq"] == PIECES
