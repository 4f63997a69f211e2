"""Steering of decisions: what is chosen and why, what would be, and the levers to change it.

A lever moved over ``admin/{router}`` holds at once. Weights outlive the router, for they were set
by a person who may not be there when it starts anew; rules and encoder are given by file and
setting.
"""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import structlog
from pydantic import ValidationError

from broker.events import EventSource
from capability_schemas.errors import ConfigurationError, FoamError, InvalidTask
from capability_schemas.ids import check_identifier
from capability_schemas.task import FunctionRef, Task
from capability_schemas.wire import first_problem
from router.breaker import Breakers
from router.catalogue import Fleet, Key
from router.ledger import Ledger
from router.meaning import Meaning
from router.reputation import Reputation
from router.routing import TaskRouting, Wanted
from router.rules import RuleFile
from router.settings import Weights
from router.verbs import Answer, Verb, flag, key_page, named_keys, only, whole, word
from router.whatif import Supposition

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

_ASKER: Final = "explain"
_CANDIDATES: Final = 64
_LOADING_S: Final = 5.0
_WEIGHTS: Final = "weights"
_REPUTATION: Final = "reputation"
_SHOWN: Final = 500


class SteeringDesk:
    """Explains decisions and changes what they rest on.

    Args:
        fleet: Nodes and records.
        meaning: Encoder and search.
        routing: Makes the decisions.
        reputation: What nodes have done so far.
        breakers: Functions that do not answer.
        ledger: Keeps weights and reputation across restarts.
        events: Where changes are told.
        rules: The file of rules, if there is one.
        default: Weights that hold where nobody has changed them.
        spawn: Runs the change of an encoder in the background.
        clock: UTC milliseconds.
    """

    def __init__(
        self,
        *,
        fleet: Fleet,
        meaning: Meaning,
        routing: TaskRouting,
        reputation: Reputation,
        breakers: Breakers,
        ledger: Ledger,
        events: EventSource,
        rules: RuleFile | None,
        default: Weights,
        spawn: Callable[..., asyncio.Task[FoamError | None]],
        clock: Callable[[], int],
    ) -> None:
        self._fleet = fleet
        self._meaning = meaning
        self._routing = routing
        self._reputation = reputation
        self._breakers = breakers
        self._ledger = ledger
        self._events = events
        self._rules = rules
        self._default = default
        self._spawn = spawn
        self._clock = clock
        self._reading = asyncio.Lock()
        self.verbs: dict[str, Verb] = {
            "whatif": self._whatif,
            "weights": self._weights,
            "rules": self._show_rules,
            "calibrate": self._calibrate,
            "encoder": self._encoder,
            "reputation": self._show_reputation,
        }

    # ---- what outlives the router

    async def restore(self) -> None:
        """Take up the weights and the reputation of an earlier process."""
        try:
            changes = await self._ledger.memo(_WEIGHTS)
            if changes is not None:
                self._routing.weights = self._default.changed(changes)
        except ConfigurationError as error:  # their range is another one by now
            _log.warning("weights.not_restored", error=error.message)
        try:
            snapshot = await self._ledger.memo(_REPUTATION)
            if snapshot is not None:
                self._reputation.restore(snapshot)
        except ConfigurationError as error:
            _log.warning("reputation.not_restored", error=error.message)

    async def save(self) -> None:
        """Write down the reputation, for the next process.

        Raises:
            Overloaded: The ledger cannot be written.
        """
        if len(self._reputation):
            snapshot = await asyncio.to_thread(self._reputation.snapshotting(self._clock()))
            await self._ledger.set_memo(_REPUTATION, snapshot)

    # ---- explain and what if

    async def explain(self, args: dict[str, Any]) -> Answer:
        """Choose for ``text``, or a whole ``task``, without running it.

        ``client`` tells in whose name: its rules, sessions and tenant count; ``limit`` how many
        candidates. Without it the answer tells in ``apart`` how many offers of tenants were left
        out, where there are any.
        """
        only(args, "text", "task", "client", "limit")
        wanted = self._wanted(args)
        limit = whole(args, "limit", default=_CANDIDATES, most=_CANDIDATES)
        query = await self._routing.embed(wanted)
        told: Answer = self._routing.explain(wanted, query, self._clock(), candidates=limit)
        apart = self._fleet.apart if "client" not in args else 0
        return {**told, "apart": apart} if apart else told

    async def _whatif(self, args: dict[str, Any]) -> Answer:
        """Choose as things are, and as they would be."""
        asked = ("text", "task", "client", "limit")
        only(args, *asked, *Supposition.model_fields)
        wanted = self._wanted(args)
        limit = whole(args, "limit", default=_CANDIDATES, most=_CANDIDATES)
        given = {name: value for name, value in args.items() if name not in asked}
        if not given:
            raise InvalidTask(
                f"nothing is supposed: give one of {', '.join(Supposition.model_fields)}",
                field="args",
            )
        try:
            supposed = Supposition.model_validate(given).check(self._fleet)
        except ValidationError as exc:
            field, problem = first_problem(exc)
            raise InvalidTask(f"{field}: {problem}", field=field) from exc
        _changed(self._routing.weights, supposed.weights)
        query = await self._routing.embed(wanted)
        at = self._clock()
        now = self._routing.explain(wanted, query, at, candidates=limit)
        then = self._routing.explain(wanted, query, at, candidates=limit, supposed=supposed)
        return {"now": now, "then": then, "changed": now["chosen"] != then["chosen"]}

    def _wanted(self, args: dict[str, Any]) -> Wanted:
        try:
            task = Task.model_validate(args.get("task", {"text": args.get("text")}))
        except ValidationError as exc:
            field, problem = first_problem(exc)
            raise InvalidTask(f"{field}: {problem}" if field else problem, field=field) from exc
        client = word(args, "client")
        return Wanted(
            client=_ASKER if client is None else check_identifier(client, "client"),
            task=task,
            function=FunctionRef.parse(task.function) if task.function else None,
            deadline=self._clock() + task.timeout_ms,
        )

    # ---- weights

    async def _weights(self, args: dict[str, Any]) -> Answer:
        """Show the weights; set those given; ``reset`` goes back to the defaults first."""
        only(args, "reset", *Weights.model_fields)
        changes = {name: value for name, value in args.items() if name != "reset"}
        reset = flag(args, "reset")
        if reset or changes:
            weights = _changed(self._default if reset else self._routing.weights, changes)
            kept = _differing(weights, self._default)
            await self._ledger.set_memo(_WEIGHTS, kept or None)
            self._routing.weights = weights
            self._tell(
                "weights_changed", {"weights": weights.model_dump(), "changed": sorted(kept)}
            )
        return self._describe_weights()

    def _describe_weights(self) -> Answer:
        values, defaults = self._routing.weights.model_dump(), self._default.model_dump()
        rows = {}
        for name, shape in Weights.model_json_schema()["properties"].items():
            number = shape.get("anyOf", [shape])[0]
            rows[name] = {
                "value": values[name],
                "default": defaults[name],
                "lowest": number["minimum"],
                "highest": number["maximum"],
            }
        return {
            "weights": rows,
            "changed": sorted(_differing(self._routing.weights, self._default)),
        }

    # ---- rules

    async def follow_rules(self) -> None:
        """Take up an edit of the file of rules, or tell why not; for the sweep."""
        if self._rules is not None and not self._reading.locked():
            await self._look_at_rules(self._rules)

    async def _look_at_rules(self, rules: RuleFile) -> bool:
        async with self._reading:
            known = rules.problem
            changed = await asyncio.to_thread(rules.refresh)
        if changed:
            self._tell("rules_changed", {"file": str(rules.path), "rules": len(rules.book)})
        elif rules.problem is not None and rules.problem != known:
            self._tell("rules_refused", {"file": str(rules.path), "reason": rules.problem})
        return changed

    async def _show_rules(self, args: dict[str, Any]) -> Answer:
        """Show the rules in force; ``reload`` looks at the file now."""
        only(args, "reload")
        reload, rules = flag(args, "reload"), self._rules
        if rules is None:
            if reload:
                raise InvalidTask("this router was started without a file of rules", field="reload")
            return {"file": None, "problem": None, "rules": [], "count": 0}
        changed = False
        if reload:  # an edit counts when the file looks the same twice
            changed = await self._look_at_rules(rules) or await self._look_at_rules(rules)
        told = rules.describe()
        return {
            **told,
            "rules": told["rules"][:_SHOWN],
            "count": len(rules.book),
            **({"changed": changed} if reload else {}),
        }

    # ---- calibration

    async def _calibrate(self, args: dict[str, Any]) -> Answer:
        """Fit threshold and window to the present catalogue, now."""
        only(args)
        await self.calibrate()
        return self._meaning.describe_calibration()

    async def calibrate(self) -> None:
        """Fit to the present catalogue, and tell of it.

        Raises:
            Overloaded: The encoder has too much to do.
        """
        await self._meaning.calibrate()
        self._tell("calibrated", self._meaning.describe_calibration())

    # ---- the encoder

    async def _encoder(self, args: dict[str, Any]) -> Answer:
        """Show which space serves, or have another encoder take over in the background.

        The setting of the router decides again when it starts anew.
        """
        only(args, "backend", "folder")
        if args:
            backend, folder = word(args, "backend"), word(args, "folder")
            if backend is None:
                raise InvalidTask("folder goes with a backend: name it too", field="backend")
            change = self._spawn(
                self._change_encoder(backend, None if folder is None else Path(folder)),
                name="encoder",
            )
            await asyncio.wait({change}, timeout=_LOADING_S)
            error = change.result() if change.done() and not change.cancelled() else None
            if error is not None:
                raise error
        return self._meaning.describe()

    async def _change_encoder(self, backend: str, folder: Path | None) -> FoamError | None:
        """Change the encoder; return why not, for nobody may be waiting any more."""
        asked = {"backend": backend, "folder": None if folder is None else str(folder)}
        try:
            space = await self._meaning.change(backend, folder, self._fleet.records)
        except FoamError as error:
            failure = error
        except Exception as error:  # noqa: BLE001  # supervision boundary: a library of the model
            _log.error("encoder.failed", exc_info=error, **asked)
            failure = ConfigurationError(f"the encoder {backend} failed: {error}")
        else:
            self._tell("encoder_changed", {**asked, "space": space.model_dump()})
            return None
        self._tell("encoder_refused", {**asked, "reason": failure.message})
        return failure

    # ---- reputation

    async def _show_reputation(self, args: dict[str, Any]) -> Answer:
        """Tell what nodes have done so far, by function, and who is left alone."""
        only(args, "node", "function", "after", "limit")
        now = self._clock()

        def describe(key: Key) -> Answer | None:
            record = self._fleet.records.get(key)
            if record is None:
                return None
            belief = self._reputation.belief(*key, now, skills=record.skills)
            return {
                "node": key[0],
                "function": key[1],
                "score": round(belief.mean, 4),
                "good": round(belief.good, 2),
                "bad": round(belief.bad, 2),
                "breaker": self._breakers.blocked(*key, now),
            }

        answer = await key_page(named_keys(self._fleet, args), args, "reputation", describe)
        return {**answer, "prior": round(self._reputation.prior, 4)}

    def _tell(self, kind: str, data: dict[str, Any]) -> None:
        self._events.emit(kind, data, subject="routing")
        _log.info(f"routing.{kind}", **data)


def _changed(weights: Weights, changes: dict[str, Any]) -> Weights:
    try:
        return weights.changed(changes)
    except ConfigurationError as error:  # of the asker's making, not of this router's
        raise InvalidTask(error.message, field=error.detail.get("weight")) from error


def _differing(weights: Weights, default: Weights) -> dict[str, Any]:
    before = default.model_dump()
    return {name: value for name, value in weights.model_dump().items() if value != before[name]}
