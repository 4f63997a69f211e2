"""The plan of a cluster of nats-servers, and what each of them is told."""

import asyncio
import stat
from pathlib import Path
from typing import Any

import pytest

from broker.access import CredentialStore, Role
from broker.engine import EngineSettings
from broker.nats import NatsBroker
from broker.nats_cluster import ClusterPlan, ClusterServer, SeatedServer
from capability_schemas.errors import ConfigurationError
from capability_schemas.topics import Topics


def servers(count: int = 3, **changes: Any) -> tuple[ClusterServer, ...]:
    made = [
        {"name": f"foam-{number}", "host": "127.0.0.1", "port": 7000 + number}
        for number in range(1, count + 1)
    ]
    made[-1].update(changes)
    return tuple(ClusterServer.model_validate(one) for one in made)


@pytest.mark.parametrize("count", [1, 2, 4, 7])
def test_a_cluster_has_three_or_five(count: int) -> None:
    with pytest.raises(ConfigurationError, match="3 or 5 servers"):
        ClusterPlan.of(servers(count))


@pytest.mark.parametrize(
    ("change", "what"), [({"name": "foam-1"}, "name"), ({"port": 7001}, "address")]
)
def test_no_two_servers_are_the_same(change: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigurationError, match=f"the same {what}"):
        ClusterPlan.of(servers(**change))


def test_a_plan_is_read_as_it_was_written_by_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "cluster.json"
    plan = ClusterPlan.of(servers())
    plan.write(path)
    assert ClusterPlan.read(path) == plan
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert plan.secret.get_secret_value() not in repr(plan)
    assert ClusterPlan.of(servers()).secret != plan.secret


@pytest.mark.parametrize("text", ["", "{}", '{"servers": [], "secret": "x"}'])
def test_a_damaged_plan_says_what_writes_one(tmp_path: Path, text: str) -> None:
    path = tmp_path / "cluster.json"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match="foam up --brokers 3"):
        ClusterPlan.read(path)
    with pytest.raises(ConfigurationError, match="foam up --brokers 3"):
        ClusterPlan.read(tmp_path / "missing.json")


@pytest.mark.parametrize("number", [0, 4])
def test_there_is_no_seat_beyond(number: int) -> None:
    with pytest.raises(ConfigurationError, match="the cluster has 3"):
        ClusterPlan.of(servers()).seat(number)


def test_each_server_knows_the_others_and_tells_clients_nothing(tmp_path: Path) -> None:
    plan = ClusterPlan.of(servers(host="::1"))
    store = CredentialStore(tmp_path / "credentials.json")
    store.add("pump-1", Role.DEVICE)
    engine = NatsBroker(
        settings=EngineSettings(data_dir=tmp_path),
        credentials=store,
        topics=Topics(),
        passwords={"pump-1": "p"},
        seat=plan.seat(2),
    )
    text = engine._configuration(1883)
    secret = plan.secret.get_secret_value()
    assert "server_name: foam-2" in text
    assert 'listen: "127.0.0.1:7002"' in text
    routes = next(line for line in text.splitlines() if "routes:" in line)
    assert routes.count("nats-route://") == 2
    assert f"{secret}@127.0.0.1:7001" in routes
    assert f"{secret}@[::1]:7003" in routes
    assert "no_advertise: true" in text
    assert "stream_replicas: 3" in text
    assert "consumer_replicas: 3" in text


async def test_a_server_that_is_behind_or_not_there_is_not_healthy() -> None:
    seated = SeatedServer(ClusterPlan.of(servers()).seat(1))
    answers = [b"HTTP/1.0 503 Service Unavailable\r\n\r\n", b"", b"HTTP/1.1 200 OK\r\n\r\n{}"]
    asked: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readline())
        writer.write(answers.pop(0))
        writer.close()

    path = seated.lines()[1].partition(": ")[2].strip('"')
    port = int(seated.lines()[0].rpartition(":")[2].strip('"'))
    assert not await seated.is_healthy()
    async with await asyncio.start_server(serve, "127.0.0.1", port):
        seen = [await seated.is_healthy() for _ in range(3)]
    assert seen == [False, False, True]
    assert asked[0].split()[1].decode() == f"{path}/healthz"
