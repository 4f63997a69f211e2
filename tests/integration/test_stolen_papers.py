"""Somebody else connects with the papers of a member: nobody is cut for it, and all hear of it."""

import contextlib
import json

import pytest
from amqtt.session import Session
from pydantic import SecretStr

from broker.access import CredentialStore, Role
from broker.audit import Tally
from broker.embedded import EmbeddedBroker
from broker.embedded.refusals import Refusals
from broker.engine import EngineSettings
from broker.session.mqtt import MqttSession
from broker.session.settings import SessionSettings
from capability_schemas.topics import TopicKind, Topics

TOPICS = Topics(site="hall-3")


@pytest.mark.broker
async def test_a_second_connection_with_the_same_papers_is_told(tmp_path, eventually):
    store = CredentialStore(tmp_path / "credentials.json")
    words = {
        name: store.add(name, role)
        for name, role in (("edge-1", Role.NODE), ("watch-1", Role.OBSERVER))
    }
    heard = []

    async def on_event(message):
        heard.append(json.loads(message.payload)["data"])

    async with contextlib.AsyncExitStack() as stack:
        engine = await stack.enter_async_context(
            EmbeddedBroker(
                settings=EngineSettings(data_dir=tmp_path / "broker"),
                credentials=store,
                topics=TOPICS,
            )
        )

        async def connect(name):
            session = MqttSession(
                settings=SessionSettings(
                    urls=(engine.url,),
                    client_id=name,
                    username=name,
                    password=SecretStr(words[name]),
                )
            )
            await stack.enter_async_context(session)
            await session.wait_connected(30)
            return session

        watch = await connect("watch-1")
        await watch.subscribe(
            TOPICS.build(TopicKind.EVENT, source="broker", kind="audit"), on_event
        )
        await connect("edge-1")
        await connect("edge-1")  # the thief
        await eventually(
            lambda: any(one.get("action") == "connection_taken_over" for one in heard),
            timeout_s=40.0,
        )
        told = next(one for one in heard if one["action"] == "connection_taken_over")
        assert told["actor"] == "edge-1"


def session(username, client_id, address, *, connected=True):
    made = Session()
    made.username, made.client_id, made.remote_address = username, client_id, address
    if connected:
        made.transitions.connect()
    return made


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (session("edge-1", "edge-1", "10.0.0.7"), ["connection_taken_over"]),
        (session("edge-1", "edge-1", "10.0.0.9"), ["connection_taken_over"]),
        (session("edge-1", "second", "10.0.0.7"), ["connected_from_elsewhere"]),
        (session("edge-1", "second", "10.0.0.9"), []),  # a device may connect twice
        (session("edge-1", "edge-1", "10.0.0.7", connected=False), []),
        (session("edge-2", "edge-2", "10.0.0.7"), []),
    ],
)
def test_who_is_connected_already_is_looked_at(other, told):
    tally = Tally(lambda: 1)
    refusals = Refusals(tally=tally, topics=TOPICS)
    refusals.look_for_second(session("edge-1", "edge-1", "10.0.0.9"), [other])
    assert [one["action"] for one in tally.drain()] == told
