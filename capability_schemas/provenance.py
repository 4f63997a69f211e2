"""Who really sent an order, and whose answer an answer is, whatever the broker says.

A router signs what it tells nodes, an administrator what it asks of routers and registries. The
receiver knows the key from the sender's passport, and the passport from the registry's signature
(``capability_schemas.passport``). A signature alone would let anybody who saw an order send it
again, or to somebody else: so an order names its receiver and the time it was sent, and a
``ReplayWindow`` remembers those of the last minutes.

A node signs its results: what exactly is covered, `result_claims` says. A signed message of one
kind cannot be shown as one of another kind: each lacks fields that the others need.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Final, TypeVar

from capability_schemas.admin import AdminRequest
from capability_schemas.errors import (
    AccessDenied,
    BadSignature,
    ConfigurationError,
    ProtocolError,
    Repeated,
)
from capability_schemas.ids import now_ms
from capability_schemas.passport import CLOCK_SKEW_MS, Passport, PassportBook
from capability_schemas.reply import Result
from capability_schemas.signing import SigningKey, canonical_bytes, digest, sign, verify_bytes
from capability_schemas.wire import WireModel

ADMIN_ROLES: Final = ("admin", "operator")
"""Roles whose requests a router or a registry looks at; what each verb needs is decided there."""

ORDER_ROLES: Final = ("router", "registry")
"""Roles that may order a node about."""

_SEEN_LIMIT: Final = 16_384
_SENDER_LIMIT: Final = 1_024

_Signed = TypeVar("_Signed", bound=WireModel)


class Signer:
    """The key of a member together with the passport that vouches for it.

    Owned by one loop; whoever renews the passport puts the new one in its place.

    Args:
        identity: The member.
        key: Its key.
        passport: What it shows; None where no registry has vouched for it.

    Raises:
        ConfigurationError: The passport is of another member or another key.
    """

    def __init__(self, *, identity: str, key: SigningKey, passport: Passport | None) -> None:
        self.identity = identity
        self.key = key
        self.passport = passport

    @property
    def passport(self) -> Passport | None:
        """What the member shows to those who check its signatures."""
        return self._passport

    @passport.setter
    def passport(self, passport: Passport | None) -> None:
        if passport is not None and (passport.identity, passport.public_key) != (
            self.identity,
            self.key.public,
        ):
            raise ConfigurationError(
                f"the passport beside {self.identity} is of {passport.identity} or of another key: "
                "enroll again"
            )
        self._passport = passport

    def sign(self, message: _Signed) -> _Signed:
        """Return a copy of a message with the member's signature.

        Raises:
            MalformedPayload: The message has no canonical form.
        """
        return sign(message, self.key)


class ReplayWindow:
    """Tells what was sent before: of one sender, over the time in which its orders count.

    Bounded: when it is full the oldest is forgotten. From then on nothing counts that is as old as
    what was forgotten, be it for want of room or for its age: the clock may be set back.

    Args:
        clock: UTC milliseconds.
        since: Nothing counts that was sent before, UTC milliseconds: what an earlier process of
            the receiver has seen, this one cannot know.
        limit: How many are remembered.
    """

    def __init__(
        self, *, clock: Callable[[], int], since: int = 0, limit: int = _SEEN_LIMIT
    ) -> None:
        self._clock = clock
        self._since = since
        self._limit = limit
        self._forgotten_until = -1
        self._seen: OrderedDict[Hashable, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._seen)

    def take(self, nonce: Hashable, sent_at: int) -> bool:
        """Remember an order whose signature is good.

        Args:
            nonce: What is different in every order of the sender.
            sent_at: When it says to have been sent, UTC milliseconds.

        Returns:
            Whether it is new; false for a repetition.

        Raises:
            AccessDenied: It was sent too long ago, or in the future.
        """
        now = self._clock()
        self.expire(now)
        if nonce in self._seen:
            return False
        if abs(sent_at - now) > CLOCK_SKEW_MS:
            where = "ahead of" if sent_at > now else "behind"
            raise AccessDenied(
                f"sent at a time {abs(sent_at - now) // 1000} s {where} ours, more than "
                f"{CLOCK_SKEW_MS // 1000} s: are the clocks right?",
                sent_at=sent_at,
            )
        if sent_at < self._since:
            raise AccessDenied(
                f"sent {self._since - sent_at} ms before its receiver started, who cannot know "
                "whether it is a repetition: send it again",
                sent_at=sent_at,
            )
        if sent_at <= self._forgotten_until:
            raise AccessDenied(
                f"sent {now - sent_at} ms ago, longer than its receiver can remember under this "
                "load: send it again",
                sent_at=sent_at,
            )
        self._seen[nonce] = sent_at
        if len(self._seen) > self._limit:
            self._forget_oldest()
        return True

    def expire(self, now: int) -> None:
        """Forget what is too old to count anyway."""
        while self._seen and next(iter(self._seen.values())) < now - CLOCK_SKEW_MS:
            self._forget_oldest()

    @property
    def forgotten_until(self) -> int:
        """The latest time of what was forgotten, UTC milliseconds; -1 where nothing was."""
        return self._forgotten_until

    def _forget_oldest(self) -> None:
        self._forgotten_until = max(self._forgotten_until, self._seen.popitem(last=False)[1])


class Provenance:
    """Checks the orders one member gets. Owned by one loop.

    Args:
        own: The member.
        book: The passports it was shown.
        clock: UTC milliseconds.
        since: As for ``ReplayWindow``.
    """

    def __init__(
        self,
        *,
        own: str,
        book: PassportBook,
        clock: Callable[[], int] = now_ms,
        since: int = 0,
    ) -> None:
        self.book = book
        self._own = own
        self._clock = clock
        self._since = since
        self._windows: dict[str, ReplayWindow] = {}

    def check(
        self,
        payload: bytes,
        *,
        sender: str | None,
        roles: tuple[str, ...],
        target: str | None,
        sent_at: int | None,
        nonce: Hashable,
    ) -> bool:
        """Check one order.

        Args:
            payload: As received.
            sender: Who says to have sent it.
            roles: What the sender has to be, one of these.
            target: Whom it names as its receiver.
            sent_at: When it says to have been sent, UTC milliseconds.
            nonce: What is different in every order of the sender; covered by the signature.

        Returns:
            Whether it is new; false for a repetition of one that was checked before.

        Raises:
            AccessDenied: It is for somebody else, its sender has no valid passport of such a role,
                or it is too old.
            BadSignature: Its sender did not sign this.
            MalformedPayload: The payload is not JSON.
        """
        if sender is None or sent_at is None:
            missing = "sender" if sender is None else "sent_at"
            raise AccessDenied(f"names no {missing}: orders have to be signed here")
        if target != self._own:
            raise AccessDenied(f"is for {target or 'nobody in particular'}, not for {self._own}")
        self.book.verify(payload, sender, *roles)
        return self._window(sender).take(nonce, sent_at)

    def _window(self, sender: str) -> ReplayWindow:
        window = self._windows.get(sender)
        if window is None:
            if len(self._windows) >= _SENDER_LIMIT:
                self._forget_idle()
            window = ReplayWindow(clock=self._clock, since=self._since)
            self._windows[sender] = window
        return window

    def _forget_idle(self) -> None:
        now = self._clock()
        for sender, window in tuple(self._windows.items()):
            window.expire(now)
            if not len(window):
                self._since = max(self._since, window.forgotten_until + 1)
                del self._windows[sender]
        if len(self._windows) >= _SENDER_LIMIT:
            raise AccessDenied(
                f"{_SENDER_LIMIT} senders are busy, more than {self._own} can keep apart: wait"
            )


class AdminCheck:
    """Decides whether a router or registry looks at an administrator's request.

    Args:
        target: The router or registry.
        provenance: Checks signatures; None where no registry of the site is known.
        unsigned: Whether the broker's word will do for requests without a signature.
    """

    def __init__(self, *, target: str, provenance: Provenance | None, unsigned: bool) -> None:
        self._target = target
        self._provenance = provenance
        self._unsigned = unsigned

    def verify(self, client: str, payload: bytes, request: AdminRequest) -> Passport | None:
        """Check a request.

        Args:
            client: Level of the topic it was published on: the broker's word.
            payload: As received.
            request: The same, decoded.

        Returns:
            The passport of the sender; None when the broker's word is all there is.

        Raises:
            Repeated: It was seen before.
            AccessDenied: Anything else is wrong with it, in words.
        """
        if request.signature is None:
            if self._unsigned:
                return None
            raise AccessDenied(
                f"{self._target} takes signed requests only: ask with an identity that has a "
                "passport (--identity FILE), or run it with FOAM_UNSIGNED_ADMIN=allow"
            )
        if self._provenance is None:
            if self._unsigned:
                return None
            raise AccessDenied(f"{self._target} knows no registry, and cannot check signatures")
        try:
            return self._verify(client, payload, request, self._provenance)
        except ProtocolError as exc:
            raise AccessDenied(f"request of {request.sender}: {exc.message}") from exc

    def _verify(
        self, client: str, payload: bytes, request: AdminRequest, provenance: Provenance
    ) -> Passport:
        passport = request.passport
        if passport is None or passport.identity != request.sender:
            raise AccessDenied(f"request of {request.sender} shows no passport of its sender")
        if client != (request.client or request.sender):
            raise AccessDenied(
                f"request of {request.sender} was not meant to be published as {client}"
            )
        provenance.book.admit(passport)
        new = provenance.check(
            payload,
            sender=request.sender,
            roles=ADMIN_ROLES,
            target=request.target,
            sent_at=request.sent_at,
            nonce=request.id,
        )
        if not new:
            raise Repeated(f"request {request.id} of {request.sender} was answered already")
        return passport


# ---- results


def result_claims(result: Result, *, client: str) -> bytes:
    """Return the bytes that the signature of a result covers.

    RFC 8785 JSON of ``{"client", "digest", "function", "kind": "result", "node", "task",
    "version"}``: that this node answered this task of this client with this function, and what.
    Not covered: when, at which cost, how surely, and whether the router had asked it.

    Args:
        result: The result, with its ``digest``.
        client: Whose task it was.
    """
    return canonical_bytes(
        {
            "kind": "result",
            "client": client,
            "task": result.task,
            "node": result.node,
            "function": result.function,
            "version": result.version,
            "digest": result.digest,
        }
    )


def sign_result(result: Result, *, client: str, signer: Signer, show_passport: bool) -> Result:
    """Return a result with the signature of the node that answered.

    Args:
        result: The result, with its ``digest``.
        client: Whose task it was.
        signer: The node's.
        show_passport: Whether the client wants all that it needs to check it.
    """
    return result.model_copy(
        update={
            "signature": signer.key.sign_bytes(result_claims(result, client=client)),
            "passport": signer.passport if show_passport else None,
        }
    )


def check_result(result: Result, *, client: str, book: PassportBook) -> Passport:
    """Make sure that the node a result names gave this very output to this client's task.

    Args:
        result: As received.
        client: Whose task it was.
        book: What the client believes; passports of nodes that it was shown before count too.

    Returns:
        The passport of the node.

    Raises:
        AccessDenied: The node has shown no passport that is valid.
        BadSignature: The result is not signed, its digest is not that of its output, or another
            node, task or client was signed for.
    """
    if result.signature is None or result.node is None:
        raise BadSignature(
            f"the result of task {result.task} is not signed by a node: ask with proof, and a node "
            "that has a passport"
        )
    if result.digest != digest(result.output):
        raise BadSignature(f"the output of task {result.task} is not the one that was digested")
    if result.passport is not None:
        if result.passport.identity != result.node:
            raise BadSignature(f"the passport shown is not of node {result.node}")
        book.admit(result.passport)
    verify_bytes(
        result_claims(result, client=client), result.signature, book.key(result.node, "node")
    )
    passport = book.passport(result.node)
    if passport is None:
        raise AccessDenied(f"{result.node} has shown no passport", identity=result.node)
    return passport
