"""The router: takes tasks, finds the node that can do each, and answers for the end of each.

A task comes in on ``task/{client}``. The way through the modules:

=================  ============================================================================
``intake``         topic, size, decoding, fields: a task or a refusal
``ledger``         SQLite; a task is journaled before ``accepted``, its outcome is kept
``routing``        embedding and search, or the function by name
``catalogue``      the fleet: admitted records, presence, heartbeats, load
``selection``      gates and score; every candidate is explained
``machine``        one task as a pure state machine: exactly one final event
``patience``       how long a node may stay silent, learnt from round trips
``dispatch``       drives the machines of all live tasks
``observation``    what nodes tell clients, seen on the reply topics
``replies``        what the router tells clients, and tells again
``admin``          verbs for administrators
``service``        joins all of it to a session
=================  ============================================================================

Chunks go from the node straight to the client; the router only looks on. So it knows what the
client has been shown, can repeat it (``task/{client}/resume``), and ends the task when the node
cannot. Repeated ids get the same outcome and run nothing.

::

    async with Ledger(path=folder / "router.sqlite") as ledger, EncoderThread(...) as encoder:
        router = RouterService(
            session=session, topics=topics, search=CapabilitySearch(space=encoder.space),
            encoder=encoder, ledger=ledger, router_id="router-1",
        )
        await router.listen()  # before the session: it brings what was kept for us
        async with session, router:
            await router.wait()

The session should outlive its connection (``clean=False``) and carry ``router_will``.
"""

from router.ledger import Ledger
from router.service import RouterService, router_will
from router.settings import RouterSettings, Weights

__all__ = ["Ledger", "RouterService", "RouterSettings", "Weights", "router_will"]
