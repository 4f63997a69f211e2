"""One identity's connection to the mesh.

``Session`` (``broker.session.base``) is what everything else is written against: publish, post,
subscribe, announce. ``MqttSession`` carries it over MQTT 3.1.1 or 5 and repairs itself;
``MemorySession`` is the double for tests. Import ``MqttSession`` from ``broker.session.mqtt`` and
the double from ``broker.session.memory``, so that a process loads only what it uses.

::

    settings = SessionSettings(urls=("mqtt://127.0.0.1:1883",), client_id="edge-1")
    async with MqttSession(settings=settings) as session:
        await session.subscribe("foam/v1/local/invoke/edge-1", on_invocation)
        session.announce("foam/v1/local/node/edge-1/state", make_birth)
        await session.wait_connected(timeout_s=10)
"""

from broker.session.base import Message, Session, SessionStats, Subscription, Will
from broker.session.settings import BrokerUrl, SessionSettings
from broker.tls import TlsSettings

__all__ = [
    "BrokerUrl",
    "Message",
    "Session",
    "SessionSettings",
    "SessionStats",
    "Subscription",
    "TlsSettings",
    "Will",
]
