"""A router of one's own, filled with the capabilities of a labelled set, and asked.

Nothing here ranks or decides. Capabilities are embedded as the registry embeds claims, searched,
calibrated, gated and scored by the classes that a router runs, with a router's default settings:
one live, idle node for each capability, and nothing else that could tell them apart.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from capability_schemas.capability import CatalogRecord
from capability_schemas.ids import now_ms
from capability_schemas.node import FunctionLoad, NodeLoad, NodeState
from capability_schemas.task import Task
from foam.evaluation.labelled import LabelledCapability, LabelledSet, LabelledTask
from foam.evaluation.metrics import Figures, Route, figures
from registry.encoders.thread import EncoderThread
from registry.search import CapabilitySearch
from registry.vectors import capability_texts, record_vectors
from router.catalogue import Fleet
from router.meaning import Meaning
from router.routing import TaskRouting, Wanted
from router.settings import RouterSettings

RANKED: Final = 100
"""Capabilities that are ranked for a task; a right one behind them counts as not found."""

_ASKED_BY: Final = "evaluation"
_REGISTRY: Final = "evaluation"
_PATIENCE_MS: Final = 600_000

Progress = Callable[[str, int, int], None]
"""Told what is being done, how much of it is done, and how much there is."""
Note = Callable[[LabelledTask, Route, dict[str, Any]], None]
"""Told of every request what was made of it, and what the router explains."""


@dataclass(frozen=True, slots=True)
class _Trial:
    """A router's decision, without the mesh around it.

    Attributes:
        routing: The router's own.
        ids: Of the set's capabilities, by function.
    """

    routing: TaskRouting
    ids: dict[str, str]


async def evaluate_routing(
    labelled: LabelledSet,
    encoder: EncoderThread,
    *,
    settings: RouterSettings | None = None,
    progress: Progress = lambda _what, _done, _of: None,
    note: Note | None = None,
) -> Figures:
    """Route every request of a set, and count.

    Args:
        labelled: Capabilities and requests.
        encoder: Embeds; entered by the caller. One without a cache (``cache_texts=0``), or the
            times are not those of requests that are new.
        settings: Of the router.
        progress: Told how far it is.
        note: Told of every request.
    """
    trial = await _prepare(labelled, encoder, settings or RouterSettings(), progress)
    asked = (*labelled.tasks, *(labelled.outside or ()))
    routes = []
    for done, task in enumerate(asked):
        progress("routing", done, len(asked))
        route, explain = await _route(trial, task)
        routes.append(route)
        if note is not None:
            note(task, route, explain())
    inside = list(zip(routes, (task.gold for task in labelled.tasks), strict=False))
    return figures(inside, routes[len(inside) :])


async def _prepare(
    labelled: LabelledSet, encoder: EncoderThread, settings: RouterSettings, progress: Progress
) -> _Trial:
    """Admit every capability, have its node known as live and idle, and calibrate."""
    search = CapabilitySearch(space=encoder.space)
    fleet = Fleet()
    for done, capability in enumerate(labelled.capabilities):
        progress("embedding", done, len(labelled.capabilities))
        record = await _admitted(capability, f"node-{done + 1:05d}", encoder)
        search.upsert(record)
        fleet.admit(record)
        _introduce(fleet, record)
    meaning = Meaning(search=search, encoder=encoder)
    routing = TaskRouting(meaning=meaning, fleet=fleet, settings=settings)
    await meaning.calibrate()
    return _Trial(routing, {one.function: one.id for one in labelled.capabilities})


async def _admitted(
    capability: LabelledCapability, node: str, encoder: EncoderThread
) -> CatalogRecord:
    """Make what a registry would publish, but for the signature."""
    texts = capability_texts(
        capability.function,
        capability.description,
        capability.examples,
        capability.input_schema,
    )
    vectors = record_vectors(await encoder.encode(texts), len(capability.examples))
    return CatalogRecord(
        node=node,
        function=capability.function,
        version="1.0.0",
        epoch=1,
        revision=1,
        description=capability.description,
        examples=capability.examples,
        skills=capability.skills,
        input_schema=capability.input_schema,
        embedding=vectors.embedding,
        parts=vectors.parts,
        space=encoder.space,
        registry=_REGISTRY,
        admitted_at=now_ms(),
        claim_digest="sha256:0",
    )


def _introduce(fleet: Fleet, record: CatalogRecord) -> None:
    now = now_ms()
    fleet.hear_state(NodeState(node=record.node, state="birth", epoch=1, at=now), now)
    idle = {record.function: FunctionLoad(instances=1)}
    fleet.hear_load(
        NodeLoad(node=record.node, epoch=1, at=now, queue_limit=1, capacity=1, functions=idle), now
    )


async def _route(trial: _Trial, task: LabelledTask) -> tuple[Route, Callable[[], dict[str, Any]]]:
    wanted = Wanted(_ASKED_BY, Task(text=task.text), None, now_ms() + _PATIENCE_MS)
    started = time.perf_counter()
    query = await trial.routing.embed(wanted)
    selection = trial.routing.select(wanted, query, now_ms())
    ms = (time.perf_counter() - started) * 1e3
    tried = [choice.function for choice in selection.choices]
    found = query.search.search(task.text, query.vector, RANKED) if query is not None else []
    ranked = dict.fromkeys((*tried, *(match.key[1] for match in found)))
    route = Route(
        ranked=tuple(trial.ids[function] for function in ranked),
        score=found[0].score if found else 0.0,
        chosen=trial.ids[tried[0]] if tried else None,
        ms=ms,
    )
    return route, selection.explain
