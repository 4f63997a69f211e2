"""What a node claims, and when it says so again."""

import json

import pytest

from broker.session.memory import MemoryBroker, MemorySession
from capability_schemas.capability import ModelInfo, Resources
from capability_schemas.functions import FunctionSpec
from capability_schemas.node import NodeLoad
from node_agent.announcer import Announcer, is_news
from node_agent.declaration.sources import file_digest
from node_agent.settings import NodeSettings

NODE = "edge-1"


def spec(name, **fields):
    return FunctionSpec.model_validate({"name": name, "description": name, **fields})


@pytest.fixture
def broker():
    return MemoryBroker()


@pytest.fixture
async def session(broker):
    async with MemorySession(broker=broker, client_id=NODE) as made:
        await made.wait_connected()
        yield made


@pytest.fixture
def make_announcer(session, topics):
    def make(functions, **fields):
        return Announcer(
            session=session,
            topics=topics,
            settings=NodeSettings(node=NODE),
            functions={one.name: one for one in functions},
            key=None,
            epoch=1,
            load=lambda: NodeLoad(node=NODE, epoch=1, at=1),
            clock=lambda: 1000,
            **({"model_file": lambda _: None} | fields),
        )

    return make


@pytest.fixture
def claims(broker):
    def read(function):
        sent = broker.published(f"+/+/+/capability/{NODE}/{function}")
        return [json.loads(message.payload) if message.payload else None for message in sent]

    return read


@pytest.fixture
def latest(claims):
    def read(function):
        return (claims(function) or [{}])[-1]

    return read


@pytest.mark.parametrize(
    ("old", "new", "news"),
    [
        ({"first_ms": None}, {"first_ms": 5.0}, True),
        ({"first_ms": 100.0}, {"first_ms": 124.0}, False),
        ({"first_ms": 100.0}, {"first_ms": 126.0}, True),
        ({"first_ms": 100.0}, {"first_ms": 70.0}, True),
        ({"first_ms": 1.0}, {"first_ms": 20.0}, False),
        ({"token_ms": 10.0}, {"token_ms": 13.0}, True),
        ({"token_ms": 1.0}, {"token_ms": 1.9}, False),
        ({"context_tokens": 512}, {"context_tokens": 513}, True),
        ({"concurrency": 2}, {"concurrency": 1}, True),
        ({}, {}, False),
    ],
)
def test_small_changes_of_times_are_no_news(old, new, news):
    assert is_news(Resources(**old), Resources(**new)) is news


async def test_what_was_measured_is_told_when_it_is_news(make_announcer, claims, eventually):
    async with make_announcer([spec("talk")]) as announcer:
        model = ModelInfo(name="m", engine="e 1")
        announcer.measured("talk", model, Resources(context_tokens=512, first_ms=100.0))
        announcer.measured("talk", model, Resources(context_tokens=512, first_ms=101.0))
        announcer.measured("talk", model, Resources(context_tokens=256, first_ms=102.0))
        announcer.measured("gone", model, Resources())
        await eventually(lambda: len(claims("talk")) == 3)
        first, second, third = claims("talk")
        assert [claim["revision"] for claim in (first, second, third)] == [1, 2, 3]
        assert "model" not in first
        assert second["model"] == {"name": "m", "engine": "e 1"}
        assert third["resources"] == {
            "context_tokens": 256,
            "concurrency": 1,
            "first_ms": 102.0,
        }
        assert claims("gone") == []


async def test_other_functions_are_claimed_and_what_is_gone_is_withdrawn(
    make_announcer, claims, eventually
):
    kept, old = spec("kept"), spec("edited", version="1.0.0")
    async with make_announcer([kept, old, spec("gone")]) as announcer:
        announcer.measured("edited", None, Resources(first_ms=9.0))
        edited = spec("edited", version="2.0.0")
        announcer.replace({"kept": kept, "edited": edited, "new": spec("new")})
        await eventually(lambda: claims("new") != [])
        assert [claim["revision"] for claim in claims("kept")] == [1]
        told = claims("edited")[-1]
        assert (told["version"], told["revision"]) == ("2.0.0", 3)
        assert told["resources"] == {"concurrency": 1}
        assert claims("gone")[-1] is None
        announcer.replace({"kept": kept, "edited": edited, "gone": spec("gone")})
        await eventually(lambda: claims("gone")[-1] is not None)
        assert claims("gone")[-1]["revision"] == 2
        assert claims("new")[-1] is None


async def test_a_withdrawal_survives_a_lost_connection(
    make_announcer, broker, claims, latest, eventually
):
    async with make_announcer([spec("kept"), spec("gone")]) as announcer:
        await eventually(lambda: claims("gone") != [])
        broker.down()
        announcer.replace({"kept": spec("kept")})
        broker.up()
        await eventually(lambda: latest("gone") is None)


async def test_models_are_digested_once_for_each_state_of_the_file(
    make_announcer, latest, eventually, tmp_path
):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"one")
    digested = []

    def digest(file):
        digested.append(file)
        return file_digest(file)

    def talker(**fields):
        return {name: spec(name, model="m", **fields) for name in ("talk", "sum")}

    functions = talker()
    async with make_announcer(
        functions.values(), model_file=lambda _: (ModelInfo(name="m"), path), model_digest=digest
    ) as announcer:
        await eventually(lambda: all("model" in latest(name) for name in functions))
        assert latest("sum")["model"] == {"name": "m", "digest": file_digest(path)}
        announcer.replace(talker(version="2.0.0"))
        await eventually(
            lambda: all(
                latest(name)["version"] == "2.0.0" and "model" in latest(name) for name in functions
            )
        )
        assert digested == [path]
        path.write_bytes(b"another one")
        announcer.replace(talker(version="3.0.0"))
        await eventually(lambda: latest("sum").get("model", {}).get("digest") == file_digest(path))
        assert digested == [path, path]
