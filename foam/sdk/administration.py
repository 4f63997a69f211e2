"""Administration as a client asks for it: which router is asked, and what if that does not answer.

Each router has tasks of its own, but all of them know the nodes. So any router may answer what is
asked of the mesh, and every one of them has to be asked about tasks.
"""

import asyncio
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from broker.presence import RouterPresence
from broker.rpc import ReplyInbox, call_admin
from capability_schemas.errors import DeadlineExceeded, FoamError, NotFound, Unavailable
from capability_schemas.provenance import Signer
from foam.sdk.registries import RegistryWatch

__all__ = ["Administration", "Answers"]

_EVERYWHERE: Final = frozenset({"cordon", "uncordon"})
"""Orders that every router keeps for itself."""

_PATIENCE_S: Final = 2.5
"""How long one of several routers is waited for before the next one is asked, seconds."""

_HEAR_S: Final = 0.5
_RETURN_S: Final = 5.0
"""How long a router is waited for where none lives, seconds."""


@dataclass(frozen=True, slots=True)
class Answers:
    """What several routers answered to one question.

    Attributes:
        given: The answers, by router; one at least.
        silent: Routers that did not answer in time.
    """

    given: dict[str, dict[str, Any]]
    silent: tuple[str, ...] = ()


class Administration:
    """Asks routers and registries; owned by the client's event loop.

    Args:
        inbox: Where answers arrive.
        presence: Tells which routers live.
        registries: Tells which registries there are.
        router: The one that is asked first.
        signer: Signs requests, where the client has a passport.

    Attributes:
        router: The one that is asked first: as given, or the one that answered last.
    """

    def __init__(
        self,
        *,
        inbox: ReplyInbox,
        presence: RouterPresence,
        registries: RegistryWatch,
        router: str,
        signer: Signer | None = None,
    ) -> None:
        self._call = partial(call_admin, inbox, signer=signer)
        self._presence = presence
        self._registries = registries
        self.router = router

    async def ask(self, verb: str, *, target: str | None, timeout_s: float, **args: Any) -> Any:
        """Ask one router or registry; without a target any router, or all to do it.

        Where several routers seem to live, the one is taken that answers a question at once, so
        that no order is given to two of them.

        Args:
            verb: What to do.
            target: Who shall do it.
            timeout_s: Time limit, seconds.
            args: Arguments of the verb, JSON values.

        Raises:
            NotFound: Nobody here has ever borne the name of ``target``.
            Unavailable: No answer.
            FoamError: What was answered.
        """
        if target is not None:
            await self._find(target)
            return await self._one(target, verb, args, timeout_s)
        if verb in _EVERYWHERE:
            return await self._tell_all(verb, args, timeout_s)
        live = await self._live(timeout_s)
        self.router = await self._awake(live, timeout_s)
        return await self._one(self.router, verb, args, timeout_s)

    async def pages(
        self, verb: str, *, target: str | None, timeout_s: float, **args: Any
    ) -> dict[str, Any]:
        """As `ask`, and where the answer is a page of a list, the pages after it too.

        Returns:
            The answer, with the rows of all pages; they may be of slightly different times.
        """
        ask = partial(self.ask, verb, target=target, timeout_s=timeout_s)
        answer: dict[str, Any] = await ask(**args)
        while answer.get("next") is not None:
            page: dict[str, Any] = await ask(**{**args, "after": answer["next"]})
            rows = {
                name: [*answer[name], *value]
                for name, value in page.items()
                if isinstance(value, list)
            }
            answer = {**page, **rows}
        return answer

    async def ask_all(self, verb: str, *, timeout_s: float, **args: Any) -> Answers:
        """Ask every router that seems to live.

        Args:
            verb: What to ask.
            timeout_s: Time limit, seconds; where there are several, a shorter one.
            args: Arguments of the verb, JSON values.

        Raises:
            NotFound: None of those that answer knows what was asked about.
            Unavailable: None answers.
            FoamError: What one of them answered.
        """
        live = await self._live(timeout_s)
        limit_s = timeout_s if len(live) == 1 else min(timeout_s, 2 * _PATIENCE_S)
        replies = await self._each(live, verb, args, limit_s)
        silent = tuple(name for name, reply in replies.items() if _is_silence(reply))
        errors = [one for one in replies.values() if isinstance(one, FoamError)]
        for error in errors:
            if not isinstance(error, NotFound | DeadlineExceeded):
                raise error
        given = {name: one for name, one in replies.items() if not isinstance(one, FoamError)}
        if given:
            return Answers(given, silent)
        for error in errors:
            if not _is_silence(error):
                also = f" ({', '.join(silent)} did not answer)" if silent else ""
                raise type(error)(error.message + also, **error.detail) from error
        raise self._no_answer(verb, live)

    async def _tell_all(self, verb: str, args: dict[str, Any], timeout_s: float) -> Any:
        """Give an order to every router.

        Raises:
            Unavailable: One of them did not answer; the message says who did.
            FoamError: What one of them answered.
        """
        live = await self._live(timeout_s)
        replies = await self._each(live, verb, args, timeout_s)
        silent = [name for name, reply in replies.items() if _is_silence(reply)]
        done = [name for name, reply in replies.items() if not isinstance(reply, FoamError)]
        for reply in replies.values():
            if isinstance(reply, FoamError) and not _is_silence(reply):
                raise reply
        if not done:
            raise self._no_answer(verb, live)
        if silent:
            raise Unavailable(
                f"{verb} is done by {', '.join(done)}; {', '.join(silent)} did not answer within "
                f"{timeout_s:g} s, and may not have heard of it: repeat it later",
                retryable=False,
            )
        return replies[done[0]]

    async def _each(
        self, routers: list[str], verb: str, args: dict[str, Any], timeout_s: float
    ) -> dict[str, Any]:
        """Ask all at a time; an error is an answer like others."""
        replies: dict[str, Any] = dict.fromkeys(routers)

        async def ask(router: str) -> None:
            try:
                replies[router] = await self._call(
                    target=router, verb=verb, args=args, timeout_s=timeout_s
                )
            except FoamError as error:
                replies[router] = error

        async with asyncio.TaskGroup() as group:
            for router in routers:
                group.create_task(ask(router), name=f"foam.Administration[{router}].{verb}")
        return replies

    async def _live(self, timeout_s: float) -> list[str]:
        """Return the routers to ask, the one that answered last time first.

        Raises:
            Unavailable: None lives, nor comes back in time.
        """
        live = await self._presence.live(preferred=self.router)
        if not live and self._presence.bereft:
            if not await self._presence.wait_live(min(_RETURN_S, timeout_s / 2)):
                raise Unavailable(f"no router lives: {self._presence.told()}", retryable=False)
            live = await self._presence.live(preferred=self.router)
        return live or [self.router]  # this client may not be allowed to hear of routers

    async def _find(self, target: str) -> None:
        """Make sure that there is such a router or registry, living or not.

        Raises:
            NotFound: There is none; what each of them says last stays at the broker.
        """
        await self._presence.listen()
        await self._presence.hear(_HEAR_S)
        if target in self._presence.names():
            return
        registries = await self._registries.names(until=target)
        known = [*self._presence.names(), *registries]
        if known and target not in known:  # else this client may not be allowed to hear of them
            raise NotFound(
                f"there is no router or registry {target} here: there are {', '.join(known)}",
                target=target,
            )

    async def _awake(self, live: list[str], timeout_s: float) -> str:
        """Return the first that answers at once, or the first where none does."""
        for router in live if len(live) > 1 else ():
            try:
                await self._call(
                    target=router, verb="routers", timeout_s=min(_PATIENCE_S, timeout_s)
                )
            except DeadlineExceeded as error:
                if not _is_silence(error):
                    raise
            else:
                return router
        return live[0]

    async def _one(self, target: str, verb: str, args: dict[str, Any], timeout_s: float) -> Any:
        try:
            return await self._call(target=target, verb=verb, args=args, timeout_s=timeout_s)
        except DeadlineExceeded as error:
            if not _is_silence(error):
                raise
            raise Unavailable(error.message, retryable=False, **error.detail) from error

    def _no_answer(self, verb: str, asked: list[str]) -> Unavailable:
        return Unavailable(
            f"no router answered {verb}; asked: {', '.join(asked)}: are they running, and may this "
            "client ask them?",
            retryable=False,
        )


def _is_silence(reply: Any) -> bool:
    """Tell whether nobody answered, as opposed to an answer that something took too long."""
    return isinstance(reply, DeadlineExceeded) and not reply.remote
