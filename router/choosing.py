"""From a task to the event that tells its machine who may run it."""

from collections.abc import Callable

import structlog

from capability_schemas.errors import FoamError, Overloaded
from router.events import Choice, Chosen
from router.live import LiveTask
from router.meaning import Query
from router.routing import TaskRouting
from router.settings import RouterSettings
from router.statistics import RouterStats
from router.waiting import Place

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class Chooser:
    """Chooses candidates for tasks. Owned by the router's event loop.

    Args:
        routing: Finds them.
        settings: How often a second node is asked.
        stats: Knows what takes long.
        others_wait_for: Whether tasks wait for a place that come before a newcomer.
        clock: UTC milliseconds.
    """

    def __init__(
        self,
        *,
        routing: TaskRouting,
        settings: RouterSettings,
        stats: RouterStats,
        others_wait_for: Callable[[Place], bool],
        clock: Callable[[], int],
    ) -> None:
        self._routing = routing
        self._settings = settings
        self._stats = stats
        self._others_wait_for = others_wait_for
        self._clock = clock

    async def embed(self, live: LiveTask) -> Query | FoamError | None:
        """Return the words of a task, embedded, or why that failed; None when it needs none."""
        try:
            return await self._routing.embed(live.wanted)
        except FoamError as error:
            return error
        except Exception as error:  # noqa: BLE001  # supervision boundary: one task, not the router
            _log.error("task.embedding_failed", task=live.arrival.task_id, exc_info=error)
            return FoamError("the router failed to embed the task")

    def choose(self, live: LiveTask, query: Query | FoamError | None, *, called: bool) -> Chosen:
        """Choose for a task, and keep why.

        Args:
            live: The task.
            query: As ``embed`` returned it.
            called: Whether it has waited and it is its turn; else those that wait for the node that
                would be chosen go first, and it waits with them.
        """
        if isinstance(query, FoamError):
            return Chosen((), query)
        live.query = query
        try:
            selection = self._routing.select(
                live.wanted, query, self._clock(), called_by=live.called_by
            )
        except Exception as error:  # noqa: BLE001  # supervision boundary: one task, not the router
            _log.error("task.selection_failed", task=live.arrival.task_id, exc_info=error)
            return Chosen((), FoamError("the router failed to select a node"))
        live.explanation = selection.explain
        choices, places = selection.choices, selection.places
        if choices and not called and self._others_wait_for(_place(choices[0])):
            places = places.union(_place(choice) for choice in choices)
            before = Overloaded(f"others wait for {choices[0].node}, and go first")
            return Chosen((), before, places=self._everywhere(live, places))
        return Chosen(
            choices,
            selection.problem,
            min_confidence=selection.min_confidence,
            policy=self._routing.policy(live.wanted),
            hedge_after_ms=self._hedge_after_ms(live, choices),
            places=places if choices or not places else self._everywhere(live, places),
            start_by=selection.start_by,
        )

    def _everywhere(self, live: LiveTask, places: frozenset[Place]) -> frozenset[Place]:
        return self._routing.everywhere(live.wanted, places, self._clock())

    def _hedge_after_ms(self, live: LiveTask, choices: tuple[Choice, ...]) -> int | None:
        """Return after what time the best candidate takes long; None: nobody is asked beside it."""
        if not choices or not choices[0].idempotent or not self._settings.hedge_share:
            return None
        if live.arrival.task.proof:  # held back, it is told by the router: no node has signed it
            return None
        first, samples = choices[0], self._settings.hedge_samples
        return self._stats.times.slow_ms(first.function, first.version, samples=samples)


def _place(choice: Choice) -> Place:
    return choice.node, choice.function
