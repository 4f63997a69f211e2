"""Virtual time and the processes in it."""

import asyncio
from typing import Any

import pytest

from foam.simulation.loop import Process, VirtualLoop, run_virtual


def test_an_hour_takes_no_time_and_timers_of_one_moment_keep_their_order() -> None:
    async def main(loop: VirtualLoop) -> tuple[float, list[str]]:
        order: list[str] = []
        for name in "cab":
            loop.call_later(60, order.append, name)
        await asyncio.sleep(3_600)
        return loop.time(), order

    assert run_virtual(main) == (3_600.0, ["c", "a", "b"])


def test_work_of_threads_is_done_in_the_loop() -> None:
    async def main(loop: VirtualLoop) -> Any:
        with pytest.raises(ZeroDivisionError):
            await asyncio.to_thread(lambda: 1 // 0)
        return await asyncio.to_thread(loop.is_running)

    assert run_virtual(main) is True


def test_a_simulation_in_which_nothing_can_happen_says_so() -> None:
    async def main(loop: VirtualLoop) -> None:
        await asyncio.Event().wait()

    with pytest.raises(RuntimeError, match="nothing is left"):
        run_virtual(main)


def _ticker(loop: VirtualLoop, process: Process, ticks: list[float]) -> None:
    async def tick() -> None:
        while True:
            await asyncio.sleep(1)
            ticks.append(loop.time())

    async def live() -> None:
        loop.create_task(tick())  # a child of the child belongs to the process as well
        await asyncio.Event().wait()

    loop.create_task(live(), context=process.context())


def test_nothing_of_a_killed_process_runs_any_more() -> None:
    async def main(loop: VirtualLoop) -> list[float]:
        ticks: list[float] = []
        process = Process("p")
        _ticker(loop, process, ticks)
        await asyncio.sleep(2.5)
        before = loop.time()
        await process.kill()
        assert loop.time() == before
        assert not process.alive
        await asyncio.sleep(10)
        return ticks

    assert run_virtual(main) == [1.0, 2.0]


def test_a_killed_process_does_not_clean_up_in_its_own_time() -> None:
    async def main(loop: VirtualLoop) -> list[str]:
        said: list[str] = []

        async def stubborn() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(1)
                said.append("goodbye")

        process = Process("p")
        loop.create_task(stubborn(), context=process.context())
        await asyncio.sleep(1)
        await process.kill()
        await asyncio.sleep(10)
        return said

    assert run_virtual(main) == []


def test_a_stopped_process_catches_up_when_it_goes_on() -> None:
    async def main(loop: VirtualLoop) -> list[float]:
        ticks: list[float] = []
        process = Process("p")
        _ticker(loop, process, ticks)
        await asyncio.sleep(1.5)
        process.stop()
        await asyncio.sleep(10)
        process.go_on(loop)
        await asyncio.sleep(1.25)
        await process.kill()
        return ticks

    assert run_virtual(main) == [1.0, 11.5, 12.5]
