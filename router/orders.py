"""What a router orders nodes to do, signed where it has a passport."""

from collections.abc import Callable
from typing import Any, Literal

from broker.session.base import Session
from capability_schemas.errors import NotFound
from capability_schemas.ids import new_uuid7
from capability_schemas.invocation import Control, Invocation
from capability_schemas.provenance import Signer
from capability_schemas.topics import TopicKind, Topics
from capability_schemas.wire import encode
from router.catalogue import Fleet


class OrderDesk:
    """Sends orders to nodes. Owned by the router's event loop.

    Args:
        session: Connection to the mesh.
        topics: Topic grammar of the site.
        fleet: Knows which start of a node is meant.
        router_id: This router.
        signer: Its key and passport; None: orders go out unsigned.
        clock: UTC milliseconds.
    """

    def __init__(
        self,
        *,
        session: Session,
        topics: Topics,
        fleet: Fleet,
        router_id: str,
        signer: Signer | None,
        clock: Callable[[], int],
    ) -> None:
        self._session = session
        self._topics = topics
        self._fleet = fleet
        self._router_id = router_id
        self._signer = signer
        self._clock = clock

    def invoke(self, node: str, invocation: Invocation) -> None:
        """Ask a node to run a function.

        Raises:
            FoamError: The session has no room, or the task cannot be signed.
        """
        named = invocation.model_copy(update={"node": node, "epoch": self._epoch(node)})
        self._send(TopicKind.INVOKE, node, named)

    def control(
        self,
        node: str,
        verb: Literal["cancel", "account", "return", "drain", "undrain"],
        **fields: Any,
    ) -> None:
        """Order something else.

        Args:
            node: Who shall obey.
            verb: What to do.
            fields: Further fields of a ``Control``.

        Raises:
            NotFound: The node has not been heard of, and the order is not to cancel or to account:
                a node obeys no other that does not name its start.
            FoamError: The session has no room.
        """
        epoch = self._epoch(node)
        if epoch is None and verb not in {"cancel", "account"}:
            raise NotFound(
                f"node {node} has not said here that it is there: {verb} it when it has", node=node
            )
        order = Control(
            verb=verb,
            sender=self._router_id,
            node=node,
            epoch=epoch,
            sent_at=self._clock(),
            nonce=new_uuid7(),
            **fields,
        )
        self._send(TopicKind.CONTROL, node, order)

    def _send(self, kind: TopicKind, node: str, order: Invocation | Control) -> None:
        if self._signer is not None:
            order = self._signer.sign(order)
        self._session.post(self._topics.build(kind, node=node), encode(order))

    def _epoch(self, node: str) -> int | None:
        epoch = self._fleet.node(node).epoch
        return epoch if epoch >= 0 else None
