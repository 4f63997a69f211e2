"""The pool: starts on demand, sharing, crashes and pauses."""

import asyncio

import pytest

from capability_schemas.errors import Overloaded
from capability_schemas.functions import FunctionSpec
from node_agent.pool import InstancePool
from node_agent.runtimes.base import InstanceFailed


class FakeInstance:
    """An instance without a process; the contract of real ones is tests/contract/test_runtimes."""

    def __init__(self, slots, died):
        self.slots = slots
        self.busy = 0
        self.alive = True
        self.killed = False
        self.pid = 1
        self.closed = False
        self._died = died

    def crash(self):
        self.alive = False
        self._died(self)

    async def close(self, grace_s):
        self.closed = True


class FakeRuntime:
    name = "fake"

    def __init__(self):
        self.slots = 1
        self.started = []
        self.failures = 0
        self.gate = asyncio.Event()
        self.gate.set()

    def group(self, spec):
        return spec.entry or spec.name

    async def start(self, spec, *, died):
        await self.gate.wait()
        if self.failures:
            self.failures -= 1
            raise InstanceFailed("no model")
        self.started.append(FakeInstance(self.slots, died))
        return self.started[-1]


@pytest.fixture
def runtime():
    return FakeRuntime()


@pytest.fixture
def clock():
    return [1000.0]


@pytest.fixture
async def pool(runtime, clock):
    made = InstancePool(
        runtimes={"fake": runtime},
        backoff_s=2.0,
        backoff_limit_s=5.0,
        jitter=lambda: 1.0 - 1e-9,
        monotonic=lambda: clock[0],
    )
    async with made:
        yield made


def spec(name="f", **fields):
    return FunctionSpec(name=name, description="d", runtime="fake", **fields)


async def test_an_instance_is_started_once_and_used_again(pool, runtime):
    first = await pool.acquire(spec())
    pool.release(spec(), first, served=True)
    assert await pool.acquire(spec()) is first
    assert await pool.acquire(spec()) is not first


async def test_an_instance_with_several_slots_takes_several_calls(pool, runtime):
    runtime.slots = 2
    got = [await pool.acquire(spec()) for _ in range(3)]
    assert got[0] is got[1]
    assert got[2] is not got[0]


async def test_functions_of_one_group_share_instances(pool):
    a, b = spec("a", entry="shared"), spec("b", entry="shared")
    instance = await pool.acquire(a)
    pool.release(a, instance, served=True)
    assert await pool.acquire(b) is instance
    assert pool.instances(a) == pool.instances(b) == [instance]


async def test_a_call_that_was_abandoned_still_occupies_its_instance(pool):
    first = await pool.acquire(spec())
    first.busy = 1
    pool.release(spec(), first, served=True)
    assert await pool.acquire(spec()) is not first


async def test_a_start_outlives_the_call_that_asked_for_it(pool, runtime, eventually):
    runtime.gate.clear()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await pool.acquire(spec())
    runtime.gate.set()
    await eventually(lambda: len(pool.instances(spec())) == 1)
    assert await pool.acquire(spec()) is runtime.started[0]
    assert len(runtime.started) == 1


async def test_a_first_crash_is_mended_at_once_and_further_ones_after_a_pause(pool, runtime, clock):
    (await pool.acquire(spec())).crash()
    (await pool.acquire(spec())).crash()
    with pytest.raises(Overloaded) as refused:
        await pool.acquire(spec())
    assert refused.value.retry_after_ms == pytest.approx(2000, abs=2)
    clock[0] += 2.0
    (await pool.acquire(spec())).crash()
    assert pool.is_degraded(spec())
    clock[0] += 3.9
    with pytest.raises(Overloaded):
        await pool.acquire(spec())
    clock[0] += 0.2
    instance = await pool.acquire(spec())
    pool.release(spec(), instance, served=True)
    assert not pool.is_degraded(spec())
    assert pool.instances(spec()) == [instance]


async def test_the_pause_has_a_cap(pool, clock):
    for _ in range(10):
        clock[0] += 5.0
        (await pool.acquire(spec())).crash()
    with pytest.raises(Overloaded) as refused:
        await pool.acquire(spec())
    assert refused.value.retry_after_ms <= 5001


async def test_a_kill_by_the_agent_is_no_crash(pool):
    for _ in range(5):
        instance = await pool.acquire(spec())
        instance.killed = True
        instance.crash()
    assert not pool.is_degraded(spec())


async def test_a_start_that_fails_counts_as_a_crash(pool, runtime):
    runtime.failures = 2
    for _ in range(2):
        with pytest.raises(InstanceFailed):
            await pool.acquire(spec())
    with pytest.raises(Overloaded):
        await pool.acquire(spec())


async def test_warming_starts_one_and_survives_a_failure(pool, runtime):
    runtime.failures = 1
    await pool.warm(spec())
    assert pool.instances(spec()) == []
    await pool.warm(spec())
    await pool.warm(spec())
    assert len(pool.instances(spec())) == 1


async def test_stopping_closes_every_instance(runtime):
    pool = InstancePool(runtimes={"fake": runtime})
    async with pool:
        await pool.acquire(spec("a"))
        await pool.acquire(spec("b"))
    assert [instance.closed for instance in runtime.started] == [True, True]
