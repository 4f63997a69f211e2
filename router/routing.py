"""From a task to its candidates: embed, search, look at the fleet, select.

``TaskRouting`` is the only part of the router that knows the encoder and the search. Tasks that
name their function are neither embedded nor searched for.
"""

import difflib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from capability_schemas.errors import NoCapableNode
from capability_schemas.task import FunctionRef, Task
from registry.encoders.base import Vectors
from registry.search import CapabilitySearch, recalibrate
from router.catalogue import Fleet
from router.selection import Offer, Request, Selection, select
from router.settings import RouterSettings

_MEANT: Final = 0.4
_SESSIONS: Final = 10_000


class QueryEncoder(Protocol):
    """Embeds texts without blocking the event loop; ``EncoderThread`` and a test double do."""

    async def encode_one(self, text: str) -> Vectors:
        """Return the unit vector of one text, float32, shape ``(dimension,)``."""
        ...

    async def encode(self, texts: Sequence[str]) -> Vectors:
        """Return unit vectors, float32, shape ``(len(texts), dimension)``."""
        ...


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be routed.

    Attributes:
        client: Whose task it is; sessions are scoped to it.
        task: The task.
        function: Function addressed by name, if any.
        deadline: UTC milliseconds.
    """

    client: str
    task: Task
    function: FunctionRef | None
    deadline: int


class TaskRouting:
    """Finds candidates and explains them. Owned by the router's event loop.

    Args:
        search: Semantic index of the admitted records.
        encoder: Embeds the words of tasks.
        fleet: Nodes and records.
        settings: Weights and bounds.
    """

    def __init__(
        self,
        *,
        search: CapabilitySearch,
        encoder: QueryEncoder,
        fleet: Fleet,
        settings: RouterSettings,
    ) -> None:
        self._search = search
        self._encoder = encoder
        self._fleet = fleet
        self._settings = settings
        self._sessions: OrderedDict[tuple[str, str], str] = OrderedDict()

    @property
    def threshold(self) -> float:
        """Similarity below which the answer is ``no_capable_node``."""
        return self._search.threshold

    @property
    def needs_calibration(self) -> bool:
        """Whether the catalogue has changed since the threshold was fitted."""
        return self._search.needs_calibration

    async def embed(self, wanted: Wanted) -> Vectors | None:
        """Embed the words of a task; None when it names its function.

        Cancellation is safe.
        """
        if wanted.function is not None or wanted.task.text is None:
            return None
        return await self._encoder.encode_one(wanted.task.text)

    def select(self, wanted: Wanted, vector: Vectors | None, now: int) -> Selection:
        """Select candidates from the fleet as it stands.

        Args:
            wanted: What is to be routed.
            vector: As ``embed`` returned it.
            now: UTC milliseconds.
        """
        task = wanted.task
        if vector is None:
            offers, threshold = self._named(wanted.function), 0.0
            if wanted.function is not None and not offers:
                return self._unknown(wanted.function)
        else:
            offers, threshold = self._found(task.text or "", vector), self._search.threshold
        session = self._sessions.get((wanted.client, task.session)) if task.session else None
        return select(
            Request(task, wanted.function, wanted.deadline, prefer=session),
            offers,
            threshold=threshold,
            weights=self._settings.weights,
            nearest=self._settings.nearest,
            now=now,
        )

    def remember(self, wanted: Wanted, node: str) -> None:
        """Note which node serves a session, so that the next task of it prefers that node."""
        if wanted.task.session is None:
            return
        key = (wanted.client, wanted.task.session)
        self._sessions[key] = node
        self._sessions.move_to_end(key)
        if len(self._sessions) > _SESSIONS:
            self._sessions.popitem(last=False)

    async def calibrate(self) -> None:
        """Fit the threshold to the present catalogue.

        The encoder takes a few texts a turn, so that tasks get it in between.
        """
        await recalibrate(self._search, self._encoder.encode)

    def _named(self, function: FunctionRef | None) -> list[Offer]:
        if function is None:
            return []
        records = self._fleet.named(function.name)
        return [Offer(record, self._fleet.node(record.node)) for record in records]

    def _found(self, text: str, vector: Vectors) -> list[Offer]:
        offers = []
        for match in self._search.search(text, vector, self._settings.candidates):
            record = self._fleet.records.get(match.key)
            if record is not None:
                node = self._fleet.node(record.node)
                offers.append(Offer(record, node, match.score, match.dense, match.lexical))
        return offers

    def _unknown(self, function: FunctionRef) -> Selection:
        """Nobody has a function of that name: name those that sound like it."""
        names = sorted({record.function for record in self._fleet.records.values()})
        near = difflib.get_close_matches(
            function.name, names, n=max(1, self._settings.nearest), cutoff=0.0
        )[: self._settings.nearest]
        close = difflib.get_close_matches(function.name, near, cutoff=_MEANT)
        misses: list[dict[str, Any]] = [
            {
                "function": record.function,
                "node": record.node,
                "score": round(
                    difflib.SequenceMatcher(None, function.name, record.function).ratio(), 4
                ),
                "reason": "another name",
            }
            for name in near
            for record in self._fleet.named(name)[:1]
        ]
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        problem = NoCapableNode(
            f"no node offers the function {function.name}{hint}", nearest=misses
        )
        explanation: dict[str, Any] = {
            "by": "name",
            "chosen": None,
            "problem": {"code": problem.code.value, "message": problem.message},
            "candidates": [],
        }
        return Selection(choices=(), problem=problem, explain=lambda: explanation)
