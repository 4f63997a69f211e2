"""Claims that are refused: counted each time, told once."""

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Final

import structlog

from registry.admission import Key, Reason, Refused
from registry.pending import PendingWork
from registry.publisher import CatalogPublisher
from registry.store import Change, HistoryEntry

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

_TOLD_LIMIT: Final = 4_096


class Refusals:
    """Tells log, history and mesh what was refused. Owned by one event loop.

    Args:
        pending: takes lines for the history.
        publisher: tells the mesh.
        counts: counters of the registry.
        clock: UTC milliseconds.
    """

    def __init__(
        self,
        *,
        pending: PendingWork,
        publisher: CatalogPublisher,
        counts: Counter[str],
        clock: Callable[[], int],
    ) -> None:
        self._pending = pending
        self._publisher = publisher
        self._counts = counts
        self._clock = clock
        self._told: OrderedDict[tuple[Key, str, str], None] = OrderedDict()

    def tell(self, key: Key, refused: Refused, payload: bytes) -> None:
        """Count a refusal, and say it once: the same claim comes again with every connection.

        Args:
            key: what was claimed.
            refused: why not.
            payload: the claim as received.
        """
        self._counts["refused"] += 1
        self._counts[f"refused.{refused.reason}"] += 1
        told = (key, refused.reason.value, hashlib.sha256(payload).hexdigest())
        if told in self._told:
            self._told.move_to_end(told)
            return
        self._told[told] = None
        if len(self._told) > _TOLD_LIMIT:
            self._told.popitem(last=False)
        node, function = key
        alarm = refused.reason is Reason.CONFLICT
        write = _log.error if alarm else _log.warning
        write(
            "registry.claim_refused",
            node=node,
            function=function,
            reason=refused.reason.value,
            message=refused.message,
        )
        self._pending.note(
            HistoryEntry(
                node,
                function,
                Change.REFUSED,
                self._clock(),
                f"{refused.reason.value}: {refused.message}",
            )
        )
        self._publisher.emit(
            "claim_refused",
            key,
            {
                "reason": refused.reason.value,
                "message": refused.message,
                "alarm": alarm,
                "detail": refused.detail,
            },
        )
