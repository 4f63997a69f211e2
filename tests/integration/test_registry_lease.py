"""The lease of two registries on real brokers: handed over, and lost with the connection."""

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest

from broker.session.mqtt import MqttSession
from registry.leadership import Leadership, registry_will
from support.broker_site import BrokerSite
from tcp_proxy import TcpProxy

Eventually = Callable[..., Any]
LEASE_MS = 2_000


class Pair:
    """Two registries of a site; the first one's link can be cut."""

    def __init__(self, site: BrokerSite, proxy: TcpProxy) -> None:
        self.site = site
        self.proxy = proxy
        self.leads: dict[str, Leadership] = {}
        self.stacks: dict[str, AsyncExitStack] = {}
        self.epoch = 1_000

    async def start(self, name: str) -> None:
        self.epoch += 1
        epoch = self.epoch
        url = self.proxy.url if name == "registry-1" else None
        session = MqttSession(
            settings=self.site.settings(name, url=url),
            will=lambda: registry_will(self.site.topics, name, epoch=epoch, at=1),
        )
        lead = Leadership(
            session=session,
            topics=self.site.topics,
            registry_id=name,
            epoch=epoch,
            lease_ms=LEASE_MS,
            others=lambda: ("registry-1", "registry-2"),
        )
        stack = AsyncExitStack()
        await stack.enter_async_context(session)
        await session.wait_connected(30)
        await stack.enter_async_context(lead)
        self.leads[name], self.stacks[name] = lead, stack

    async def stop(self, name: str) -> None:
        del self.leads[name]
        await self.stacks.pop(name).aclose()

    def leader(self) -> str | None:
        found = [name for name, lead in self.leads.items() if lead.leads]
        assert len(found) <= 1, found
        return found[0] if found else None


@pytest.fixture(params=["embedded", "mosquitto", "nats"])
def site(request: pytest.FixtureRequest) -> BrokerSite:
    found: BrokerSite = request.getfixturevalue(f"{request.param}_site")
    return found


@pytest.fixture
async def pair(site: BrokerSite) -> AsyncIterator[Pair]:
    async with TcpProxy(host="127.0.0.1", port=site.port) as proxy:
        made = Pair(site, proxy)
        yield made
        proxy.accept()
        proxy.flow()
        for name in tuple(made.leads):
            await made.stop(name)


async def start_both(pair: Pair, eventually: Eventually) -> None:
    await pair.start("registry-1")
    await pair.start("registry-2")
    await eventually(lambda: pair.leader() == "registry-1", timeout_s=60)


@pytest.mark.broker
@pytest.mark.parametrize("how", ["cut", "stall"])
async def test_a_leader_that_cannot_be_heard_is_replaced_and_follows_when_it_is_back(
    pair: Pair, eventually: Eventually, how: str
) -> None:
    await start_both(pair, eventually)
    if how == "cut":
        pair.proxy.refuse()
        pair.proxy.cut()
    else:
        pair.proxy.stall()  # nothing passes, and nobody is told
    await eventually(lambda: pair.leader() == "registry-2", timeout_s=60)
    first = pair.leads["registry-1"]
    assert not first.leads
    pair.proxy.accept()
    pair.proxy.flow()
    await eventually(lambda: first.leader == "registry-2", timeout_s=60)
    assert pair.leader() == "registry-2"


@pytest.mark.broker
async def test_a_leader_that_stops_hands_over(pair: Pair, eventually: Eventually) -> None:
    await start_both(pair, eventually)
    term = pair.leads["registry-1"].term
    await pair.stop("registry-1")
    await eventually(lambda: pair.leader() == "registry-2", timeout_s=60)
    assert (pair.leads["registry-2"].term or 0) > (term or 0)
    await pair.start("registry-1")
    await eventually(lambda: pair.leads["registry-1"].leader == "registry-2", timeout_s=60)
    assert pair.leader() == "registry-2"
