"""Services and the end of a process."""

import asyncio
import os
import signal

import pytest

from broker.lifecycle import ProcessEnd, Service, parent_watch, run_until_signal
from capability_schemas.errors import Unavailable


class Recorder(Service):
    def __init__(self, *, fail: str = "") -> None:
        super().__init__(service_id="one")
        self.calls: list[str] = []
        self.fail = fail
        self.never = asyncio.Event()

    async def _on_start(self) -> None:
        self.calls.append("start")
        self.task = self.spawn(self._forever(), name="loop")
        if self.fail == "start":
            raise ValueError("start")

    async def _on_stop(self) -> None:
        self.calls.append("stop")
        if self.fail == "stop hangs":
            await self.never.wait()
        if self.fail == "stop":
            raise ValueError("stop")

    async def _on_stopped(self) -> None:
        self.calls.append("stopped")

    async def _forever(self) -> None:
        try:
            await self.never.wait()
        finally:
            self.calls.append("cancelled")


async def boom() -> None:
    raise ValueError("boom")


async def test_hooks_run_in_order_around_the_tasks():
    async with Recorder() as service:
        await asyncio.sleep(0)
        ran = service.running
        assert service.task.get_name().endswith(".Recorder[one].loop")
    assert service.calls == ["start", "stop", "cancelled", "stopped"]
    assert (ran, service.running) == (True, False)
    await service.wait()
    await service.stop()  # idempotent


async def test_starts_once():
    service = Recorder()
    async with service:
        with pytest.raises(RuntimeError, match="starts once"):
            await service.start()
    with pytest.raises(RuntimeError, match="starts once"):
        await service.start()


async def test_a_failed_start_leaves_nothing_running():
    service = Recorder(fail="start")
    with pytest.raises(ValueError, match="start"):
        async with service:
            pytest.fail("entered")
    assert service.calls[-1] == "stopped"
    assert service.task.cancelled()


async def test_the_first_crash_surfaces_in_wait_and_not_again_in_stop():
    async with Recorder() as service:
        service.spawn(boom(), name="bad")
        with pytest.raises(ValueError, match="boom"):
            await service.wait()
        assert isinstance(service.crash, ValueError)
        assert not service.running


async def test_an_unseen_crash_surfaces_in_stop():
    with pytest.raises(ValueError, match="boom"):
        async with Recorder() as service:
            await asyncio.wait([service.spawn(boom(), name="bad")])
    assert service.calls[-1] == "stopped"


async def test_the_error_of_the_body_is_not_hidden_by_the_crash():
    async def body() -> None:
        async with Recorder() as service:
            await asyncio.wait([service.spawn(boom(), name="bad")])
            raise KeyError

    with pytest.raises(KeyError):
        await body()


async def test_a_hanging_goodbye_is_cut_off():
    service = Recorder(fail="stop hangs")
    service.stop_timeout_s = 0.01
    async with service:
        pass
    assert service.calls[-1] == "stopped"
    assert service.task.cancelled()


async def test_a_failing_goodbye_still_cancels_the_tasks():
    service = Recorder(fail="stop")
    with pytest.raises(ValueError, match="stop"):
        async with service:
            pass
    assert service.calls[-1] == "stopped"
    assert service.task.cancelled()


async def test_nothing_is_spawned_before_start_or_after_the_end():
    service = Recorder()
    with pytest.raises(RuntimeError, match="is new"):
        service.spawn(boom(), name="early")
    async with service:
        pass
    with pytest.raises(RuntimeError, match="is stopped"):
        service.spawn(boom(), name="late")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_the_wait(number: signal.Signals):
    async with Recorder() as service:
        asyncio.get_running_loop().call_soon(os.kill, os.getpid(), number)
        assert await run_until_signal(service) == number.name


async def test_a_crash_ends_the_wait():
    async with Recorder() as service:
        service.spawn(boom(), name="bad")
        with pytest.raises(ValueError, match="boom"):
            await run_until_signal(service)


async def test_a_service_stopped_by_somebody_else_ends_the_wait():
    async with Recorder() as service, ProcessEnd() as end:
        service.spawn(service.stop(), name="self_stop")
        assert await end.wait(service) == "stopped"


async def test_a_second_signal_is_another_wish_unless_it_comes_right_behind_the_first(eventually):
    async with Recorder() as service, ProcessEnd() as end:
        insisted = service.spawn(end.wait_insisted(), name="insisted")
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        await end.wait(service)
        handled = asyncio.get_running_loop().time()
        assert not insisted.done()
        await eventually(lambda: asyncio.get_running_loop().time() > handled + 0.5)
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.wait_for(insisted, 20)


async def test_the_death_of_the_parent_ends_the_wait():
    read_fd, write_fd = os.pipe()
    try:
        async with Recorder() as service, ProcessEnd(parent_fd=read_fd) as end:
            os.write(write_fd, b"ignored")
            os.close(write_fd)
            assert await end.wait(service) == "parent gone"
            assert end.reason == "parent gone"
    finally:
        os.close(read_fd)


async def test_parent_watch_crashes_the_service():
    read_fd, write_fd = os.pipe()
    try:
        async with Recorder() as service:
            service.spawn(parent_watch(read_fd), name="parent")
            os.close(write_fd)
            with pytest.raises(Unavailable, match="is gone"):
                await service.wait()
    finally:
        os.close(read_fd)
