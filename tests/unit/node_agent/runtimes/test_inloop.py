"""Instances without a process; the contract test has what they share with the others."""

import asyncio
from contextlib import aclosing

import pytest

from capability_schemas.errors import ExecutionFailed
from node_agent.runtimes.base import Final, Instance, InstanceDied, Piece, Request
from node_agent.runtimes.inloop import InLoopInstance
from support.calls import collect


class Scripted(InLoopInstance):
    """Does what the text of a call names."""

    def __init__(self, died, slots=2):
        super().__init__(name="scripted", slots=slots, died=died.append)
        self.put = 0
        self.go = asyncio.Event()
        self.released = 0

    async def answer(self, request, put):
        if request.text == "break":
            raise KeyError("what")
        if request.text == "flood":
            while True:
                await put(Piece("x"))
                self.put += 1
        if request.text == "wait":
            await put(Piece("waiting"))
            await self.go.wait()
        await put(Final(output=request.text))

    async def _on_stopped(self):
        self.released += 1


def call(text):
    return Request(id=text, input={}, text=text)


async def test_an_error_of_its_code_is_the_calls_own(caplog):
    async with Scripted([]) as instance:
        with pytest.raises(ExecutionFailed, match="KeyError: 'what'"):
            await collect(instance, call("break"))
        assert instance.alive
        assert (await collect(instance, call("hi")))[-1] == Final(output="hi")
    assert "instance.call_failed" in caplog.text


async def test_it_waits_for_a_slow_reader(eventually):
    async with Scripted([]) as instance:
        async with aclosing(instance.invoke(call("flood"))) as answers:
            await anext(answers)
            await eventually(lambda: instance.put > 10)
            for _ in range(1000):
                await asyncio.sleep(0)
            assert instance.put < 100
        await instance.settled("flood")
        assert instance.busy == 0


async def test_a_lost_one_ends_its_calls_and_is_released_after_the_last():
    died: list[Instance] = []
    async with Scripted(died) as instance:
        async with aclosing(instance.invoke(call("wait"))) as answers:
            await anext(answers)
            assert isinstance(instance.lost("gone"), InstanceDied)
            instance.lost("gone again")
            assert died == [instance]
            assert not instance.alive
            assert instance.released == 0
            with pytest.raises(InstanceDied, match="instance scripted: it has ended"):
                await collect(instance, call("hi"))
            instance.go.set()
            assert await anext(answers) == Final(output="wait")
        await asyncio.sleep(0)
        assert instance.released == 1
    assert died == [instance]


async def test_closing_lets_calls_end(eventually):
    died: list[Instance] = []
    instance = Scripted(died)
    await instance.start()
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(collect(instance, call("wait")))
        await eventually(lambda: instance.busy == 1)
        closing = group.create_task(instance.close(20))
        await asyncio.sleep(0)
        assert not instance.alive
        instance.go.set()
        assert (await waiting)[-1] == Final(output="wait")
        await closing
    assert died == [instance]
