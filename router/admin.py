"""Administration of a router: each verb a question or an order, answered with JSON."""

from collections.abc import Awaitable, Callable
from typing import Any, Final

from pydantic import ValidationError

from broker.session.base import Session
from capability_schemas.admin import AdminRequest
from capability_schemas.capability import CatalogRecord
from capability_schemas.errors import InvalidTask, NotFound
from capability_schemas.ids import check_identifier, is_identifier
from capability_schemas.invocation import Control
from capability_schemas.task import FunctionRef, Task
from capability_schemas.topics import TopicKind, Topics
from capability_schemas.wire import encode, first_problem
from router.catalogue import Fleet, NodeView
from router.dispatch import Dispatcher
from router.ledger import Ledger
from router.routing import TaskRouting, Wanted
from router.statistics import RouterStats

Answer = dict[str, Any]
_EXPLAIN_CLIENT: Final = "explain"


class AdminDesk:
    """Answers administrators: who may ask is settled by the broker's access table.

    Args:
        session: Sends orders to nodes.
        topics: Topic grammar of the site.
        fleet: Nodes and records.
        routing: Explains choices.
        dispatcher: Live tasks.
        ledger: Stored decisions and cordons.
        stats: Counters.
        router_id: This router.
        clock: UTC milliseconds.
    """

    def __init__(
        self,
        *,
        session: Session,
        topics: Topics,
        fleet: Fleet,
        routing: TaskRouting,
        dispatcher: Dispatcher,
        ledger: Ledger,
        stats: RouterStats,
        router_id: str,
        clock: Callable[[], int],
    ) -> None:
        self._session = session
        self._topics = topics
        self._fleet = fleet
        self._routing = routing
        self._dispatcher = dispatcher
        self._ledger = ledger
        self._stats = stats
        self._router_id = router_id
        self._clock = clock
        self._started_at = clock()
        self._verbs: dict[str, Callable[[dict[str, Any]], Awaitable[Answer]]] = {
            "nodes": self._nodes,
            "functions": self._functions,
            "explain": self._explain,
            "stats": self._statistics,
            "task": self._task,
            "cordon": self._cordon,
            "uncordon": self._uncordon,
            "drain": self._drain,
            "undrain": self._undrain,
        }

    async def answer(self, request: AdminRequest) -> Answer:
        """Answer one request.

        Raises:
            InvalidTask: Unknown verb or argument.
            NotFound: The node or task is not known.
            Overloaded: The ledger or the outbox is full.
        """
        verb = self._verbs.get(request.verb)
        if verb is None:
            raise InvalidTask(
                f"unknown verb {request.verb!r}: use one of {', '.join(self._verbs)}", field="verb"
            )
        return await verb(request.args)

    async def _nodes(self, args: dict[str, Any]) -> Answer:
        _only(args)
        return {"nodes": [self._describe_node(view) for view in self._fleet.nodes.values()]}

    async def _functions(self, args: dict[str, Any]) -> Answer:
        _only(args)
        now = self._clock()
        records = sorted(self._fleet.records.values(), key=lambda record: record.key)
        return {"functions": [self._describe_function(record, now) for record in records]}

    async def _explain(self, args: dict[str, Any]) -> Answer:
        """Choose for a task without running it, or tell how one was chosen for.

        The first for ``{"text": …}`` or ``{"task": {…}}``, the second for ``{"task": id}``, with
        ``client`` where several have used that id.
        """
        _only(args, "text", "task", "client")
        fields = args.get("task", {"text": args.get("text")})
        if isinstance(fields, str):
            return await self._task({"id": fields, "client": args.get("client")})
        try:
            task = Task.model_validate(fields)
        except ValidationError as exc:
            field, problem = first_problem(exc)
            raise InvalidTask(f"{field}: {problem}" if field else problem, field=field) from exc
        now = self._clock()
        wanted = Wanted(
            client=_EXPLAIN_CLIENT,
            task=task,
            function=FunctionRef.parse(task.function) if task.function else None,
            deadline=now + task.timeout_ms,
        )
        vector = await self._routing.embed(wanted)
        return self._routing.select(wanted, vector, self._clock()).explanation

    async def _statistics(self, args: dict[str, Any]) -> Answer:
        _only(args)
        views = self._fleet.nodes.values()
        return {
            "router": self._router_id,
            "uptime_ms": self._clock() - self._started_at,
            "live": len(self._dispatcher),
            "nodes": sum(view.live for view in views),
            "functions": len(self._fleet.records),
            "threshold": round(self._routing.threshold, 4),
            "ledger": {"pending": self._ledger.pending, "failing": self._ledger.failing},
            **self._stats.describe(),
        }

    async def _task(self, args: dict[str, Any]) -> Answer:
        """Tell what is known of a task, with the stored decision."""
        _only(args, "id", "client")
        task_id, client = args.get("id"), args.get("client")
        if not is_identifier(task_id) or not (client is None or is_identifier(client)):
            raise InvalidTask("the verb task takes id, and client where it is known", field="id")
        found = await self._ledger.explanation(str(task_id), client)
        if found is None:
            raise NotFound(f"task {task_id} is not known here", task=task_id)
        entry, explanation = found
        live = self._dispatcher.live(entry.key)
        return {
            "task": entry.task_id,
            "client": entry.client,
            "phase": live.machine.phase.value if live else "ended",
            "outcome": None if live else (entry.code or "result"),
            "node": entry.node,
            "function": entry.function,
            "version": entry.version,
            "attempt": entry.attempt,
            "accepted_at": entry.accepted_at,
            "deadline": entry.deadline,
            "ended_at": entry.ended_at,
            "explanation": explanation,
        }

    async def _cordon(self, args: dict[str, Any]) -> Answer:
        return await self._set_cordon(args, closed=True)

    async def _uncordon(self, args: dict[str, Any]) -> Answer:
        return await self._set_cordon(args, closed=False)

    async def _set_cordon(self, args: dict[str, Any], *, closed: bool) -> Answer:
        node = self._known_node(args)
        await self._ledger.set_cordon(node, closed=closed)
        self._fleet.cordon([node], closed=closed)
        return {"node": node, "cordoned": closed}

    async def _drain(self, args: dict[str, Any]) -> Answer:
        node = self._known_node(args)
        self._order(node, Control(verb="drain", reason="administrator", sender=self._router_id))
        return {"node": node, "ordered": "drain", "assigned": self._fleet.node(node).assigned}

    async def _undrain(self, args: dict[str, Any]) -> Answer:
        node = self._known_node(args)
        self._order(node, Control(verb="undrain", reason="administrator", sender=self._router_id))
        return {"node": node, "ordered": "undrain"}

    def _order(self, node: str, control: Control) -> None:
        self._session.post(self._topics.build(TopicKind.CONTROL, node=node), encode(control))

    def _known_node(self, args: dict[str, Any]) -> str:
        _only(args, "node")
        node = check_identifier(args.get("node", ""), "node")
        if node not in self._fleet.nodes:
            raise NotFound(f"node {node} is not known here", node=node)
        return node

    def _describe_node(self, view: NodeView) -> Answer:
        load = view.load
        return {
            "node": view.node,
            "state": view.presence,
            "live": view.live,
            "silent": view.silent,
            "cordoned": view.cordoned,
            "epoch": view.epoch,
            "reason": view.reason,
            "seen_ms_ago": self._clock() - view.seen_at if view.seen_at else None,
            "assigned": view.assigned,
            "load": load.model_dump(exclude={"v", "node", "epoch"}) if load else None,
            "functions": sorted(name for node, name in self._fleet.records if node == view.node),
        }

    def _describe_function(self, record: CatalogRecord, now: int) -> Answer:
        view = self._fleet.node(record.node)
        current = record.expires_at is None or record.expires_at > now
        return {
            "node": record.node,
            "function": record.function,
            "version": record.version,
            "description": record.description,
            "examples": len(record.examples),
            "skills": list(record.skills),
            "live": view.live and view.open and current,
            "searchable": record.embedding is not None,
            "cost": record.cost.money,
            "zones": list(record.policy.zones),
            "model": record.model.name if record.model else None,
            "load": view.function(record.function).model_dump(),
        }


def _only(args: dict[str, Any], *allowed: str) -> None:
    """Refuse arguments a verb does not have, so that a typing error is heard of."""
    unknown = sorted(set(args) - set(allowed))
    if unknown:
        takes = ", ".join(allowed) or "none"
        raise InvalidTask(
            f"unknown argument {unknown[0]!r}; this verb takes: {takes}", field="args"
        )
