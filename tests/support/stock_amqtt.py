"""Stock amqtt with our access table as plugins, for showing what the hardened broker mends.

``main`` is the whole of a child process: it reads ``{"credentials": path}`` from standard input,
prints its port, and ends when standard input does.
"""

import asyncio
import json
import sys
from pathlib import Path

from amqtt.broker import Broker
from amqtt.contexts import Action as StockAction
from amqtt.plugins.base import BaseAuthPlugin, BaseTopicPlugin

from broker.access import AccessPolicy, Action, CredentialStore
from capability_schemas.topics import Topics

POLICY = AccessPolicy(Topics())
STORES: list[CredentialStore] = []


class StockAuth(BaseAuthPlugin):  # type: ignore[misc]  # amqtt ships no types
    async def authenticate(self, *, session):
        if session.username is None or session.password is None:
            return False
        found = await asyncio.to_thread(STORES[0].verify, session.username, session.password)
        return found is not None


class StockAcl(BaseTopicPlugin):  # type: ignore[misc]  # amqtt ships no types
    """The table for publishing and receiving; subscribing is left to what may be received."""

    async def topic_filtering(self, *, session=None, topic=None, action=None):
        if action is StockAction.SUBSCRIBE:
            return True
        role = STORES[0].identities()[session.username].role
        wanted = Action.PUBLISH if action is StockAction.PUBLISH else Action.RECEIVE
        return POLICY.allows(role, session.username, wanted, topic)


async def main() -> None:
    order = json.loads(sys.stdin.readline())
    STORES.append(CredentialStore(Path(order["credentials"])))
    broker = Broker(
        {
            "listeners": {"default": {"type": "tcp", "bind": "127.0.0.1:0"}},
            "plugins": {
                "support.stock_amqtt.StockAuth": {},
                "support.stock_amqtt.StockAcl": {},
            },
        }
    )
    await broker.start()
    port = broker._servers["default"].instance.sockets[0].getsockname()[1]
    print(port, flush=True)
    await asyncio.to_thread(sys.stdin.read)
