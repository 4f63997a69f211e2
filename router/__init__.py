"""The router: takes tasks, finds the node that can do each, and answers for the end of each.

A task comes in on ``task/{client}``. The way through the modules:

=================  ============================================================================
``intake``         topic, size, decoding, fields: a task or a refusal
``ledger``         SQLite; a task is journaled before ``accepted``, its outcome is kept
``rules``          what the operator wants of certain tasks, from a file
``meaning``        the encoder and the search in its space, and the change to another
``catalogue``      the fleet: admitted records, presence, heartbeats, load
``routing``        one decision: rules, search, offers, selection, and what is learnt of it
``selection``      gates, score and rank (``gates``, ``score``, ``ranking``, ``nobody``), explained
``reputation``     what nodes have done so far; ``breaker``: who is left alone for silence
``machine``        one task as a pure state machine (``verdicts``): exactly one final event
``cascade``        small nodes first, stronger ones while the answer is not sure
``patience``       how long a node may stay silent, learnt from round trips
``ownership``      which of several routers has a task; ``pulse``: who is silent for too long
``reception``      where tasks arrive: own ones are taken, those of other routers watched
``shadow``         tasks of other routers; ``takeover``: when they are taken, and how they go on
``peers``          what routers tell each other
``dispatch``       drives the machines of all live tasks; ``messages``: what it writes
``observation``    what nodes tell clients, seen on the reply topics
``replies``        what the router tells clients, and tells again
``admin``          verbs for administrators; ``steering``: those about decisions
``upkeep``         what it does between tasks: silence, calibration, housekeeping
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
from router.peers import router_will
from router.service import RouterService
from router.settings import RouterSettings, Weights

__all__ = ["Ledger", "RouterService", "RouterSettings", "Weights", "router_will"]
