"""The broker that needs nothing installed: amqtt 0.12.1 in a process of its own, hardened.

Stock amqtt loses acknowledged messages, lets a stranger end other people's sessions and never
notices a dead client. ``hardened.HardenedBroker`` keeps its configuration, listeners, packet codec
and session objects, and replaces what is wrong with them, one commented override per defect; the
delivery path is ours, and several times faster:

- ``routing.SubscriptionTree``: which sessions get a topic, in time that does not grow with the
  number of filters;
- ``outbox.Outbox``: what waits for one session, bounded, in order, redelivered when unacknowledged;
- ``stream``: framing with a size limit, and writes gathered per loop turn;
- ``listener.Listener`` and ``crowd.Crowd``: who may connect, and who makes room when it is full;
- ``websocket``: the same streams with frames around them;
- ``connection.Connection``: one client's packets, in order, without a task per packet;
- ``gate.Gate``: passwords and the access table;
- ``store.BrokerStore``: what outlives the process.

``engine.EmbeddedBroker`` runs it as a child (``python -m broker.embedded``). Retained messages are
kept over the end of the process, and so are the wills of those who were connected: they are
published when their clients do not come back. Sessions live in memory and end with it, which the
mesh is made for (births are published again on every connect, answers are from end to end).
MQTT 3.1.1 over TCP and WebSocket, with TLS or without; one process serves some hundred clients.
"""

from broker.embedded.engine import EmbeddedBroker

__all__ = ["EmbeddedBroker"]
