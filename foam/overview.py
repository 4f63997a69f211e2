"""Who is there, at one glance: brokers, routers, registries, nodes, tasks, and what is wrong.

Everything is asked at the same time, once, for a few seconds. What could not be found out is said,
and is no reason to hold back the rest.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Container, Mapping
from typing import TYPE_CHECKING, Any, Final

from capability_schemas.errors import FoamError
from capability_schemas.node import LOST

if TYPE_CHECKING:
    from broker.session.settings import BrokerUrl
    from foam.sdk.client import MeshClient

__all__ = ["look_at", "node_condition"]

_ANSWER_S: Final = 4.0
_SPARE_S: Final = 1.0
_LISTEN_S: Final = 1.5
_REACH_S: Final = 1.0
_NAMED: Final = 5
"""So many of those with the same trouble are named."""

_AWAY: Final = {"lost": "lost", "silent": "silent", "did not wake": "overdue: should be awake"}

Row = Mapping[str, Any]


def node_condition(row: Row) -> str:
    """Say in a word how a node is.

    Args:
        row: What a router answers about it to ``nodes``.

    Returns:
        ``ready``, ``cordoned``, ``draining``, ``asleep``, ``did not wake``, ``silent``, ``lost``
        (its connection was), ``offline`` (it said goodbye), ``revoked``.
    """
    state = str(row.get("state", ""))
    if row.get("revoked"):
        return "revoked"
    if row.get("asleep"):
        return "asleep"
    if not row.get("live") and state in {"birth", "sleeping"}:
        return "silent" if state == "birth" else "did not wake"
    if state == "offline":
        return "lost" if row.get("reason") == LOST else "offline"
    if row.get("cordoned"):
        return "cordoned"
    return "ready" if state == "birth" else state


async def look_at(mesh: "MeshClient") -> dict[str, Any]:
    """Ask everybody who can tell; takes as long as the slowest answer, some five seconds at most.

    Args:
        mesh: A connected client that is an administrator or operator.

    Returns:
        JSON: ``site``; ``brokers``, ``routers``, ``registries``, ``nodes``, each a list of objects
        with ``state`` (empty where it is ``unknown``); ``tasks`` with ``running`` and ``waiting``,
        None where nobody told; ``warnings`` and ``unknown``: sentences.
    """
    found: dict[str, Any] = {}
    unknown: list[str] = []

    async def find(what: str, ask: Callable[[], Awaitable[Any]]) -> None:
        try:
            async with asyncio.timeout(_ANSWER_S + _SPARE_S):
                found[what] = await ask()
        except FoamError as error:
            unknown.append(f"{what}: {error.message}")
        except TimeoutError:  # one router after the other was asked
            unknown.append(f"{what}: nobody answered in {_ANSWER_S + _SPARE_S:g} s")

    async with asyncio.TaskGroup() as group:
        for what, ask in (
            ("brokers", lambda: _brokers(mesh)),
            ("routers", mesh.routers),
            ("registries", lambda: mesh.registries.states(wait_s=_LISTEN_S)),
            ("nodes", lambda: mesh.admin_pages("nodes", timeout_s=_ANSWER_S)),
            ("tasks", lambda: mesh.admin_all("stats", timeout_s=_ANSWER_S)),
        ):
            group.create_task(find(what, ask), name=f"foam.overview.{what}")
    routers = found.get("routers", ())
    answers = found.get("tasks")
    stats: Mapping[str, Row] = answers.given if answers is not None else {}
    silent = [state.router for state, _ in routers] if answers is None else answers.silent
    nodes = found.get("nodes", {}).get("nodes", ())
    told: dict[str, Any] = {
        "site": mesh.address.site,
        "brokers": found.get("brokers", []),
        "routers": [
            _router(state.router, state.state, live, stats, silent) for state, live in routers
        ],
        "registries": [_registry(state) for state in found.get("registries", ())],
        "nodes": [_node(row) for row in nodes],
        "tasks": _tasks(stats) if stats else None,
    }
    return {**told, "warnings": _warnings(told, stats), "unknown": sorted(unknown)}


async def _brokers(mesh: "MeshClient") -> list[dict[str, str]]:
    states = dict.fromkeys((str(url.anonymous) for url in mesh.address.urls), "does not answer")

    async def reach(url: "BrokerUrl") -> None:
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(_REACH_S):
                _, writer = await asyncio.open_connection(url.host, url.port)
            writer.close()
            states[str(url.anonymous)] = "answers"

    async with asyncio.TaskGroup() as group:
        for url in mesh.address.urls:
            if str(url.anonymous) != mesh.broker:
                group.create_task(reach(url), name=f"foam.overview.reach[{url.host}:{url.port}]")
    if mesh.broker in states:
        states[mesh.broker] = "in use"
    return [{"broker": url, "state": state} for url, state in states.items()]


def _router(
    router: str, said: str, live: bool, stats: Mapping[str, Row], silent: Container[str]
) -> dict[str, Any]:
    own = stats.get(router, {})
    state = "ready" if said == "birth" else said
    if state == "ready" and not live:
        state = "silent"
    elif live and router in silent:
        state = "does not answer"
    return {
        "router": router,
        "state": state,
        "live": live,
        "tasks": own.get("live"),
        "waiting": own.get("waiting"),
    }


def _registry(state: Any) -> dict[str, Any]:
    said = "leads" if state.leads else "follows"
    if state.state != "birth" or state.reason:
        said = "silent" if state.reason == "silent" else str(state.state)
    return {"registry": state.registry, "state": said, "leads": said == "leads"}


def _node(row: Row) -> dict[str, Any]:
    load = row.get("load") or {}
    return {
        "node": row["node"],
        "state": node_condition(row),
        "running": load.get("running"),
        "queued": load.get("queued"),
        "wake_at": row.get("wake_at"),
        "degraded": list(row.get("degraded", ())),
    }


def _tasks(stats: Mapping[str, Row]) -> dict[str, int]:
    waiting = sum(one["waiting"] for one in stats.values())
    return {"running": sum(one["live"] for one in stats.values()) - waiting, "waiting": waiting}


def _warnings(told: Mapping[str, Any], stats: Mapping[str, Row]) -> list[str]:
    brokers, routers, registries = told["brokers"], told["routers"], told["registries"]
    warnings = [
        f"the broker {one['broker']} does not answer"
        for one in brokers
        if one["state"] == "does not answer"
    ]
    if not any(one["live"] for one in routers):
        warnings.append("no router lives: tasks wait, or go to nodes that are named")
    warnings += [_is(one["router"], one["state"]) for one in routers if one["state"] != "ready"]
    if not any(one["leads"] for one in registries):
        warnings.append("no registry leads: nobody can join, and new functions wait")
    warnings += [
        _is(one["registry"], one["state"])
        for one in registries
        if one["state"] not in {"leads", "follows"}
    ]
    for condition, words in _AWAY.items():
        away = [one["node"] for one in told["nodes"] if one["state"] == condition]
        if away:
            warnings.append(f"{words}: {_some(away)}")
    degraded = [f"{one['node']}/{name}" for one in told["nodes"] for name in one["degraded"]]
    if degraded:
        warnings.append(f"crashes in a row: {_some(degraded)}")
    warnings += [
        f"{router} cannot write its journal: is the disk full?"
        for router, one in stats.items()
        if one.get("ledger", {}).get("failing")
    ]
    return warnings


def _is(who: str, state: str) -> str:
    return f"{who} {state}" if " " in state else f"{who} is {state}"


def _some(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
