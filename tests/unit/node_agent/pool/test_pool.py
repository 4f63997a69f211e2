"""The pool: starts on demand, sharing, crashes and pauses, idle ends, memory."""

import asyncio
import os
from pathlib import Path

import pytest

from capability_schemas.errors import ConfigurationError, Overloaded
from capability_schemas.functions import FunctionSpec
from node_agent.pool.keepwarm import WarmthSettings
from node_agent.pool.pool import InstancePool
from node_agent.runtimes.base import InstanceFailed

MB = 1_000_000


class FakeInstance:
    """An instance without a process; the contract of real ones is tests/contract/test_runtimes."""

    def __init__(self, slots, died, info):
        self.slots = slots
        self.busy = 0
        self.alive = True
        self.killed = False
        self.pid = 0
        self.info = info
        self.closed = False
        self.on_close = lambda: None
        self._died = died

    def crash(self):
        self.alive = False
        self._died(self)

    async def close(self, grace_s):
        self.closed = True
        self.on_close()


class FakeRuntime:
    name = "fake"

    def __init__(self, clock):
        self.epoch = ""
        self.slots = 1
        self.info = {}
        self.started = []
        self.failures = 0
        self.failure = InstanceFailed("no model")
        self.start_s = 0.0
        self.gate = asyncio.Event()
        self.gate.set()
        self.under_way = 0
        self._clock = clock

    def group(self, spec):
        return (spec.entry or spec.name) + self.epoch

    async def start(self, spec, *, died):
        self.under_way += 1
        try:
            await self.gate.wait()
        finally:
            self.under_way -= 1
        self._clock[0] += self.start_s
        if self.failures:
            self.failures -= 1
            raise self.failure
        self.started.append(FakeInstance(self.slots, died, dict(self.info)))
        return self.started[-1]


class FakeMemory:
    def __init__(self):
        self.available = 1000 * MB
        self.total = 2000 * MB
        self.looks = 0

    def look(self):
        self.looks += 1
        return self.available


@pytest.fixture
def clock():
    return [1000.0]


@pytest.fixture
def runtime(clock):
    return FakeRuntime(clock)


@pytest.fixture
def memory():
    return FakeMemory()


@pytest.fixture
def sized(tmp_path):
    """Return a function with a model of so many bytes, none of which is on the disk."""

    def make(name, size_bytes, **fields):
        path = tmp_path / f"{name}.gguf"
        path.touch()
        os.truncate(path, size_bytes)
        return spec(name, model=str(path), **fields)

    return make


@pytest.fixture
async def pool(runtime, clock, memory):
    made = InstancePool(
        runtimes={"fake": runtime},
        backoff_s=2.0,
        backoff_limit_s=5.0,
        warmth=WarmthSettings(worth=100.0, least_s=10.0, costly_s=1.0, costly_least_s=30.0),
        memory_reserve_bytes=100 * MB,
        model_file=lambda one: None if one.model is None else Path(one.model),
        available=memory.look,
        total=lambda: memory.total,
        resident=lambda _pid: None,
        jitter=lambda: 1.0 - 1e-9,
        monotonic=lambda: clock[0],
    )
    async with made:
        yield made


def spec(name="f", **fields):
    return FunctionSpec(name=name, description="d", runtime="fake", **fields)


F = spec()


@pytest.fixture
def offered(pool):
    """Offer functions; what is used without being offered ends as soon as it is idle."""

    def offer(*specs):
        pool.offer(specs)
        return specs[0]

    offer(F)
    return offer


async def used(pool, one, **fields):
    """Have an instance started and used, and return it idle."""
    instance = await pool.acquire(one, **fields)
    pool.release(instance, served=True)
    return instance


@pytest.mark.usefixtures("offered")
class TestLeases:
    async def test_an_instance_is_started_once_and_used_again(self, pool):
        first = await used(pool, F)
        assert await pool.acquire(F) is first
        assert await pool.acquire(F) is not first

    async def test_an_instance_with_several_slots_takes_several_calls(self, pool, runtime):
        runtime.slots = 2
        got = [await pool.acquire(F) for _ in range(3)]
        assert got[0] is got[1]
        assert got[2] is not got[0]

    async def test_functions_of_one_group_share_instances(self, pool, offered):
        a, b = spec("a", entry="shared"), spec("b", entry="shared")
        offered(a, b)
        instance = await used(pool, a)
        assert await pool.acquire(b) is instance
        assert pool.instances(a) == pool.instances(b) == [instance]

    async def test_a_call_that_was_abandoned_still_occupies_its_instance(self, pool):
        first = await pool.acquire(F)
        first.busy = 1
        pool.release(first, served=True)
        assert await pool.acquire(F) is not first

    async def test_a_session_returns_to_its_instance(self, pool):
        a, b = await pool.acquire(F, session="x"), await pool.acquire(F, session="y")
        pool.release(a, served=True)
        pool.release(b, served=True)
        for session, expected in (("x", a), ("y", b), ("x", a)):
            assert await used(pool, F, session=session) is expected
        taken = await pool.acquire(F, session="x")
        assert taken is a
        assert await pool.acquire(F, session="x") is b

    async def test_a_start_outlives_the_call_that_asked_for_it(self, pool, runtime, eventually):
        runtime.gate.clear()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await pool.acquire(F)
        runtime.gate.set()
        await eventually(lambda: len(pool.instances(F)) == 1)
        assert await pool.acquire(F) is runtime.started[0]
        assert len(runtime.started) == 1

    async def test_what_comes_free_before_a_start_has_ended_is_taken(
        self, pool, runtime, eventually
    ):
        first = await pool.acquire(F)
        runtime.gate.clear()
        async with asyncio.TaskGroup() as tasks:
            waiting = tasks.create_task(pool.acquire(F))
            await eventually(lambda: runtime.under_way == 1)
            pool.release(first, served=True)
        assert waiting.result() is first
        runtime.gate.set()

    async def test_as_many_start_at_a_time_as_callers_can_use(self, pool, runtime, eventually):
        runtime.slots = 2
        held = [await pool.acquire(F) for _ in range(2)]
        runtime.gate.clear()
        async with asyncio.TaskGroup() as tasks:
            more = [tasks.create_task(pool.acquire(F)) for _ in range(5)]
            await eventually(lambda: runtime.under_way == 3)
            runtime.gate.set()
        assert len(runtime.started) == 4
        assert {id(one.result()) for one in more}.isdisjoint({id(one) for one in held})

    async def test_a_start_is_measured_and_predicted(self, pool, runtime):
        assert pool.start_ms(F) is None
        runtime.start_s = 2.0
        await pool.acquire(F)
        assert pool.start_ms(F) == 2000
        await used(pool, F)
        assert pool.start_ms(F) == 0


@pytest.mark.usefixtures("offered")
class TestCrashes:
    async def test_a_first_is_mended_at_once_and_further_ones_after_a_pause(self, pool, clock):
        (await pool.acquire(F)).crash()
        (await pool.acquire(F)).crash()
        with pytest.raises(Overloaded) as refused:
            await pool.acquire(F)
        assert refused.value.retry_after_ms == pytest.approx(2000, abs=2)
        clock[0] += 2.0
        (await pool.acquire(F)).crash()
        assert pool.is_degraded(F)
        clock[0] += 3.9
        with pytest.raises(Overloaded):
            await pool.acquire(F)
        clock[0] += 0.2
        instance = await used(pool, F)
        assert not pool.is_degraded(F)
        assert pool.instances(F) == [instance]

    async def test_the_pause_has_a_cap(self, pool, clock):
        for _ in range(10):
            clock[0] += 5.0
            (await pool.acquire(F)).crash()
        with pytest.raises(Overloaded) as refused:
            await pool.acquire(F)
        assert refused.value.retry_after_ms <= 5001

    async def test_a_kill_by_the_agent_is_no_crash(self, pool):
        for _ in range(5):
            instance = await pool.acquire(F)
            instance.killed = True
            instance.crash()
        assert not pool.is_degraded(F)

    async def test_a_start_that_fails_counts_as_a_crash(self, pool, runtime):
        runtime.failures = 2
        for _ in range(2):
            with pytest.raises(InstanceFailed):
                await pool.acquire(F)
        with pytest.raises(Overloaded):
            await pool.acquire(F)


@pytest.mark.usefixtures("offered")
class TestIdle:
    async def test_an_idle_instance_ends_after_its_break_even_time(self, pool, runtime, clock):
        runtime.start_s = 0.5
        instance = await used(pool, F)
        clock[0] += 49.9
        await pool.tend()
        assert pool.instances(F) == [instance]
        clock[0] += 0.2
        await pool.tend()
        assert pool.instances(F) == []
        assert (await used(pool, F)) is not instance

    async def test_the_function_may_say_how_long_it_stays(self, pool, offered, clock):
        brief = offered(spec("brief", idle_s=1))
        await used(pool, brief)
        clock[0] += 0.9
        assert await pool.tend() == pytest.approx(0.1)
        clock[0] += 0.2
        await pool.tend()
        assert pool.instances(brief) == []

    async def test_what_works_does_not_end(self, pool, clock):
        instance = await pool.acquire(F)
        clock[0] += 10_000
        await pool.tend()
        assert pool.instances(F) == [instance]

    async def test_more_than_are_used_end_the_others_stay(self, pool, clock):
        a, b = await pool.acquire(F), await pool.acquire(F)
        pool.release(a, served=True)
        pool.release(b, served=True)
        kept = await used(pool, F)
        for _ in range(4):
            clock[0] += 4
            assert await used(pool, F) is kept
            await pool.tend()
        assert pool.instances(F) == [kept]

    async def test_of_a_warm_function_one_always_stays(self, pool, offered, clock):
        kept = offered(spec("kept", warm=True))
        a, b = await pool.acquire(kept), await pool.acquire(kept)
        pool.release(a, served=True)
        pool.release(b, served=True)
        clock[0] += 10_000
        await pool.tend()
        assert len(pool.instances(kept)) == 1

    async def test_a_warm_function_starts_by_itself_and_again_after_a_loss(
        self, pool, offered, runtime, clock, eventually
    ):
        kept = offered(spec("kept", warm=True))
        await eventually(lambda: len(pool.instances(kept)) == 1)
        clock[0] += 6.0
        runtime.started[0].crash()
        await eventually(lambda: pool.instances(kept) == runtime.started[1:])

    async def test_regular_work_has_an_instance_started_ahead(
        self, pool, runtime, clock, eventually
    ):
        runtime.start_s = 2.0
        for _ in range(9):
            await used(pool, F)
            clock[0] += 300
            await pool.tend()
        await used(pool, F)
        clock[0] += 200
        await pool.tend()
        assert pool.instances(F) == []
        started = len(runtime.started)
        clock[0] += 60
        await pool.tend()
        await eventually(lambda: len(runtime.started) == started + 1)
        await pool.tend()
        assert pool.start_ms(F) == 0

    async def test_instances_of_what_is_no_longer_offered_end_when_idle(self, pool, offered, clock):
        at_work = await pool.acquire(F)
        offered(spec("other"))
        await pool.tend()
        assert pool.instances(F) == [at_work]
        pool.release(at_work, served=True)
        await pool.tend()
        assert pool.instances(F) == [at_work]  # what waits for it gets it
        clock[0] += 0.2
        await pool.tend()
        assert pool.instances(F) == []

    async def test_stopping_closes_every_instance(self, runtime):
        pool = InstancePool(runtimes={"fake": runtime})
        pool.offer([spec("a"), spec("b")])
        async with pool:
            await pool.acquire(spec("a"))
            await pool.acquire(spec("b"))
        assert [instance.closed for instance in runtime.started] == [True, True]


@pytest.mark.usefixtures("offered")
class TestMemory:
    async def test_idle_instances_go_while_memory_is_short(self, pool, offered, memory, clock):
        a, b, c = spec("a"), spec("b"), spec("c", warm=True)
        offered(a, b, c)
        oldest, newer = await used(pool, a), None
        clock[0] += 5
        newer = await used(pool, b)
        kept = await used(pool, c)

        def closed():
            memory.available += 60 * MB

        oldest.on_close = newer.on_close = closed
        memory.available = 50 * MB
        await pool.tend()
        assert (oldest.closed, newer.closed, kept.closed) == (True, False, False)
        memory.available = 10 * MB
        await pool.tend()
        assert (newer.closed, kept.closed) == (True, False)

    async def test_a_start_makes_room_first(self, pool, offered, sized, runtime, memory):
        runtime.info = {"memory_bytes": 400 * MB}
        small, large = spec("small"), sized("large", 500 * MB)
        offered(small, large)
        idle = await used(pool, small)
        memory.available = 300 * MB

        def closed():
            memory.available += 400 * MB

        idle.on_close = closed
        assert await pool.acquire(large) is runtime.started[1]
        assert idle.closed

    async def test_without_room_it_is_refused_for_now_with_the_figures(
        self, pool, offered, sized, memory
    ):
        large = offered(sized("large", 1500 * MB))
        with pytest.raises(Overloaded, match=r"needs 1,500 MB, 1,000 MB are available"):
            await pool.acquire(large)
        memory.available = 1600 * MB
        await pool.acquire(large)

    async def test_what_is_larger_than_all_memory_is_refused_for_good(
        self, pool, offered, tmp_path, runtime, memory
    ):
        model = tmp_path / "model.gguf"
        model.write_bytes(b"x" * 3000)
        memory.total = 2000
        made = InstancePool(
            runtimes={"fake": runtime},
            model_file=lambda _spec: model,
            available=lambda: 1500,
            total=lambda: memory.total,
        )
        async with made:
            made.offer([F])
            with pytest.raises(ConfigurationError, match="larger than memory"):
                await made.acquire(F)
        assert runtime.started == []

    async def test_starts_at_the_same_time_do_not_share_the_same_room(
        self, pool, offered, sized, runtime, eventually
    ):
        a, b = (sized(name, 600 * MB) for name in "ab")
        offered(a, b)
        runtime.gate.clear()
        async with asyncio.TaskGroup() as tasks:
            first = tasks.create_task(pool.acquire(a))
            await eventually(lambda: runtime.under_way == 1)
            with pytest.raises(Overloaded, match="not enough memory"):
                await pool.acquire(b)
            runtime.gate.set()
        assert first.result() is runtime.started[0]

    async def test_a_generous_limit_is_no_need(self, pool, offered, memory):
        roomy = offered(spec("roomy", limits={"memory_bytes": 64_000 * MB}))
        await pool.acquire(roomy)
        memory.available = 20 * MB
        with pytest.raises(Overloaded, match="it needs 34 MB, 20 MB are available"):
            await pool.acquire(spec("other"))
        await pool.acquire(spec("tiny", limits={"memory_bytes": 10 * MB}))

    async def test_what_is_started_ahead_ends_nothing_else(
        self, pool, offered, runtime, memory, clock, eventually
    ):
        a, b = spec("a"), spec("b")
        offered(a, b)
        runtime.start_s = 2.0
        for _ in range(10):
            await used(pool, a)
            clock[0] += 300
            await pool.tend()
        await used(pool, a)
        clock[0] += 240
        await pool.tend()
        assert pool.instances(a) == []
        kept = await used(pool, b)
        memory.available = 120 * MB
        clock[0] += 20
        await pool.tend()
        looks = memory.looks
        await eventually(lambda: memory.looks > looks)
        assert (pool.instances(a), pool.instances(b)) == ([], [kept])
        memory.available = 140 * MB
        clock[0] += 6
        await pool.tend()
        await eventually(lambda: len(pool.instances(a)) == 1)
        assert pool.instances(b) == [kept]


@pytest.mark.usefixtures("offered")
class TestOfOthers:
    """A runtime may be somebody else's: what it raises ends a call, never the pool."""

    async def test_any_error_of_a_start_is_the_end_of_that_call_only(self, pool, runtime):
        runtime.failures, runtime.failure = 1, ValueError("a mistake of theirs")
        with pytest.raises(InstanceFailed, match="a mistake of theirs"):
            await pool.acquire(F)
        await pool.acquire(F)
        assert pool.crash is None

    async def test_an_error_of_a_close_is_logged(self, pool, clock, eventually):
        instance = await used(pool, F)
        instance.on_close = lambda: 1 // 0
        clock[0] += 10_000
        await pool.tend()
        await eventually(lambda: instance.closed)
        await used(pool, F)
        assert pool.crash is None


@pytest.mark.usefixtures("offered")
async def test_a_lease_goes_back_to_where_it_came_from(pool, offered, runtime, clock, eventually):
    old = await pool.acquire(F)
    runtime.epoch = "'"  # an edit of what its group rests on, the function itself unchanged
    offered(F)
    new = await used(pool, F)
    assert new is not old
    pool.release(old, served=True)
    clock[0] += 1.0
    await pool.tend()
    await eventually(lambda: old.closed)
    assert pool.instances(F) == [new]


@pytest.mark.usefixtures("offered")
async def test_what_was_refused_for_its_start_has_one_started(pool, runtime, eventually):
    for _ in range(3):
        pool.prepare(F)
    await eventually(lambda: len(pool.instances(F)) == 1)
    pool.prepare(F)
    assert len(runtime.started) == 1
    assert pool.start_ms(F) == 0


async def test_stopping_ends_what_is_being_started(runtime, eventually):
    runtime.gate.clear()
    pool = InstancePool(runtimes={"fake": runtime})
    pool.offer([F])
    async with asyncio.TaskGroup() as tasks:
        async with pool:
            waiting = tasks.create_task(refusal(pool))
            await eventually(lambda: runtime.under_way == 1)
        assert runtime.under_way == 0
    assert isinstance(waiting.result(), InstanceFailed)
    assert runtime.started == []


async def refusal(pool):
    with pytest.raises(InstanceFailed) as refused:
        await pool.acquire(F)
    return refused.value


@pytest.mark.usefixtures("offered")
async def test_warming_starts_one_and_survives_a_failure(pool, runtime):
    runtime.failures = 1
    await pool.warm(F)
    assert pool.instances(F) == []
    await pool.warm(F)
    await pool.warm(F)
    assert len(pool.instances(F)) == 1
