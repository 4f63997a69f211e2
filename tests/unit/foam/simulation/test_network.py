"""The simulated network does what MQTT allows, and no more."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from broker.session.base import Message, Will
from foam.simulation.loop import VirtualLoop, run_virtual
from foam.simulation.network import Quality, SimulatedBroker, SimulatedSession

Scene = Callable[[SimulatedBroker], Awaitable[Any]]


def play(scene: Scene, **quality: Any) -> Any:
    """Run a scene on a broker of some quality."""

    async def main(loop: VirtualLoop) -> Any:
        broker = SimulatedBroker(
            quality=Quality(**{"loss": 0.0, "lost_wills": 0.0, **quality}),
            seed="seed",
            tap=lambda publisher, message: None,
        )
        return await scene(broker)

    return run_virtual(main)


async def reader(
    broker: SimulatedBroker, name: str, topic_filter: str, *, clean: bool = True
) -> tuple[SimulatedSession, list[Message]]:
    heard: list[Message] = []
    session = SimulatedSession(broker=broker, client_id=name, clean=clean)

    async def take(message: Message) -> None:
        heard.append(message)

    await session.subscribe(topic_filter, take)
    await session.start()
    await session.wait_connected()
    return session, heard


async def writer(broker: SimulatedBroker, **options: Any) -> SimulatedSession:
    session = SimulatedSession(broker=broker, client_id="w", **options)
    await session.start()
    await session.wait_connected()
    return session


def test_messages_of_one_topic_keep_their_order_and_those_of_several_may_overtake() -> None:
    async def scene(broker: SimulatedBroker) -> list[Message]:
        reading, heard = await reader(broker, "r", "t/#")
        writing = await writer(broker)
        for number in range(100):
            writing.post(f"t/{number % 2}", str(number).encode())
        await asyncio.sleep(60)
        await writing.stop()
        await reading.stop()
        return heard

    heard = play(scene)
    numbers = [int(message.payload) for message in heard]
    for half in (0, 1):
        assert [n for n in numbers if n % 2 == half] == list(range(half, 100, 2))
    assert numbers != sorted(numbers)


def test_nothing_confirmed_is_lost_when_a_sender_is_cut_off_and_some_of_it_comes_twice() -> None:
    async def scene(broker: SimulatedBroker) -> list[int]:
        reading, heard = await reader(broker, "r", "t")
        writing = await writer(broker)
        for number in range(300):
            writing.post("t", str(number).encode())
            await asyncio.sleep(0.001)
            if number % 50 == 49:
                broker.cut("w")
        await asyncio.sleep(120)
        await writing.stop()
        await reading.stop()
        return [int(message.payload) for message in heard]

    numbers = play(scene)
    assert set(numbers) == set(range(300))
    assert len(numbers) > 300
    first = list(dict.fromkeys(numbers))
    assert first == sorted(first)


def test_a_kept_session_gets_what_it_missed_and_another_does_not() -> None:
    async def scene(broker: SimulatedBroker) -> tuple[list[bytes], list[bytes]]:
        kept, heard = await reader(broker, "kept", "t", clean=False)
        gone, missed = await reader(broker, "gone", "t")
        writing = await writer(broker)
        for name in ("kept", "gone"):
            broker.cut(name)
        writing.post("t", b"meanwhile")
        await asyncio.sleep(60)
        for session in (kept, gone, writing):
            await session.stop()
        return [m.payload for m in heard], [m.payload for m in missed]

    heard, missed = play(scene)
    assert heard == [b"meanwhile"]
    assert missed == []


def test_a_forgetful_broker_loses_what_it_held() -> None:
    async def scene(broker: SimulatedBroker) -> int:
        writing = await writer(broker)
        writing.post("t", b"kept?", retain=True)
        await asyncio.sleep(1)
        broker.down()
        broker.up()
        await asyncio.sleep(60)
        await writing.stop()
        return len(broker.retained)

    assert play(scene, keeps_retained=False) == 0
    assert play(scene) == 1


def test_a_will_is_published_after_a_cut_and_not_after_a_goodbye() -> None:
    async def scene(broker: SimulatedBroker) -> list[bytes]:
        reading, heard = await reader(broker, "r", "will")
        writing = await writer(broker, will=Will("will", b"gone"))
        broker.cut("w")
        await asyncio.sleep(60)
        await writing.stop()
        await asyncio.sleep(60)
        await reading.stop()
        return [message.payload for message in heard]

    assert play(scene) == [b"gone"]
    assert play(scene, lost_wills=1.0) == []


def test_unconfirmed_messages_may_be_lost_and_confirmed_ones_not() -> None:
    async def scene(broker: SimulatedBroker) -> tuple[int, int]:
        reading, heard = await reader(broker, "r", "t/#")
        writing = await writer(broker)
        for _ in range(200):
            writing.post("t/0", b"", qos=0)
            writing.post("t/1", b"", qos=1)
        await asyncio.sleep(60)
        await writing.stop()
        await reading.stop()
        topics = [message.topic for message in heard]
        return topics.count("t/0"), topics.count("t/1")

    once, surely = play(scene, loss=0.2)
    assert 50 < once < 200
    assert surely == 200


def test_a_stalled_link_holds_messages_back_and_a_long_stall_ends_it() -> None:
    async def scene(broker: SimulatedBroker) -> tuple[int, int, list[str]]:
        reading, heard = await reader(broker, "r", "t")
        writing = await writer(broker)
        broker.stall("w", 5.0)
        writing.post("t", b"late")
        await asyncio.sleep(4.9)
        early = len(heard)
        await asyncio.sleep(1)
        late = len(heard)
        broker.stall("w", 40.0)
        await asyncio.sleep(30)
        clients = broker.clients()
        await asyncio.sleep(60)
        await writing.stop()
        await reading.stop()
        return early, late, clients

    assert play(scene) == (0, 1, ["r"])
