"""Records follow the rights of their nodes: a zone, grant or class of data that comes or goes.

And they go with them: what a node claimed is withdrawn once it is no member any more.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Container
from typing import Final

import structlog

from capability_schemas.capability import CapabilityClaim, CapabilityPolicy
from capability_schemas.errors import Overloaded, Unavailable
from capability_schemas.signing import SigningKey, sign
from registry.admission import Identities, Key, attested_policy
from registry.catalog import Catalog
from registry.leadership import Lead
from registry.publisher import CatalogPublisher
from registry.store import Change, SqliteStore

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)
_ATTESTED: Final = ("zones", "data", "grants")


class RecordRights:
    """Remembers what claims wish for, and writes records anew when they are granted otherwise.

    Owned by one event loop.

    Args:
        catalog: what is current.
        pending: keys that are about to be admitted anew anyway.
        identities: looks nodes up.
        store: keeps the records.
        publisher: sends them.
        withdraw: takes a record and its claim out, for a reason.
        key: signs them.
        registry_id: whose key that is.
        counts: counters of the registry.
        clock: UTC milliseconds.
        lead: whether the registry leads.
    """

    def __init__(
        self,
        *,
        catalog: Catalog,
        pending: Container[Key],
        identities: Identities,
        store: SqliteStore,
        publisher: CatalogPublisher,
        withdraw: Callable[[Key, Change, str], None],
        key: SigningKey,
        registry_id: str,
        counts: Counter[str],
        clock: Callable[[], int],
        lead: Lead,
    ) -> None:
        self._lead = lead
        self._catalog = catalog
        self._pending = pending
        self._identities = identities
        self._store = store
        self._publisher = publisher
        self._withdraw = withdraw
        self._key = key
        self._registry_id = registry_id
        self._counts = counts
        self._clock = clock
        self._wishes: dict[Key, CapabilityPolicy] = {}
        self._doubtful_nodes: set[str] = set()
        self._doubtful: set[Key] = set()
        self._wake = asyncio.Event()

    def now(self, node: str, wished: CapabilityPolicy, known: CapabilityPolicy) -> CapabilityPolicy:
        """Return what is attested at this moment.

        Args:
            node: the node.
            wished: what its claim asks for.
            known: what was attested before; stays when the node is not on record any more, until
                what it claimed is withdrawn.
        """
        identity = self._identities(node)
        return known if identity is None else attested_policy(wished, identity)

    def wished(self, claim: CapabilityClaim) -> None:
        """Remember what a claim that is admitted wishes for."""
        self._wishes[claim.key] = claim.policy

    def heard_again(self, claim: CapabilityClaim) -> None:
        """Have the record written anew when its claim would get more now.

        What it would get less is left to ``look_at``: right after a start nothing is known yet of
        what its node has shown.
        """
        self.wished(claim)
        record = self._catalog.record(claim.key)
        if record is None:
            return
        policy = self.now(claim.node, claim.policy, record.policy)
        if any(
            set(getattr(policy, name)) - set(getattr(record.policy, name)) for name in _ATTESTED
        ):
            self._doubtful.add(claim.key)
            self._wake.set()

    def forget(self, key: Key) -> None:
        """A claim was withdrawn."""
        self._wishes.pop(key, None)

    def look_at(self, node: str) -> None:
        """Have the records of a node written anew, as far as its rights are others now.

        They are withdrawn when it is no member.
        """
        self._doubtful_nodes.add(node)
        self._wake.set()

    def look_whether_member(self, node: str) -> None:
        """Have the records of a node withdrawn if it is no member; unlike ``look_at`` at any time.

        Args:
            node: anybody's name.
        """
        if self._identities(node) is None:
            self.look_at(node)

    async def follow(self) -> None:
        """Write records anew until cancelled; starts with those of nodes that left meanwhile."""
        await self._lead.until()
        for node in {record.node for record in self._catalog.records()}:
            self.look_whether_member(node)
        while True:
            await self._wake.wait()
            await self._lead.until()
            self._wake.clear()
            nodes, keys = self._doubtful_nodes, self._doubtful
            self._doubtful_nodes, self._doubtful = set(), set()
            keys.update(record.key for record in self._catalog.records() if record.node in nodes)
            keys.update(key for key in self._wishes if key[0] in nodes)  # those not yet embedded
            for key in sorted(keys):
                if self._identities(key[0]) is None:
                    self._withdraw(key, Change.WITHDRAWN, "its node is no member any more")
                elif key not in self._pending:
                    await self._renew(key)

    async def _renew(self, key: Key) -> None:
        record = self._catalog.record(key)
        if record is None:
            return
        policy = self.now(key[0], self._wishes.get(key, record.policy), record.policy)
        if policy == record.policy:
            return
        now = self._clock()
        change = {
            "policy": policy,
            "admitted_at": now,
            "registry": self._registry_id,
            "term": self._lead.term,
        }
        made = sign(record.model_copy(update=change), self._key)
        # What is taken away goes at once, kept or not: a restart would take it away again.
        self._catalog.replace(made)
        self._publisher.announce(key)
        self._counts["rights_changed"] += 1
        _log.info("registry.rights_changed", node=key[0], function=key[1])
        self._publisher.emit("rights_changed", key, {"policy": policy.model_dump(mode="json")})
        try:
            await self._store.put(made, at=now, entry=None)
        except (Unavailable, Overloaded) as exc:
            _log.warning(
                "registry.rights_not_kept", node=key[0], function=key[1], error=exc.message
            )
