"""Grants from beginning to end, in writing, so that one who is killed in between does no harm.

A grant touches two files, the credentials and the book. It is begun in the book, and ended there
together with its answer. Whoever finds one that was begun and not ended takes the credential back,
for nobody was ever told of it; whoever is asked the same again gives the answer that is kept. Two
registries of one data folder follow each other in this way.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from broker.access.credentials import CredentialStore
from capability_schemas.enrollment import EnrollReply
from capability_schemas.wire import decode, encode
from registry.enrollment.book import Answered, EnrollmentBook, Granting

_KEPT: Final = 256
_KEPT_MS: Final = 3_600_000


@dataclass(frozen=True, slots=True)
class Answer:
    """What to say, and what to write down.

    Attributes:
        level: Level of the reply topic: the token, or the member that renews.
        reply: What to publish there; None: nothing (the sender proved nothing).
        happened: For the audit trail: ``granted``, ``renewed``, ``repeated``, ``pending``,
            ``refused``, ``ignored``.
        identity: Who asked, as far as that could be read.
        reason: Why.
    """

    level: str
    reply: EnrollReply | None
    happened: str
    identity: str = ""
    reason: str = ""


class GrantLog:
    """What was begun, and what was answered. Blocking; one thread at a time.

    Args:
        book: Where it is written.
        credentials: What is undone there.
        clock: UTC milliseconds.
    """

    def __init__(
        self, *, book: EnrollmentBook, credentials: CredentialStore, clock: Callable[[], int]
    ) -> None:
        self._book = book
        self._credentials = credentials
        self._clock = clock

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Work on the files alone, and first undo what somebody began who is no more.

        Raises:
            Unavailable: Another registry is at it.
            ConfigurationError: A file cannot be read or written.
        """
        with self._book.held():
            if self._book.granting:
                self._credentials.refresh()
                known = self._credentials.identities()
                for name, begun in self._book.granting.items():
                    if name in known and known[name].created_at >= begun.at:
                        self._credentials.remove(name)
                self._book.write(granting={})
            yield

    def before(self, level: str, payload: bytes) -> Answer | None:
        """Return what this very request was granted, by this registry or one before it."""
        digest = _digest(payload)
        for known in reversed(self._book.answered):
            if (known.level, known.digest) == (level, digest):
                reply: EnrollReply = decode(EnrollReply, known.reply.encode())
                return Answer(level, reply, "repeated", known.identity, "it was granted before")
        return None

    def begin(self, identity: str, level: str, payload: bytes) -> None:
        """Write down that a credential is about to be made."""
        begun = Granting(level=level, digest=_digest(payload), at=self._clock())
        self._book.write(granting={**self._book.granting, identity: begun})

    def end(self, answer: Answer, payload: bytes, changes: Mapping[str, Any]) -> None:
        """Write down what was granted, and all that changes by it, at once.

        Args:
            answer: As it goes out.
            payload: The request.
            changes: Further arguments of ``EnrollmentBook.write``.
        """
        if answer.reply is None:
            return
        now = self._clock()
        made = Answered(
            level=answer.level,
            digest=_digest(payload),
            identity=answer.identity,
            happened=answer.happened,
            reply=encode(answer.reply).decode(),
            at=now,
        )
        recent = [one for one in self._book.answered if abs(now - one.at) < _KEPT_MS]
        begun = self._book.granting.items()
        self._book.write(
            answered=[*recent[1 - _KEPT :], made],
            granting={name: one for name, one in begun if name != answer.identity},
            **changes,
        )


def _digest(payload: bytes) -> str:
    return hashlib.sha256(payload).hexdigest()
