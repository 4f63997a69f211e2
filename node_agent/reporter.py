"""What routers hear from a node about their invocations."""

import structlog

from broker.session.base import Session
from capability_schemas.errors import FoamError
from capability_schemas.invocation import Invocation, Report
from capability_schemas.topics import TopicKind, Topics
from capability_schemas.wire import encode
from node_agent.invocation import Named, Outcome

_REASON_CHARACTERS = 1000

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class Reporter:
    """Sends reports, and terminal events a second time; owned by the agent's event loop.

    Args:
        session: The node's session.
        topics: The site's topics.
        node: The node.
    """

    def __init__(self, *, session: Session, topics: Topics, node: str) -> None:
        self._session = session
        self._topics = topics
        self._node = node

    def admitted(self, invocation: Invocation, *, wait_ms: float) -> None:
        """Tell the router that it will run.

        Args:
            invocation: What it asked for.
            wait_ms: Predicted wait, milliseconds.
        """
        self._send(
            invocation,
            Report(
                task=invocation.task,
                client=invocation.client,
                attempt=invocation.attempt,
                node=self._node,
                status="admitted",
                queue_ms=round(wait_ms, 3),
            ),
        )

    def ended(self, invocation: Named, outcome: Outcome) -> None:
        """Tell the router how it ended; nothing for an outcome that nobody is told."""
        handed_over = outcome.status in ("unsure", "held")
        if outcome.status == "dropped" or (handed_over and outcome.payload):
            return  # the answer itself was the report
        self._send(
            invocation,
            Report(
                task=invocation.task,
                client=invocation.client,
                attempt=invocation.attempt,
                node=self._node,
                # An answer that is no longer kept cannot be told again.
                status="failed" if handed_over else outcome.status,
                code=outcome.code,
                reason=outcome.reason[:_REASON_CHARACTERS],
                retry_after_ms=outcome.retry_after_ms,
                peer=outcome.peer,
                seq=outcome.seq,
            ),
        )

    def repeat(self, invocation: Named, outcome: Outcome) -> None:
        """Say again how an attempt ended: what held its answer, and the report."""
        if outcome.payload is not None:
            handed_over = outcome.status in ("unsure", "held")
            self._post(self.topic(invocation) if handed_over else outcome.reply, outcome.payload)
        self.ended(invocation, outcome)

    def stands(self, asked: Named, *, seq: int | None) -> None:
        """Tell a router that asks for an attempt which has not ended here.

        Args:
            asked: The attempt.
            seq: Next number of a run that goes on; None: nothing is known of it.
        """
        self._send(
            asked,
            Report(
                task=asked.task,
                client=asked.client,
                attempt=asked.attempt,
                node=self._node,
                status="unknown" if seq is None else "running",
                seq=seq,
            ),
        )

    def _send(self, invocation: Named, report: Report) -> None:
        self._post(self.topic(invocation), encode(report))

    def topic(self, invocation: Named) -> str:
        """Return the topic of the reports on an invocation."""
        return self._topics.build(TopicKind.REPORT, router=invocation.router, node=self._node)

    def _post(self, topic: str, payload: bytes) -> None:
        try:
            self._session.post(topic, payload)
        except FoamError as exc:  # no room or no session: the router's own time limit must do
            _log.warning("report.unsent", topic=topic, error=exc.message)
