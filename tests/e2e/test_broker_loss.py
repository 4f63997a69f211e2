"""A whole mesh whose broker is killed while tasks are under way."""

import asyncio
import contextlib
import itertools
import json
import os
import signal
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from pydantic import SecretStr

from broker.session.base import Message
from broker.session.mqtt import MqttSession
from broker.session.settings import BrokerUrl, SessionSettings
from capability_schemas.errors import BrokerUnavailable
from capability_schemas.reply import Chunk, Result
from capability_schemas.topics import TopicKind, Topics
from conftest import require_broker
from foam.sdk import MeshClient
from support.foam_process import FoamUp, foam_up, run_foam

pytestmark = [pytest.mark.e2e, pytest.mark.broker, pytest.mark.encoder, pytest.mark.timeout(300)]

TASKS = 12
PATIENCE_S = 120.0
TOPICS = Topics()
RETAINED = ("catalog/#", "capability/#", "node/+/state", "router/+/state", "trust/#")


def session(up: FoamUp, who: str, *, first: str | None = None) -> MqttSession:
    """Make a session of a person of the mesh, beginning with a broker."""
    person = up.facts[who]
    urls = [str(url) for url in BrokerUrl.parse_all(up.facts["broker"])]
    urls.sort(key=lambda url: url != first)
    return MqttSession(
        settings=SessionSettings(
            urls=tuple(urls),
            client_id=f"{person['id']}-watch",
            username=person["username"],
            password=SecretStr(person["password"]),
        )
    )


async def retained(up: FoamUp, *, at_least: frozenset[str] = frozenset()) -> dict[str, bytes]:
    """Return what a newcomer is told; waits until it comes to rest, and holds some topics."""
    found: dict[str, bytes] = {}
    news = asyncio.Event()

    async def take(message: Message) -> None:
        if message.retain and message.payload:
            found[message.topic] = message.payload
            news.set()

    async with session(up, "admin") as watcher:
        for one in RETAINED:
            await watcher.subscribe(f"{TOPICS.root}/{one}", take)
        await watcher.wait_connected(PATIENCE_S)
        async with asyncio.timeout(PATIENCE_S):
            while True:
                news.clear()
                try:
                    async with asyncio.timeout(1.0):
                        await news.wait()
                except TimeoutError:
                    if found and at_least <= found.keys():
                        return found


async def _stream(mesh: MeshClient, name: str, started: asyncio.Event) -> list[int]:
    """Count to eight and return the numbers of the events.

    While the only node has lost its broker there may be nobody to do it, which is an honest end; a
    client asks again then, which is another task.
    """
    for attempt in itertools.count():
        handle = None
        while handle is None:  # an id makes it safe to say it again, and this is what it is for
            with contextlib.suppress(BrokerUnavailable):
                handle = await mesh.submit(
                    function="count",
                    input={"n": 8, "pause_s": 0.2},
                    task_id=f"{name}-{attempt}",
                    timeout_s=PATIENCE_S,
                )
        numbers = []
        async for event in handle:
            if isinstance(event, Chunk):
                started.set()
                numbers.append(event.seq)
            elif isinstance(event, Result):
                numbers.append(event.seq)
        if isinstance(handle.outcome, Result):
            return numbers
        assert handle.outcome is not None
        assert handle.outcome.code == "no_capable_node", handle.outcome
        assert not numbers
        await asyncio.sleep(1.0)  # as a client waits between two tries
    raise AssertionError("never")


async def ask_and_kill(up: FoamUp, kill: Callable[[], None]) -> None:
    """Break the broker in the middle of some tasks; each has to end once, without a gap."""
    person = up.facts["device"]
    ends: defaultdict[str, set[bytes]] = defaultdict(set)
    started = [asyncio.Event() for _ in range(TASKS)]

    async def take(message: Message) -> None:
        event = json.loads(message.payload)
        if event["event"] in {"result", "error"}:
            ends[event["task"]].add(message.payload)

    async with (
        session(up, "device") as watcher,
        MeshClient(
            up.facts["broker"], username=person["username"], password=person["password"]
        ) as mesh,
        asyncio.timeout(2 * PATIENCE_S),
    ):
        await watcher.subscribe(TOPICS.filter(TopicKind.REPLY, client=person["id"]), take)
        await watcher.wait_connected(PATIENCE_S)
        async with asyncio.TaskGroup() as group:
            streams = []
            for number in range(TASKS):
                streams.append(group.create_task(_stream(mesh, f"job-{number}", started[number])))
                if number == TASKS // 2:
                    await started[0].wait()
                    kill()
        for stream in streams:
            numbers = stream.result()
            assert numbers == list(range(len(numbers)))
    assert ends  # those of which the watcher was connected, too
    assert all(len({json.loads(one)["event"] for one in each}) == 1 for each in ends.values())
    seqs = {task: {json.loads(one)["seq"] for one in each} for task, each in ends.items()}
    assert all(len(each) == 1 for each in seqs.values()), seqs


def broker_process(up: FoamUp, port: int) -> psutil.Process:
    """Return the broker program itself that listens on a port."""
    for process in up.family():
        if any(
            one.status == psutil.CONN_LISTEN and one.laddr.port == port
            for one in process.net_connections(kind="tcp")
        ):
            return process
    raise AssertionError(f"nobody below {up.process.pid} listens on {port}")


@pytest.mark.parametrize(
    "kind", ["embedded", pytest.param("mosquitto", marks=pytest.mark.external_broker)]
)
def test_a_broker_killed_and_started_again_costs_no_task(
    kind: str, tmp_path: Path, trial_node: Path
) -> None:
    require_broker(kind)
    with foam_up(tmp_path, "--broker", kind, "--node", str(trial_node)) as up:
        before = asyncio.run(retained(up))
        pid = broker_process(up, up.port).pid
        asyncio.run(ask_and_kill(up, lambda: os.kill(pid, signal.SIGKILL)))
        assert broker_process(up, up.port).pid != pid
        after = asyncio.run(retained(up, at_least=frozenset(before)))
        missing = before.keys() - after.keys()
        assert not missing
        kinds = {topic.split("/")[3] for topic in after}
        assert kinds >= {"catalog", "capability", "node", "router"}


@pytest.mark.external_broker
def test_one_of_three_servers_killed_costs_no_task(tmp_path: Path, trial_node: Path) -> None:
    require_broker("nats")
    options = ("--broker", "nats", "--brokers", "3", "--node", str(trial_node))
    with foam_up(tmp_path, *options) as up:
        urls = BrokerUrl.parse_all(up.facts["broker"])
        assert len(urls) == 3
        before = asyncio.run(retained(up))
        pid = broker_process(up, urls[0].port).pid  # that of the client, and of the registry
        asyncio.run(ask_and_kill(up, lambda: os.kill(pid, signal.SIGKILL)))
        after = asyncio.run(retained(up, at_least=frozenset(before)))
        assert not before.keys() - after.keys()
        up.wait_line("broker runs again", where="err")
        assert broker_process(up, urls[0].port).pid != pid
        shown = json.loads(run_foam("doctor", "--json", "--data", str(up.data)).stdout)
        brokers = [check for check in shown if check["what"].startswith("broker mqtt://")]
        assert len(brokers) == 3
        assert {check["verdict"] for check in brokers} == {"ok"}


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--broker", "mosquitto", "--brokers", "3"), "needs --broker nats"),
        (("--broker", "mqtt://h", "--brokers", "3"), "brokers of our own"),
        (("--broker", "nats", "--brokers", "4"), "3 or 5 servers"),
    ],
)
def test_what_is_no_cluster_is_refused(
    tmp_path: Path, options: tuple[str, ...], complaint: str
) -> None:
    done = run_foam("up", "--data", str(tmp_path), "--nodes", "none", *options)
    assert done.returncode != 0
    assert complaint in done.stderr.decode()
