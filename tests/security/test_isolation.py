"""Functions that misbehave, for real, on a node that must not notice."""

import asyncio
import gc
import json
import os
import tempfile
from pathlib import Path

import pytest

from broker.session.memory import MemoryBroker, MemorySession
from capability_schemas.functions import FunctionLimits, FunctionSpec
from capability_schemas.ids import now_ms
from capability_schemas.invocation import Control, Invocation
from capability_schemas.signing import SigningKey
from capability_schemas.topics import TopicKind
from capability_schemas.wire import encode
from node_agent.agent import NodeAgent
from node_agent.declaration import load_declaration
from node_agent.isolation import strays
from node_agent.isolation.system import find_isolation
from node_agent.runtimes import process
from node_agent.settings import NodeSettings

HOSTILE = Path(__file__).parents[1] / "data" / "functions" / "hostile.py"
WORKSHOP = HOSTILE.with_name("workshop.py")
NODE = "edge-1"
ENDED = {"finished", "failed", "refused", "dropped"}
no_network_filter = find_isolation().no_network_filter
needs_filter = pytest.mark.skipif(bool(no_network_filter), reason=no_network_filter)


def hostile(name, **limits):
    where = f"{HOSTILE}:{name}"
    return FunctionSpec(name=name, description=name, entry=where, limits=FunctionLimits(**limits))


FUNCTIONS = (
    FunctionSpec(name="add", description="add", entry=f"{WORKSHOP}:add"),
    hostile("forks"),
    hostile("daemons"),
    hostile("leaks", memory_bytes=400_000_000),
    hostile("floods"),
    hostile("deaf"),
    hostile("dies"),
    hostile("opens", open_files=256),
    hostile("fills", file_bytes=100_000),
    hostile("burns", cpu_s=1),
    hostile("connects"),
    hostile("resolves"),
    hostile("fetches"),
    hostile("families"),
    hostile("rings"),
    hostile("enters_32_bit"),
    hostile("looks_around"),
    hostile("swarms", processes=32),
    hostile("chatters"),
    FunctionSpec(
        name="granted",
        description="connects",
        entry=f"{HOSTILE}:connects",
        limits=FunctionLimits(network=True),
    ),
)


class Client:
    """Asks a node and waits for how it ends."""

    def __init__(self, session, topics, agent):
        self._session = session
        self._topics = topics
        self._results = {}
        self._ended = {}
        self.reports = []
        self.agent = agent

    async def listen(self):
        await self._session.subscribe(self._topics.root + "/reply/#", self._on_event)
        reports = self._topics.filter(TopicKind.REPORT, router="router-1")
        await self._session.subscribe(reports, self._on_report)

    async def _on_event(self, message):
        event = json.loads(message.payload)
        self._results[event["task"]] = event

    async def _on_report(self, message):
        report = json.loads(message.payload)
        if report["status"] in ENDED:
            self.reports.append(report)
            self._ended[report["task"]].set()

    def start(self, function, value, *, left_ms=25_000):
        task = f"t{now_ms()}{len(self._ended)}"
        self._ended[task] = asyncio.Event()
        invocation = {
            "task": task,
            "client": "pump-7",
            "router": "router-1",
            "function": function,
            "version": "1.0.0",
            "input": value,
            "deadline": now_ms() + left_ms,
            "reply": f"{self._topics.root}/reply/pump-7/{task}",
            "sent_at": now_ms(),
        }
        payload = encode(Invocation.model_validate(invocation))
        self._session.post(self._topics.build(TopicKind.INVOKE, node=NODE), payload)
        return task

    async def end(self, task):
        async with asyncio.timeout(25):
            await self._ended[task].wait()
        return self._results.get(task, {"event": "none"})

    async def ask(self, function, value=None, **fields):
        return await self.end(self.start(function, value or {}, **fields))

    def cancel(self, task):
        control = Control.model_validate({"verb": "cancel", "task": task, "client": "pump-7"})
        self._session.post(self._topics.build(TopicKind.CONTROL, node=NODE), encode(control))


def lives(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def open_descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture
def marks(monkeypatch):
    """The marks of the instances that a test starts."""
    made = []

    def new_mark():
        made.append(strays.new_mark())
        return made[-1]

    monkeypatch.setattr(process, "new_mark", new_mark)
    return made


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
async def client(topics, marks, temporary):
    """A node and who asks it; afterwards the node still answers, and nothing at all is left."""
    descriptors = open_descriptors()
    tasks = len(asyncio.all_tasks())
    broker = MemoryBroker()
    async with (
        MemorySession(broker=broker, client_id=NODE) as node_session,
        MemorySession(broker=broker, client_id="router-1") as session,
        NodeAgent(
            session=node_session,
            topics=topics,
            settings=NodeSettings(
                node=NODE, cancel_grace_s=0.1, drain_timeout_s=5.0, backoff_s=60, backoff_limit_s=60
            ),
            functions=FUNCTIONS,
            key=SigningKey.generate(),
        ) as agent,
    ):
        made = Client(session, topics, agent)
        await made.listen()
        yield made
        if agent.running:
            assert (await made.ask("add", {"a": 1}))["output"] == 3
    gc.collect()
    assert [pid for mark in marks for pid in strays._marked(mark)] == []
    assert list(temporary.iterdir()) == []
    assert len(asyncio.all_tasks()) == tasks
    assert open_descriptors() == descriptors


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "pids"
    made.mkdir()
    return made


def pids(folder):
    return [int(path.name) for path in folder.iterdir()]


async def test_forked_children_live_and_end_with_their_instance(client, folder, eventually):
    assert (await client.ask("forks", {"folder": str(folder), "count": 5}))["output"] == 5
    await eventually(lambda: len(pids(folder)) == 5)
    assert all(map(lives, pids(folder)))
    await client.agent.stop()
    assert not any(map(lives, pids(folder)))


async def test_daemons_die_with_the_instance_that_left_them(client, folder):
    event = await client.ask("daemons", {"folder": str(folder), "count": 4, "end": True})
    assert event["event"] == "none"  # the instance was lost: the router gives it to another node
    assert len(pids(folder)) == 4
    assert not any(map(lives, pids(folder)))


async def test_daemons_of_a_living_instance_die_with_it(client, folder):
    event = await client.ask("daemons", {"folder": str(folder), "count": 4, "end": False})
    assert event["output"] == 4
    assert all(map(lives, pids(folder)))
    await client.agent.stop()
    assert not any(map(lives, pids(folder)))


async def test_a_leak_ends_at_the_memory_limit(client):
    event = await client.ask("leaks")
    assert event["code"] == "execution_failed"
    assert "limits.memory_bytes is 400000000" in event["message"]
    assert event["detail"]["limit"] == "memory_bytes"


@pytest.mark.parametrize("stream", [1, 2])
async def test_a_flood_of_output_drowns_nobody(client, tmp_path, eventually, stream):
    marker = tmp_path / "flooding"
    task = client.start("floods", {"stream": stream, "marker": str(marker)})
    await eventually(marker.exists)
    for _ in range(3):
        assert (await client.ask("add", {"a": 1}))["output"] == 3
    client.cancel(task)
    assert (await client.end(task))["code"] == "cancelled"


async def test_a_flood_of_pieces_ends_at_the_output_limit(client):
    assert (await client.ask("chatters"))["code"] == "too_large"


@pytest.mark.parametrize("function", ["deaf", "burns"])
async def test_what_heeds_nothing_is_killed_when_cancelled(client, tmp_path, eventually, function):
    marker = tmp_path / "running"
    task = client.start(function, {"marker": str(marker)})
    await eventually(marker.exists)
    client.cancel(task)
    assert (await client.end(task))["event"] == "error"
    await eventually(lambda: client.agent.load().functions[function].instances == 0)


async def test_processor_time_ends_at_its_limit_and_says_so(client, tmp_path):
    event = await client.ask("burns", {"marker": str(tmp_path / "running")})
    assert event["code"] == "execution_failed"
    assert "SIGXCPU: it used more processor time than limits.cpu_s = 1" in event["message"]


@pytest.mark.parametrize("how", ["exit", "segv", "kill"])
async def test_a_death_is_an_attempt_for_another_node(client, how):
    assert (await client.ask("dies", {"how": how}))["event"] == "none"
    assert client.agent.load().functions["dies"].instances == 0


async def test_too_many_files_are_the_functions_error(client):
    event = await client.ask("opens")
    assert event["code"] == "execution_failed"
    assert "limits.open_files is 256" in event["message"]


async def test_a_file_ends_at_its_limit(client, tmp_path):
    event = await client.ask("fills", {"path": str(tmp_path / "big")})
    assert "limits.file_bytes is 100000" in event["message"]
    assert (tmp_path / "big").stat().st_size == 100_000
    assert (tmp_path / "big").stat().st_mode & 0o077 == 0


@pytest.fixture
async def server():
    """A server on this machine that says hello."""

    async def hello(_, writer):
        writer.write(b"hello")
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(hello, "127.0.0.1", 0) as made:
        yield made.sockets[0].getsockname()[1]


@needs_filter
@pytest.mark.parametrize("function", ["connects", "fetches", "resolves"])
async def test_there_is_no_network_and_the_error_says_why(client, server, function):
    value = {} if function == "resolves" else {"port": server}
    event = await client.ask(function, value)
    assert event["code"] == "execution_failed"
    assert "it has no network: limits.network is false" in event["message"]


async def test_a_function_with_a_network_has_one(server, client):
    assert (await client.ask("granted", {"port": server}))["output"] == "hello"


@needs_filter
async def test_only_sockets_within_the_machine_can_be_opened(client):
    said = (await client.ask("families"))["output"]
    denied = ("inet", "inet6", "netlink", "packet", "vsock", "program")
    assert said == {**dict.fromkeys(denied, "13"), "unix": "open"}


@needs_filter
async def test_there_is_no_way_around_the_filter(client):
    ring, x32 = (await client.ask("rings"))["output"]
    assert (ring, x32) == (1, 38)  # EPERM, ENOSYS


@needs_filter
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="there is no int 0x80 here")
async def test_a_call_by_the_32_bit_door_is_the_end(client):
    event = await client.ask("enters_32_bit")
    assert event["code"] == "execution_failed"
    assert "SIGSYS" in event["message"]


async def test_a_function_sees_no_secrets_and_no_descriptors_of_ours(
    client, monkeypatch, temporary
):
    monkeypatch.setenv("FOAM_PASSWORD", "hush-hush-1")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush-2")
    seen = (await client.ask("looks_around"))["output"]
    assert "hush-hush" not in json.dumps(seen["environment"])
    assert {"PATH", "TMPDIR"} <= seen["environment"].keys()
    assert seen["environment"]["OMP_NUM_THREADS"] == os.environ.get("OMP_NUM_THREADS", "1")
    assert Path(seen["temporary"]).is_relative_to(temporary)
    assert seen["umask"] == 0o077
    assert seen["core"] == 0
    # the standard streams, the socket of the frames, and the folder being listed
    assert len(seen["descriptors"]) == 5
    assert seen["inherited"] == 4  # a program gets the standard streams and opens the folder


async def test_a_swarm_ends_at_the_limit_of_processes(client, folder):
    isolation = find_isolation()
    if "processes" in isolation.missing({"processes": 32}):
        pytest.skip(f"limits.processes: {isolation.missing({'processes': 32})['processes']}")
    event = await client.ask("swarms", {"folder": str(folder)})
    assert "limits.processes is 32" in event["message"]
    assert len(pids(folder)) < 32


async def test_a_function_that_keeps_dying_is_paused_and_its_neighbours_are_not(client):
    for _ in range(3):
        await client.ask("dies", {"how": "segv"})
    assert client.reports[-1]["code"] == "overloaded"
    assert client.reports[-1]["retry_after_ms"] > 1000
    assert (await client.ask("add", {"a": 1}))["output"] == 3


SECRETIVE = """
import os
import socket
from node_agent.functions import function
if "FOAM_PASSWORD" in os.environ:
    raise ValueError("seen")
try:
    socket.socket()
except PermissionError:
    pass
else:
    raise ValueError("connected")

@function
def harmless() -> None:
    "Do nothing."
"""


@needs_filter
def test_code_that_is_only_looked_at_has_no_secrets_and_no_network(tmp_path, monkeypatch):
    monkeypatch.setenv("FOAM_PASSWORD", "hush-hush")
    (tmp_path / "secretive.py").write_text(SECRETIVE)
    (spec,) = load_declaration(tmp_path / "secretive.py").functions
    assert spec.name == "harmless"
