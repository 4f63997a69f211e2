"""Nodes killed in mid-answer: what the client sees."""

import asyncio
import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import psutil
import pytest

from broker.session.base import Message
from broker.session.mqtt import MqttSession
from broker.session.settings import SessionSettings
from capability_schemas.reply import Chunk, ErrorEvent, ReplyEvent, Result, Routed
from capability_schemas.topics import TopicKind, Topics
from foam.chaos.judge import Ask, Judge
from foam.sdk import MeshClient
from support.foam_process import FoamProcess, FoamUp, foam_up
from tcp_proxy import TcpProxy

pytestmark = [pytest.mark.e2e, pytest.mark.broker, pytest.mark.timeout(180)]

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "foam" / "models" / "foam-tiny-2.6m-q8_0.gguf"
STEADY = ROOT / "tests" / "data" / "functions" / "steady.py"
ITEMS = 150
NODE = f"""
[node]
id = "NAME"

[[function]]
source = "{STEADY}"

[[function]]
name = "list"
description = "List the state of every pump in the hall, one after the other."
runtime = "llama_cpp"
model = "{MODEL}"
warm = true
options = {{ json_output = true, max_tokens = 480 }}

[function.output_schema]
type = "array"
minItems = {ITEMS}
maxItems = {ITEMS}
items = {{ enum = [0, 1] }}
"""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FoamUp]:
    """A mesh with two nodes that offer the same."""
    folder = tmp_path_factory.mktemp("pair")
    nodes = []
    for name in ("left", "right"):
        nodes.append(folder / f"{name}.toml")
        nodes[-1].write_text(NODE.replace("NAME", name))
    options = [option for path in nodes for option in ("--node", str(path))]
    with foam_up(folder / "data", "--broker", "embedded", *options) as up:
        yield up


def client_of(up: FoamUp) -> MeshClient:
    device = up.facts["device"]
    return MeshClient(
        up.facts["broker"],
        client=device["id"],
        username=device["username"],
        password=device["password"],
        site=up.facts["site"],
    )


def process_of(up: FoamUp, node: str) -> psutil.Process:
    """Return the process of a node."""
    for process in psutil.Process(up.process.pid).children(recursive=True):
        line = " ".join(process.cmdline())
        if f"{node}.toml" in line and " node " in line:
            return process
    raise AssertionError(f"no process of node {node}")


def kill(up: FoamUp, node: str) -> None:
    """Kill the process of a node, as the machine losing power does."""
    process_of(up, node).send_signal(signal.SIGKILL)


class Stop:
    """Stops a node and all it runs, once; lets it go on at the end of a ``with``."""

    def __init__(self) -> None:
        self.node = ""
        self._stopped: list[psutil.Process] = []

    def __call__(self, up: FoamUp, node: str) -> None:
        process = process_of(up, node)
        self.node, self._stopped = node, [process, *process.children(recursive=True)]
        for one in self._stopped:
            one.suspend()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for one in self._stopped:
            one.resume()


async def watched(
    up: FoamUp, mesh: MeshClient, hurt: Callable[[FoamUp, str], None] = kill, **task: Any
) -> list[ReplyEvent]:
    """Ask, hurt the node that answers after its second chunk, and return all events."""
    events: list[ReplyEvent] = []
    handle = await mesh.submit(timeout_s=60, **task)
    chunks = 0
    async for event in handle:
        events.append(event)
        chunks += isinstance(event, Chunk)
        if isinstance(event, Chunk) and chunks == 2 and handle.routed is not None:
            hurt(up, handle.routed.node)
    return events


def text_of(events: list[ReplyEvent]) -> str:
    return "".join(event.data for event in events if isinstance(event, Chunk))


def assert_no_seam(events: list[ReplyEvent]) -> Result:
    numbered = [event.seq for event in events if isinstance(event, Chunk | Result | ErrorEvent)]
    assert numbered == list(range(len(numbered)))
    assert isinstance(events[-1], Result), events[-1]
    return events[-1]


async def test_the_answer_of_a_model_goes_on_to_the_letter(pair: FoamUp) -> None:
    async with client_of(pair) as mesh:
        whole = await mesh.ask("which pumps run?", function="list", timeout_s=60)
        for _ in range(5):  # the model is quick: the answer may be there before the kill
            events = await watched(pair, mesh, text="which pumps run?", function="list")
            result = assert_no_seam(events)
            assert result.output == whole.output
            assert json.loads(text_of(events)) == whole.output
            assert result.usage == whole.usage
            assert result.digest == whole.digest
            if result.attempt > 1:
                assert len([event for event in events if isinstance(event, Routed)]) >= 2
                return
        pytest.fail("the node was never killed in time")


async def test_a_function_that_says_the_same_again_goes_on(pair: FoamUp) -> None:
    async with client_of(pair) as mesh:
        asked = {"lines": 100, "pause_s": 0.03}
        events = await watched(pair, mesh, function="recite", input=asked)
        result = assert_no_seam(events)
        assert result.attempt > 1
        assert text_of(events) == "".join(f"line {number}\n" for number in range(100))
        assert result.output == text_of(events)


async def test_a_function_that_promises_nothing_ends_honestly(pair: FoamUp) -> None:
    async with client_of(pair) as mesh:
        asked = {"lines": 200, "pause_s": 0.03}
        events = await watched(pair, mesh, function="improvise", input=asked)
        end = events[-1]
        assert isinstance(end, ErrorEvent)
        assert end.code == "node_lost"
        shown = text_of(events)
        assert shown == "".join(f"line {number}\n" for number in range(shown.count("\n")))


async def test_a_node_that_hangs_is_left_and_shows_nothing_when_it_goes_on(pair: FoamUp) -> None:
    lines = 100
    whole = tuple(f"line {number}\n" for number in range(lines))
    judge, heard = Judge(), asyncio.Event()
    ask = Ask(
        client=pair.facts["device"]["id"],
        task="hangs",
        function="recite",
        pieces=whole,
        output="".join(whole),
    )
    judge.submitted(ask, at=0)
    sources: list[str] = []

    async def on_reply(message: Message) -> None:
        client, _, source = message.topic.split("/")[-3:]
        sources.append(source)
        judge.heard(client, source, message.payload, at=0)
        heard.set()

    async with client_of(pair) as mesh, witness(pair) as session:
        topics = Topics(site=pair.facts["site"])
        await session.wait_connected(60)  # before that nobody has heard of its subscription
        await session.subscribe(topics.filter(TopicKind.REPLY, client=ask.client), on_reply)
        with Stop() as stop:
            asked = {"lines": lines, "pause_s": 0.03}
            events = await watched(
                pair, mesh, stop, function="recite", input=asked, task_id=ask.task
            )
        result = assert_no_seam(events)
        assert result.attempt > 1
        assert text_of(events) == result.output == ask.output
        assert {event.node for event in events if isinstance(event, Routed)} == {"left", "right"}
        # It is back when it answers something: what it said late has come before that. Of two it
        # may be the second choice, so they are given more than one can do.
        async with asyncio.timeout(90):
            while stop.node not in await who_answers(mesh, tasks=8):
                pass
            while stop.node not in sources[sources.index(other_than(stop.node)) :]:
                await heard.wait()
                heard.clear()
        assert judge.verdict(at=0).breaches == ()
        assert judge.verdict(at=0).finished == 1


async def who_answers(mesh: MeshClient, *, tasks: int) -> set[str | None]:
    """Ask for several short answers at once; returns the nodes they came from."""
    asked = {"lines": 2, "pause_s": 0.2}
    async with asyncio.TaskGroup() as group:
        asks = [
            group.create_task(mesh.ask(function="recite", input=asked, timeout_s=60))
            for _ in range(tasks)
        ]
    return {ask.result().node for ask in asks}


def other_than(node: str) -> str:
    return {"left": "right", "right": "left"}[node]


def witness(up: FoamUp) -> MqttSession:
    """Return a second connection of the device, which sees the bare wire."""
    device = up.facts["device"]
    return MqttSession(
        settings=SessionSettings(
            urls=(up.facts["broker"],),
            client_id="witness",
            username=device["username"],
            password=device["password"],
        )
    )


async def test_the_command_line_misses_nothing_of_a_link_that_is_cut(pair: FoamUp) -> None:
    device = pair.facts["device"]
    async with TcpProxy(host="127.0.0.1", port=pair.port) as proxy:
        ask = FoamProcess(
            "ask",
            "--quiet",
            "--url",
            proxy.url,
            "--function",
            "recite",
            "--input",
            '{"lines": 150, "pause_s": 0.03}',
            FOAM_USERNAME=device["username"],
            FOAM_PASSWORD=device["password"],
            FOAM_SITE=pair.facts["site"],
        )
        try:
            for line in ("line 10", "line 60"):
                await in_thread(ask.wait_line, line)
                proxy.cut()
            code = await in_thread(ask.process.wait, 60)
        finally:
            ask.process.kill()
            ask.end()
        assert (code, ask.out) == (0, [f"line {number}" for number in range(150)])
        assert proxy.connections >= 3


async def in_thread(call: Any, *arguments: Any) -> Any:
    return await asyncio.to_thread(call, *arguments)
