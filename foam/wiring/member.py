"""What every member's process does first: a session, a connection, papers that stay fresh."""

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from broker.session.mqtt import MqttSession
from broker.session.settings import BrokerUrl, SessionSettings
from capability_schemas.errors import AccessDenied, BrokerUnavailable
from capability_schemas.topics import Topics
from foam.member import Member
from foam.mesh import Identity, load_key
from foam.process import Process
from foam.settings import Settings

if TYPE_CHECKING:
    from broker.session.base import WillFactory
    from registry.encoders.thread import EncoderThread

ACCESS_POLL_S: Final = 0.5
"""How often a broker looks whether its credentials have changed, seconds."""

_WAITING_AFTER_S: Final = 3.0
_STARTING_S: Final = 12.0
"""How long a broker that starts together with the member may take, seconds: a cluster on a busy
machine takes eight."""

_WAITING_AGAIN_S: Final = 30.0
_ACCESS_TRIES: Final = 5


def member_session(
    member: Member, will: "WillFactory | None" = None, *, clean: bool = True
) -> MqttSession:
    """Make a member's session; its MQTT client id is the identity (PROTOCOL section 6)."""
    return MqttSession(
        settings=SessionSettings(
            urls=member.brokers,
            client_id=member.identity.id,
            username=member.username,
            password=member.password,
            tls=member.tls,
            clean=clean,
        ),
        will=will,
    )


async def connect(process: Process, session: MqttSession, url: str) -> None:
    """Enter the session and wait for the broker, saying so when it takes long.

    Raises:
        AccessDenied: The broker refuses the identity.
    """
    await process.enter(session)
    patience_s = _STARTING_S if process.status.supervised else _WAITING_AFTER_S
    while True:
        try:
            await session.wait_connected(patience_s)
        except BrokerUnavailable as error:
            reason = error.detail.get("reason")
            process.status.waiting(
                f"the broker {url} does not answer; waiting for it"
                + (f" (the last try: {reason})" if reason else "")
            )
            patience_s = _WAITING_AGAIN_S
        else:
            return


def keep_papers(
    process: Process, member: Member, session: MqttSession, *, shown: Callable[[], None]
) -> None:
    """Have a member renew its papers as long as it runs.

    Args:
        process: Where it runs.
        member: The member.
        session: Its session.
        shown: Called when the member's signer has a new passport, for it to be shown.
    """
    from foam.renewal import Renewal

    def take(identity: Identity) -> None:
        if member.book is not None:
            member.book.believe(identity.registries)
        if member.signer is not None and identity.passport is not None:
            member.signer.passport = identity.passport
            shown()

    if member.identity.renew_at is None:
        return
    renewal = Renewal(
        identity=member.identity,
        folder=member.folder,
        key=load_key(member.identity, member.folder),
        session=session,
        topics=Topics(site=member.site),
        home=member.home,
        book=member.book,
        shown=take,
    )
    process.spawn(renewal.keep(), name="papers")


def takes_unsigned(settings: Settings, url: str) -> bool:
    """Tell whether the broker's word will do for who administrates.

    Where nobody was asked: at a broker on this machine that is reached without TLS, as `foam up`
    runs it, for whoever is that broker has the keys too; not at any other.

    Args:
        settings: What was asked for.
        url: The broker; of a cluster several, separated by commas, and all have to be so.
    """
    if settings.unsigned_admin is not None:
        return settings.unsigned_admin == "allow"
    from foam.listening import is_loopback

    return all(not one.tls and is_loopback(one.host) for one in BrokerUrl.parse_all(url))


async def wait_for_access(member: Member) -> None:
    """Wait until the running broker has read the access rules of a member made just now.

    A refusal is final for a session, so this asks with sessions of its own. Returns after a bounded
    number of refusals, and when the broker is not there: the member's own session tells.
    """
    for _ in range(_ACCESS_TRIES):
        await asyncio.sleep(2 * ACCESS_POLL_S)
        try:
            async with member_session(member) as session:
                await session.wait_connected(_WAITING_AFTER_S)
        except AccessDenied:
            continue
        except BrokerUnavailable:
            pass
        return


async def encoder_thread(process: Process, settings: Settings) -> "EncoderThread":
    """Start the encoder that the settings name."""
    from registry.encoders import load_encoder
    from registry.encoders.thread import EncoderThread

    return await process.enter(
        EncoderThread(encoder=lambda: load_encoder(settings.encoder_backend, settings.encoder))
    )
