"""A node that saves energy: there for a while, away for a while, and open about both.

Away means disconnected, with a goodbye: a radio that is off costs nothing, and a broker that kept
messages for the node would hand over orders that are long void (they name the time they were sent,
and brokers bound what they keep). So nothing is sent to a sleeper; what only it can do waits at the
router. Its claims are leased until after it is back (`node_agent.announcer`).
"""

import asyncio
from collections.abc import Callable
from typing import Final

import structlog

from broker.lifecycle import Service
from broker.session.base import Session
from capability_schemas.errors import FoamError
from node_agent.announcer import Announcer
from node_agent.executor import Executor
from node_agent.invocation import HANDED_BACK
from node_agent.settings import NodeSettings, Sleep

_LOOK_S: Final = 5.0
"""How often a sleeper looks at the clock: timers stand still while a machine is suspended."""

_RETURN_LIMIT_S: Final = 3.0

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class Sleeper(Service):
    """Puts a node to sleep when it has nothing to do, and wakes it. Owned by the agent's loop.

    A node that was told to drain does not sleep: somebody waits for it.

    Args:
        session: The node's session.
        settings: The node's settings.
        cycle: Its duty cycle.
        executor: What it runs.
        announcer: Tells the mesh.
        clock: UTC milliseconds.
    """

    def __init__(
        self,
        *,
        session: Session,
        settings: NodeSettings,
        cycle: Sleep,
        executor: Executor,
        announcer: Announcer,
        clock: Callable[[], int],
    ) -> None:
        super().__init__(service_id=settings.node)
        self._session = session
        self._settings = settings
        self._sleep = cycle
        self._executor = executor
        self._announcer = announcer
        self._clock = clock
        self._stirred_s = 0.0
        self._stirred = asyncio.Event()
        self._asleep = False

    @property
    def asleep(self) -> bool:
        """Whether the node is away."""
        return self._asleep

    def stir(self) -> None:
        """Take note that something happened: the node stays awake for another while."""
        self._stirred_s = asyncio.get_running_loop().time()
        self._stirred.set()

    async def _on_start(self) -> None:
        self.stir()
        self.spawn(self._cycle(), name="cycle")

    async def _on_stop(self) -> None:
        """Come back to say goodbye, if the broker is there."""
        if not self._asleep:
            return
        self._announcer.set_state("draining", "stopping")
        self._session.wake()
        try:
            await self._session.wait_connected(_RETURN_LIMIT_S)
        except FoamError as error:
            _log.warning("node.asleep_to_the_end", node=self.node, error=error.message)

    @property
    def node(self) -> str:
        """The node."""
        return self._settings.node

    async def _cycle(self) -> None:
        while True:
            await self._stay_awake()
            await self._go_to_sleep()
            if self._asleep:
                await self._sleep_on()
                self._wake()

    async def _stay_awake(self) -> None:
        """Return when the node has had nothing to do for a while, or was awake for long enough."""
        loop = asyncio.get_running_loop()
        limit_s = self._sleep.awake_limit_s
        until_s = None if limit_s is None else loop.time() + limit_s
        while True:
            self._stirred.clear()
            now_s = loop.time()
            ready = self._session.connected and self._executor.accepting
            if ready and until_s is not None and now_s >= until_s:
                return
            idle = ready and await self._executor.wait_idle(0)
            quiet_s = self._stirred_s + self._sleep.awake_s
            if idle and now_s >= quiet_s:
                return
            ends = [end for end in (quiet_s if idle else None, until_s) if end is not None]
            wait_s = max(0.0, min(ends) - now_s) if ends and ready else _LOOK_S
            try:
                async with asyncio.timeout(min(wait_s, _LOOK_S) + 0.001):
                    await self._stirred.wait()
            except TimeoutError:
                continue

    async def _go_to_sleep(self) -> None:
        node, cycle = self.node, self._sleep
        self._executor.accepting = False
        if not await self._executor.wait_idle(0):
            self._announcer.set_state("draining", "goes to sleep")
            if not await self._executor.wait_idle(self._settings.drain_timeout_s):
                self._executor.stop_all(HANDED_BACK)
                await self._executor.wait_idle(self._settings.cancel_grace_s + 1)
        wake_at = self._announcer.sleep(cycle.asleep_s)
        await asyncio.sleep(cycle.linger_s)
        self._asleep = True
        _log.info("node.asleep", node=node, wake_at=wake_at)
        await self._session.rest()

    async def _sleep_on(self) -> None:
        loop = asyncio.get_running_loop()
        wake_at = self._clock() + 1000 * self._sleep.asleep_s
        end_s = loop.time() + self._sleep.asleep_s
        while (left_s := end_s - loop.time()) > 0:
            await asyncio.sleep(min(left_s, _LOOK_S))
            if self._clock() >= wake_at:
                return

    def _wake(self) -> None:
        self._announcer.wake()
        self._executor.accepting = True
        self._asleep = False
        self._session.wake()
        self.stir()
        _log.info("node.awake", node=self.node)
