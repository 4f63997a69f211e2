"""Calls from inside a node: who calls whom, and whether all would wait for each other for ever.

Something that runs holds its place while it waits for what it has called. A call that could get a
place only from those who wait for it, directly or through others, is refused at once.
"""

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Final

from capability_schemas.errors import ExecutionFailed
from node_agent.admission.queue import AdmissionQueue

_DEEPEST: Final = 8
"""Calls within calls."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """What runs, as those it calls see it.

    Attributes:
        key: Its key in the queue.
        deadline: UTC milliseconds; what it calls ends by then too.
        priority: 0 to 9.
        session: Affinity key.
        depth: 0 for an invocation from outside.
    """

    key: str
    deadline: int
    priority: int
    session: str | None = None
    depth: int = 0


CALLER: Final[ContextVar[Caller | None]] = ContextVar("node_agent_caller", default=None)
"""On whose behalf the current task runs; tasks that it starts inherit it."""


class CallGraph:
    """The calls under way from inside the node; owned by the agent's event loop.

    Args:
        queue: Knows what runs, and which places there are.
    """

    def __init__(self, queue: AdmissionQueue) -> None:
        self._queue = queue
        self._parents: dict[str, str] = {}
        self._wanted: dict[str, tuple[str, str]] = {}

    def begin(self, key: str, *, caller: Caller, group: str, function: str) -> None:
        """Note a call before it is admitted; `end` forgets it.

        Args:
            key: Its key.
            caller: Who calls.
            group: Whose instances it needs.
            function: What is called.

        Raises:
            ExecutionFailed: It is nested too deeply, or its place could never come free.
        """
        if caller.depth >= _DEEPEST:
            raise ExecutionFailed(
                f"calls are nested deeper than {_DEEPEST}: {function} is not called"
            )
        self._parents[key] = caller.key
        self._wanted[key] = (group, function)
        if not self._can_start(group, function):
            self.end(key)
            raise ExecutionFailed(
                f"{function} is not called: every place it could have is held by something that"
                " waits for it; raise its concurrency, or do not let functions call themselves"
            )

    def end(self, key: str) -> None:
        """Forget a call."""
        self._parents.pop(key, None)
        self._wanted.pop(key, None)

    def _can_start(self, group: str, function: str) -> bool:
        """Tell whether a place comes free in the end: the least fixed point of who can go on."""
        running = {entry.key: entry for entry in self._queue.all_running()}
        calls: dict[str, list[str]] = {}
        for key, parent in self._parents.items():
            calls.setdefault(parent, []).append(key)
        going: set[str] = set()

        def has_place(group: str, function: str) -> bool:
            places, own_places = self._queue.most_of(group, function)
            inside = [one for one in running.values() if one.group == group]
            own = [one for one in inside if one.function == function]
            return (len(inside) < places or any(one.key in going for one in inside)) and (
                len(own) < own_places or any(one.key in going for one in own)
            )

        def goes_on(key: str) -> bool:
            return key in going if key in running else has_place(*self._wanted[key])

        while True:
            more = {
                key
                for key in running.keys() - going
                if all(goes_on(call) for call in calls.get(key, ()))
            }
            if not more:
                return has_place(group, function)
            going |= more
