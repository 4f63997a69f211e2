"""What the registry holds at the moment, and when it lets go of it. Pure.

A record leaves the catalogue when its node withdraws it, when its lease ends, or when it has become
a ghost: after a connection, or a new start of its node, its claim was not heard again within a
grace. That a node is offline does not remove it: liveness is the router's business, and a node may
be back within its lease.
"""

from collections.abc import Iterable
from typing import NamedTuple

from capability_schemas.capability import CatalogRecord
from registry.admission import Key, Standing
from registry.leases import LeaseTable


class Lapse(NamedTuple):
    """A record that is due to go.

    Attributes:
        key: ``(node, function)``.
        reason: why, in words.
    """

    key: Key
    reason: str


class Catalog:
    """Current records, the order last heard of every key, leases and graces."""

    def __init__(self) -> None:
        self._records: dict[Key, CatalogRecord] = {}
        self._standings: dict[Key, Standing] = {}
        self._leases: LeaseTable[Key] = LeaseTable()
        self._graces: LeaseTable[Key] = LeaseTable()
        self._doubted: set[Key] = set()
        self._epochs: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._records)

    def __contains__(self, key: object) -> bool:
        return key in self._records

    def records(self) -> Iterable[CatalogRecord]:
        """The current records."""
        return self._records.values()

    def record(self, key: Key) -> CatalogRecord | None:
        """The current record of a key."""
        return self._records.get(key)

    def standing(self, key: Key) -> Standing | None:
        """What was last heard of a key, withdrawn ones included."""
        return self._standings.get(key)

    def restore(self, record: CatalogRecord, *, withdrawn: bool) -> None:
        """Take over what the store remembers; current records are doubted until heard again."""
        key = record.key
        self._standings[key] = Standing(record.order, record.claim_digest, withdrawn)
        if not withdrawn:
            self._records[key] = record
            self._leases.grant(key, record.expires_at)
            self._doubted.add(key)

    def admit(self, record: CatalogRecord, *, grace_until: int) -> None:
        """Make a record the current one.

        Args:
            record: the record.
            grace_until: end of the grace of a record whose node has started anew since, UTC
                milliseconds.
        """
        key = record.key
        self._records[key] = record
        self._standings[key] = Standing(record.order, record.claim_digest)
        self._leases.grant(key, record.expires_at)
        self.confirm(key)
        if record.epoch < self._epochs.get(record.node, 0):
            self._graces.grant(key, grace_until)

    def replace(self, record: CatalogRecord) -> None:
        """Put a record of the same claim in the place of the current one; leases go on."""
        if record.key in self._records:
            self._records[record.key] = record

    def confirm(self, key: Key) -> None:
        """The claim of a current record was heard again."""
        self._doubted.discard(key)
        self._graces.release(key)

    def withdraw(self, key: Key) -> CatalogRecord | None:
        """Take a record out; its order still counts against old claims.

        Returns:
            The record, or None when there was none.
        """
        record = self._records.pop(key, None)
        if record is None:
            return None
        self._standings[key] = Standing(record.order, record.claim_digest, withdrawn=True)
        self._leases.release(key)
        self.confirm(key)
        return record

    def forget(self, key: Key) -> None:
        """Drop a withdrawn key with its order."""
        if key not in self._records:
            self._standings.pop(key, None)

    def doubt_all(self) -> None:
        """The connection is lost: what is withdrawn meanwhile will not be heard of."""
        self._doubted.update(self._records)

    def start_grace(self, until: int) -> None:
        """The connection is back: every doubted claim has to be heard again by then.

        Args:
            until: UTC milliseconds.
        """
        for key in self._doubted:
            self._graces.grant(key, until)
        self._doubted.clear()

    def node_started(self, node: str, epoch: int, *, grace_until: int) -> None:
        """A node was born: records of its earlier lives have to be claimed again.

        Args:
            node: the node.
            epoch: of its birth; an older one than the newest heard says nothing.
            grace_until: UTC milliseconds.
        """
        if epoch <= self._epochs.get(node, 0):
            return
        self._epochs[node] = epoch
        for key, record in self._records.items():
            if record.node == node and record.epoch < epoch:
                self._graces.grant(key, grace_until)

    def due(self, now: int) -> list[Lapse]:
        """What has to go now; each is named once.

        Args:
            now: UTC milliseconds.
        """
        ended = [Lapse(key, "its lease ended") for key in self._leases.expire(now)]
        ghosts = [Lapse(key, "its claim was not heard again") for key in self._graces.expire(now)]
        named: set[Key] = set()
        lapses = []
        for lapse in (*ended, *ghosts):
            if lapse.key in self._records and lapse.key not in named:
                named.add(lapse.key)
                lapses.append(lapse)
        return lapses
