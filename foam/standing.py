"""Whether the broker still knows a member: asked with its own papers."""

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from broker.access.policy import AccessPolicy
from broker.session.base import Message
from broker.session.mqtt import MqttSession
from broker.session.settings import BrokerUrl, SessionSettings
from capability_schemas.errors import AccessDenied, BrokerUnavailable, ConfigurationError
from capability_schemas.ids import new_uuid7
from capability_schemas.topics import Topics
from foam.mesh import Identity, tls_files

__all__ = ["Papers", "is_known", "log_on"]

CONNECT_S: Final = 10.0
_ONE_OF_MANY_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class Papers:
    """What a member shows to a broker.

    Attributes:
        identity: The member.
        folder: Where its TLS files are.
        url: The broker; of a cluster several, separated by commas.
        topics: Topics of its site.
    """

    identity: Identity
    folder: Path
    url: str
    topics: Topics


async def log_on(papers: Papers, *, client_id: str) -> None:
    """Log on once, and subscribe to a topic of the member's own.

    Args:
        papers: What to show.
        client_id: MQTT client id. That of the member itself cuts its connection, if it has one.

    Raises:
        AccessDenied: The broker does not know it, or gives it no rights.
        ConfigurationError: It knows it, and lets it use its own client id only.
        BrokerUnavailable: The broker cannot be reached.
        TimeoutError: Nor within ten seconds (each).
    """
    *others, last = BrokerUrl.parse_all(papers.url)
    for url in others:
        try:
            await _log_on(papers, url, client_id, connect_s=_ONE_OF_MANY_S)
        except (BrokerUnavailable, TimeoutError):
            continue  # of a cluster one will do; what the first that answers says counts
        return
    await _log_on(papers, last, client_id)


async def _log_on(
    papers: Papers, url: BrokerUrl, client_id: str, *, connect_s: float = CONNECT_S
) -> None:
    member = papers.identity
    settings = SessionSettings(
        urls=(url,),
        client_id=client_id,
        username=member.username,
        password=member.password,
        tls=tls_files(papers.folder, member),
    )

    async def heard(_: Message) -> None:
        """What is said to the member is nothing to us."""

    async with asyncio.timeout(CONNECT_S), MqttSession(settings=settings) as session:
        await session.wait_connected(connect_s)
        own = AccessPolicy(papers.topics).filters(member.role, member.id).subscribe
        await session.subscribe(own[0], heard)  # some brokers let in whom they give no rights


async def is_known(papers: Papers) -> bool:
    """Tell whether the broker still takes these papers, without disturbing who runs with them.

    Raises:
        BrokerUnavailable: The broker cannot be reached.
        TimeoutError: Nor within ten seconds.
    """
    member = papers.identity
    try:
        await log_on(papers, client_id=f"{member.id}-{new_uuid7()}")
    except ConfigurationError:  # it is known: a stranger is refused before his client id
        return True
    except AccessDenied:
        # Mosquitto refuses another client id in the same words as a wrong password.
        try:
            await log_on(papers, client_id=member.id)
        except AccessDenied:
            return False
    return True
