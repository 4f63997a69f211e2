"""Turns at the password check."""

import asyncio

import pytest

from broker.embedded.line import Line, neighbourhood
from capability_schemas.errors import Overloaded

DEADLINE_S = 30.0


class Queue:
    """A line of one place, taken at the beginning, and those who wait in it."""

    def __init__(self, *, limit: int = 100, party_limit: int = 100) -> None:
        self.line = Line(places=1, limit=limit, party_limit=party_limit)
        self.served: list[str] = []
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self._go = asyncio.Event()

    async def come(self, *names: str) -> None:
        """Each name's first letter is its party; returns when all wait, or have their turn."""
        for name in names:
            self.tasks[name] = asyncio.create_task(self._serve(name))
            await asyncio.sleep(0)

    async def _serve(self, name: str) -> None:
        async with self.line.turn(name[0]):
            self.served.append(name)
            await self._go.wait()

    async def done(self) -> dict[str, BaseException | None]:
        self._go.set()
        async with asyncio.timeout(DEADLINE_S):
            results = await asyncio.gather(*self.tasks.values(), return_exceptions=True)
        return dict(zip(self.tasks, results, strict=True))


async def test_parties_take_turns_however_many_one_sends():
    queue = Queue()
    await queue.come("a1", "a2", "a3", "a4", "b1", "c1", "b2")
    await queue.done()
    assert queue.served == ["a1", "a2", "b1", "c1", "a3", "b2", "a4"]
    assert len(queue.line) == 0


async def test_a_party_that_fills_its_share_is_refused_at_once():
    queue = Queue(party_limit=2)
    await queue.come("a1", "a2", "a3", "a4", "b1")
    with pytest.raises(Overloaded):
        await asyncio.wait_for(queue.tasks["a4"], DEADLINE_S)
    await queue.done()
    assert queue.served == ["a1", "a2", "b1", "a3"]


async def test_a_full_line_makes_room_for_a_smaller_party():
    queue = Queue(limit=3)
    await queue.come("a0", "a1", "a2", "a3", "b1", "b2")
    results = await queue.done()
    refused = [name for name, result in results.items() if isinstance(result, Overloaded)]
    assert refused == ["a3", "b2"]
    assert queue.served == ["a0", "a1", "b1", "a2"]


@pytest.mark.parametrize("when", ["waiting", "called"])
async def test_who_leaves_the_line_takes_no_place_with_it(when):
    queue = Queue()
    await queue.come("a0", "b1", "c1")
    if when == "called":
        queue.tasks["a0"].cancel()
        await asyncio.sleep(0)  # its place has gone to b1, which does not know yet
    queue.tasks["b1"].cancel()
    await queue.done()
    assert queue.served == ["a0", "c1"]
    await queue.come("d1")
    assert (await queue.done())["d1"] is None
    assert len(queue.line) == 0


@pytest.mark.parametrize(
    ("address", "party"),
    [
        ("10.0.0.9", "10.0.0.9"),
        ("::ffff:10.0.0.9", "10.0.0.9"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", ""),
        ("no address", "no address"),
    ],
)
def test_who_counts_as_one(address, party):
    assert neighbourhood(address) == party
