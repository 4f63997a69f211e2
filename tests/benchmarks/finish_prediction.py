"""How well a node predicts when a task will end, against guessing its usual time.

One agent with real processes, no network: each task's predicted time from admission to the end
(``queue + start + run``) is compared with the actual one. The baseline is what needs no model: the
median time of the tasks so far. Tasks come one at a time, and in bursts that have to queue.
"""

import asyncio
import contextlib
import json
import random
import statistics
from collections.abc import AsyncIterator
from typing import Any

from benchmarks.measure import NODE
from broker.session.base import Message
from broker.session.memory import MemoryBroker, MemorySession
from capability_schemas.functions import FunctionSpec
from capability_schemas.ids import now_ms
from capability_schemas.invocation import Invocation
from capability_schemas.topics import TopicKind, Topics
from capability_schemas.wire import encode
from node_agent.agent import NodeAgent
from node_agent.declaration import load_declaration
from node_agent.settings import NodeSettings

TOPICS = Topics()
DEVICES = ("pump-3", "tank-4", "greenhouse-7", "conveyor-12", "boiler-1")
ASKED = (
    "what should I do? the vibration of {} is too high.",
    "Extract JSON: The humidity of {} is 48 %.",
    "Summarise: {} was started at 9:00, ran hot until 9:40 and was stopped by hand at 9:45.",
)

SERIES = (("nap", 1), ("nap", 8), ("answer", 1), ("answer", 8), ("long_answer", 1))
"""Function, and tasks at a time."""


class Bench:
    """Sends tasks to one agent and times them."""

    def __init__(self, session: MemorySession, agent: NodeAgent) -> None:
        self.agent = agent
        self._session = session
        self._ends: dict[str, asyncio.Future[int]] = {}
        self._number = 0

    async def on_reply(self, message: Message) -> None:
        event = json.loads(message.payload)
        if event["event"] == "error":
            raise RuntimeError(event["message"])
        if event["event"] == "result":
            self._ends.pop(event["task"]).set_result(now_ms())

    async def run(self, function: str, value: Any, text: str | None) -> float:
        """Return the time of one task, milliseconds."""
        self._number += 1
        task, sent = f"t{self._number}", now_ms()
        ended = self._ends[task] = asyncio.get_running_loop().create_future()
        invocation = Invocation(
            task=task,
            client="bench",
            router="bench-router",
            function=function,
            version="1.0.0",
            text=text,
            input=value,
            deadline=sent + 60_000,
            reply=f"{TOPICS.root}/reply/bench/{task}",
            sent_at=sent,
            stream=False,
        )
        self._session.post(TOPICS.build(TopicKind.INVOKE, node="bench-node"), encode(invocation))
        async with asyncio.timeout(60):
            return float(await ended - sent)


@contextlib.asynccontextmanager
async def bench(functions: list[FunctionSpec]) -> AsyncIterator[Bench]:
    broker = MemoryBroker()
    async with (
        MemorySession(broker=broker, client_id="bench-router") as session,
        MemorySession(broker=broker, client_id="bench-node") as own,
    ):
        await own.wait_connected(10)
        await session.wait_connected(10)
        settings = NodeSettings(node="bench-node")
        async with NodeAgent(
            session=own, topics=TOPICS, settings=settings, functions=functions
        ) as agent:
            made = Bench(session, agent)
            await session.subscribe(f"{TOPICS.root}/reply/#", made.on_reply)
            yield made


async def series(
    function: FunctionSpec, *, rounds: int, burst: int, warm_up: int
) -> tuple[float, float, float]:
    """Return median error of the prediction and of the baseline, and the median time in ms."""
    chance = random.Random(7)
    async with bench([function]) as made:

        async def once() -> float:
            if function.name == "nap":
                return await made.run("nap", None, "x" * chance.randrange(200, 1600))
            if function.name == "long_answer":
                text = f"Classify the severity of {chance.randrange(1000)} alerts."
            else:
                text = chance.choice(ASKED).format(chance.choice(DEVICES))
            return await made.run(function.name, None, text)

        for _ in range(warm_up):
            await once()
        made.agent.forecast.clear_errors()
        taken: list[float] = []
        naive: list[float] = []
        for _ in range(rounds):
            guess = statistics.median(taken) if taken else None
            async with asyncio.TaskGroup() as tasks:
                running = [tasks.create_task(once()) for _ in range(burst)]
            times = [max(1.0, task.result()) for task in running]
            naive += [] if guess is None else [abs(guess - one) / one for one in times]
            taken += times
        error = made.agent.forecast.median_error
        assert error is not None
        return error, statistics.median(naive), statistics.median(taken)


def measure(*, rounds: int = 40) -> list[dict[str, Any]]:
    declared = {
        spec.name: spec
        for file in (NODE, NODE.with_name("nap.py"))
        for spec in load_declaration(file).functions
    }
    rows = []
    for name, burst in SERIES:
        error, naive, taken = asyncio.run(
            series(declared[name], rounds=max(5, rounds // burst), burst=burst, warm_up=10)
        )
        rows.append(
            {
                "function": name,
                "tasks at a time": burst,
                "task p50 ms": round(taken, 1),
                "median error of the prediction": f"{error:.1%}",
                "median error of the usual time": f"{naive:.1%}",
            }
        )
    return rows
