"""Administration of a router: each verb a question or an order, answered with JSON."""

from collections.abc import Callable
from itertools import islice
from typing import Any, Final

from capability_schemas.admin import AdminRequest
from capability_schemas.errors import InvalidTask, NotFound
from capability_schemas.ids import check_identifier, is_identifier
from capability_schemas.node import NodeLoad
from router.catalogue import Fleet, Key
from router.dispatch import Dispatcher
from router.ledger import Ledger
from router.meaning import Meaning
from router.orders import OrderDesk
from router.ownership import RouterBook
from router.quota import Quotas
from router.statistics import RouterStats
from router.steering import SteeringDesk
from router.verbs import Answer, Verb, key_page, name_page, named_keys, only, word

_FUNCTIONS_SHOWN: Final = 256


class AdminDesk:
    """Answers administrators and operators; who may order what is settled before.

    Args:
        orders: Tells nodes what to do.
        fleet: Nodes and records.
        meaning: Knows the threshold.
        dispatcher: Live tasks.
        ledger: Stored decisions and cordons.
        stats: Counters.
        steering: Answers what is asked of decisions.
        book: The routers of the site.
        quotas: What each client may have, and uses.
        router_id: This router.
        clock: UTC milliseconds.
    """

    def __init__(
        self,
        *,
        orders: OrderDesk,
        fleet: Fleet,
        meaning: Meaning,
        dispatcher: Dispatcher,
        ledger: Ledger,
        stats: RouterStats,
        steering: SteeringDesk,
        book: RouterBook,
        quotas: Quotas,
        router_id: str,
        clock: Callable[[], int],
    ) -> None:
        self._orders = orders
        self._fleet = fleet
        self._meaning = meaning
        self._dispatcher = dispatcher
        self._ledger = ledger
        self._stats = stats
        self._steering = steering
        self._book = book
        self._quotas = quotas
        self._router_id = router_id
        self._clock = clock
        self._started_at = clock()
        self._verbs: dict[str, Verb] = {
            "nodes": self._nodes,
            "functions": self._functions,
            "routers": self._routers,
            "stats": self._statistics,
            "quotas": self._show_quotas,
            "waiting": self._show_waiting,
            "task": self._task,
            "cordon": self._cordon,
            "uncordon": self._uncordon,
            "drain": self._drain,
            "undrain": self._undrain,
            "explain": self._explain,
            **steering.verbs,
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
        only(args, "after", "limit")
        return await name_page(sorted(self._fleet.nodes), args, "nodes", self._describe_node)

    async def _routers(self, args: dict[str, Any]) -> Answer:
        """List the routers as this one knows them."""
        only(args)
        now = self._clock()
        own = {"router": self._router_id, "state": "birth", "live": True, "seen_ms_ago": 0}
        others = [
            {
                "router": view.router,
                "state": view.presence,
                "live": view.live,
                "seen_ms_ago": now - view.pulse.seen_at if view.pulse.seen_at else None,
            }
            for view in self._book.others
        ]
        return {"routers": [own, *others], "answered_by": self._router_id}

    async def _functions(self, args: dict[str, Any]) -> Answer:
        only(args, "node", "function", "after", "limit")
        keys = named_keys(self._fleet, args)
        return await key_page(keys, args, "functions", self._describe_function)

    async def _explain(self, args: dict[str, Any]) -> Answer:
        """Choose for a task without running it, or tell how one was chosen for.

        The first for ``{"text": …}`` or ``{"task": {…}}``, the second for ``{"task": id}``, with
        ``client`` where several have used that id.
        """
        if isinstance(args.get("task"), str):
            only(args, "task", "client")
            return await self._task({"id": args["task"], "client": args.get("client")})
        return await self._steering.explain(args)

    async def _statistics(self, args: dict[str, Any]) -> Answer:
        only(args)
        views = self._fleet.nodes.values()
        return {
            "router": self._router_id,
            "uptime_ms": self._clock() - self._started_at,
            "live": len(self._dispatcher),
            "waiting": len(self._dispatcher.usher.room),
            "nodes": sum(view.live for view in views),
            "asleep": sum(view.asleep for view in views),
            "functions": len(self._fleet.records),
            "threshold": round(self._meaning.search.threshold, 4),
            "ledger": {"pending": self._ledger.pending, "failing": self._ledger.failing},
            **self._stats.describe(),
        }

    async def _task(self, args: dict[str, Any]) -> Answer:
        """Tell what is known of a task, with the stored decision."""
        only(args, "id", "client")
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

    async def _show_quotas(self, args: dict[str, Any]) -> Answer:
        """Tell limits and use: of ``client``, or of those heard of last."""
        only(args, "client")
        client = word(args, "client")
        return self._quotas.describe(None if client is None else check_identifier(client, "client"))

    async def _show_waiting(self, args: dict[str, Any]) -> Answer:
        """Tell which tasks wait for a node with room: by function, client and priority."""
        only(args)
        return self._dispatcher.usher.describe()

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
        self._orders.control(node, "drain", reason="administrator")
        return {"node": node, "ordered": "drain", "assigned": self._fleet.node(node).assigned}

    async def _undrain(self, args: dict[str, Any]) -> Answer:
        node = self._known_node(args)
        self._orders.control(node, "undrain", reason="administrator")
        return {"node": node, "ordered": "undrain"}

    def _known_node(self, args: dict[str, Any]) -> str:
        only(args, "node")
        node = check_identifier(args.get("node", ""), "node")
        if node not in self._fleet.nodes:
            raise NotFound(f"node {node} is not known here", node=node)
        return node

    def _describe_node(self, node: str) -> Answer:
        view = self._fleet.node(node)
        load, functions = view.load, self._fleet.functions(node)
        return {
            "node": view.node,
            "state": view.presence,
            "live": view.live,
            "silent": view.silent,
            "asleep": view.asleep,
            "wake_at": view.wake_at,
            "revoked": view.revoked,
            "cordoned": view.cordoned,
            "epoch": view.epoch,
            "reason": view.reason,
            "seen_ms_ago": self._clock() - view.pulse.seen_at if view.pulse.seen_at else None,
            "assigned": view.assigned,
            "load": _describe_load(load) if load else None,
            "functions": functions[:_FUNCTIONS_SHOWN],
            "degraded": [name for name in functions if view.function(name).degraded],
            "more_functions": max(0, len(functions) - _FUNCTIONS_SHOWN),
        }

    def _describe_function(self, key: Key) -> Answer | None:
        record = self._fleet.records.get(key)
        if record is None:
            return None
        view = self._fleet.node(record.node)
        current = record.expires_at is None or record.expires_at > self._clock()
        return {
            "node": record.node,
            "function": record.function,
            "version": record.version,
            "description": record.description,
            "examples": len(record.examples),
            "skills": list(record.skills),
            "live": view.live and view.open and current,
            "wake_at": view.wake_at,
            "searchable": record.space is not None,
            "cost": record.cost.money,
            "zones": list(record.policy.zones),
            "model": record.model.name if record.model else None,
            "load": view.function(record.function).model_dump(),
        }


def _describe_load(load: NodeLoad) -> Answer:
    shown = islice(load.functions.items(), _FUNCTIONS_SHOWN)
    return {
        **load.model_dump(exclude={"v", "node", "epoch", "functions"}),
        "functions": {name: figures.model_dump() for name, figures in shown},
    }
