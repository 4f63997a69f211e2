"""``MeshClient``: tasks in, streamed answers out, over one MQTT session."""

import asyncio
import contextlib
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial
from types import TracebackType
from typing import Any, Final, Self

from pydantic import SecretStr, ValidationError

from broker.presence import RouterPresence
from broker.rpc import ReplyInbox, TaskStream
from broker.session.mqtt import MqttSession
from broker.session.settings import SessionSettings
from capability_schemas.errors import (
    AccessDenied,
    BrokerUnavailable,
    ConfigurationError,
    FoamError,
    InvalidTask,
    Overloaded,
    TooLarge,
)
from capability_schemas.ids import is_identifier, new_uuid7, now_ms
from capability_schemas.node import RouterState
from capability_schemas.passport import PassportBook
from capability_schemas.reply import Result
from capability_schemas.task import (
    TASK_LIMIT_BYTES,
    CancelRequest,
    Preference,
    ResumeRequest,
    RouteWeights,
    Task,
    TaskPolicy,
)
from capability_schemas.topics import TopicKind, Topics
from capability_schemas.wire import encode, first_problem
from foam.logging import configure_library_logging
from foam.sdk.address import MeshAddress, find_mesh
from foam.sdk.administration import Administration, Answers
from foam.sdk.direct import PATIENCE_S, DirectRoad, DirectStream
from foam.sdk.handle import TaskHandle
from foam.sdk.outage import OutageWatch
from foam.sdk.registries import RegistryWatch
from foam.sdk.retries import Retries
from foam.settings import load_settings

__all__ = ["MeshClient", "TaskHandle"]

_CONNECT_S: Final = 10.0
_TIMEOUT_S: Final = 60.0

_HEAR_S: Final = 0.5
"""How long routers are listened for before the first task, where none says anything, seconds."""


class MeshClient:
    """A client of one mesh; an async context manager, entered once.

    Without arguments it uses the mesh that ``foam up`` runs in the default data folder (or the one
    that ``FOAM_URL`` and its companions name)::

        async with MeshClient() as mesh:
            result = await mesh.ask("summarise: pump 7 was serviced on Monday, bearings replaced")

    A program that has not configured structlog gets warnings on stderr.

    Args:
        url: Broker, ``mqtt://[user:password@]host:port``; several of a cluster, with commas.
        client: Level ``{client}`` of the topics; the user name when omitted.
        username: Name to log on with.
        password: Its password.
        site: Site level of the topics.
        admin: Take the administrator of the data folder rather than its device.
        connect_timeout_s: How long entering waits for the broker, seconds; None: without end.
        direct: Whether nodes are asked themselves while no router lives.
        on_wait: Told what a task waits for, in words, while its broker or every router is gone.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        client: str | None = None,
        username: str | None = None,
        password: str | SecretStr | None = None,
        site: str | None = None,
        admin: bool = False,
        connect_timeout_s: float | None = _CONNECT_S,
        direct: bool = True,
        on_wait: Callable[[str], None] = lambda _: None,
    ) -> None:
        settings = load_settings(url=url, username=username, password=password, site=site)
        address = find_mesh(settings, admin=admin)
        self._setup(
            address,
            client=client,
            connect_timeout_s=connect_timeout_s,
            direct=direct,
            on_wait=on_wait,
        )

    @classmethod
    def at(
        cls,
        address: MeshAddress,
        *,
        connect_timeout_s: float | None = _CONNECT_S,
        direct: bool = True,
        on_wait: Callable[[str], None] = lambda _: None,
    ) -> Self:
        """Make a client for an address that is known already.

        Args:
            address: The mesh and the identity.
            connect_timeout_s: As for the class.
            direct: As for the class.
            on_wait: As for the class.
        """
        made = cls.__new__(cls)
        made._setup(  # noqa: SLF001 - our own second constructor
            address,
            client=None,
            connect_timeout_s=connect_timeout_s,
            direct=direct,
            on_wait=on_wait,
        )
        return made

    def _setup(
        self,
        address: MeshAddress,
        *,
        client: str | None,
        connect_timeout_s: float | None,
        direct: bool,
        on_wait: Callable[[str], None],
    ) -> None:
        configure_library_logging()
        self.address = address
        self.client = client or address.client
        self._connect_timeout_s = connect_timeout_s
        self._topics = Topics(site=address.site)
        self._session = MqttSession(
            settings=SessionSettings(
                urls=address.urls,
                client_id=f"{self.client}-{secrets.token_hex(4)}",
                username=address.username,
                password=address.password,
                tls=address.tls,
            )
        )
        self._book = (
            PassportBook(site=address.site, registries=address.registries)
            if address.registries
            else None
        )
        self._inbox = ReplyInbox(session=self._session, topics=self._topics, client=self.client)
        self._routers = RouterPresence(session=self._session, topics=self._topics)
        self.registries = RegistryWatch(session=self._session, topics=self._topics)
        self._administration = Administration(
            inbox=self._inbox,
            presence=self._routers,
            registries=self.registries,
            router=address.router,
            signer=address.signer,
        )
        self._road = DirectRoad(
            session=self._session,
            inbox=self._inbox,
            topics=self._topics,
            registries=address.registries,
            presence=self._routers,
            patience_s=PATIENCE_S,
            told=on_wait,
        )
        self.outage = OutageWatch(session=self._session, presence=self._routers, told=on_wait)
        self._goes_past = direct
        self._stack = AsyncExitStack()

    @property
    def broker(self) -> str:
        """The broker that is in use, without credentials; the whole list where none is."""
        used = (one.url for one in self._session.brokers if one.state == "in use")
        return next(used, self.address.url)

    async def __aenter__(self) -> Self:
        """Connect.

        Raises:
            BrokerUnavailable: The broker does not answer in time.
            AccessDenied: It refuses the name or the password, or the identity is one that may not
                ask at all.
        """
        self.address.require(TopicKind.TASK)
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self._session)
            try:
                await self._session.wait_connected(self._connect_timeout_s)
            except BrokerUnavailable as error:
                reason = error.detail.get("reason")
                raise BrokerUnavailable(
                    f"the broker {self.address.url} does not answer: is it running? "
                    "`foam up` starts a mesh, --url or FOAM_URL names another"
                    + (f" (the last try: {reason})" if reason else ""),
                    url=self.address.url,
                ) from error
            except AccessDenied as error:
                raise AccessDenied(
                    f"{error.message}: check the name ({self.address.username}) and the password",
                    url=self.address.url,
                ) from error
            await self._routers.listen()
            await stack.enter_async_context(self._inbox)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Disconnect; open handles end."""
        await self._stack.__aexit__(kind, error, trace)

    @property
    def router(self) -> str:
        """The router that `admin` asks: that of the mesh, or the one that answered in its place."""
        return self._administration.router

    @property
    def bereft(self) -> bool:
        """Whether this mesh had routers, and none of them lives as far as this client knows."""
        return self._routers.bereft

    async def submit(
        self,
        text: str | None = None,
        *,
        function: str | None = None,
        input: Any = None,  # noqa: A002 - the field's name in PROTOCOL section 2
        skills: Sequence[str] = (),
        timeout_s: float = _TIMEOUT_S,
        priority: int = 5,
        policy: TaskPolicy | Mapping[str, Any] | None = None,
        stream: bool = True,
        session: str | None = None,
        prefer: Preference = "balanced",
        weights: RouteWeights | Mapping[str, float | None] | None = None,
        min_confidence: float | None = None,
        task_id: str | None = None,
        trace: str | None = None,
        verify: bool = False,
    ) -> TaskHandle:
        """Publish a task and return the handle on its events.

        The task carries an id, so that publishing it again after a lost connection runs nothing
        twice. Where all routers are known to be gone, one is waited for, a few seconds; then a
        node is asked itself, and the task is not published.

        Args:
            text: What is wanted, in words; needed unless ``function`` is given.
            function: A function by name, optionally with a version range: ``name@>=1.2``.
            input: Any JSON for the function.
            skills: Skills the function must offer, all of them.
            timeout_s: Time allowed, 0 to 86,400 seconds.
            priority: 0 (last) to 9 (first).
            policy: Demands on the node (PROTOCOL section 2).
            stream: Whether chunks are wanted before the result.
            session: Affinity key of a conversation.
            prefer: What decides among candidates of like meaning: ``best``, ``cheapest``,
                ``fastest``, or the router's weights.
            weights: Single weights in place of the router's, each 0 to 1.
            min_confidence: Least confidence of an answer, 0 to 1: small nodes are asked first, and
                stronger ones as long as an answer is below it. `Result.cascade` tells the steps.
            task_id: Id of the task; the same id again gives the same outcome. Made when omitted.
            trace: W3C ``traceparent``.
            verify: Whether a result counts only with the signature of the node that it names: that
                this node gave this output to this task. Not covered: what a router was free to
                choose, and chunks shown before the result.

        Raises:
            ConfigurationError: ``verify`` without knowing a registry of the site.
            InvalidTask: A value does not fit; ``detail["field"]`` names it.
            TooLarge: The task exceeds 1 MiB.
            BrokerUnavailable: The broker did not confirm the task in time.
        """
        fields: dict[str, Any] = {
            "text": text,
            "function": function,
            "input": input,
            "skills": tuple(skills),
            "timeout_ms": round(timeout_s * 1000),
            "priority": priority,
            "stream": stream,
            "session": session,
            "prefer": prefer,
            "min_confidence": min_confidence,
            "id": task_id or new_uuid7(),
            "trace": trace,
            "proof": verify,
        }
        if verify and self._book is None:
            raise ConfigurationError(
                f"{self.client} knows no registry of the site, and cannot check a signature: use "
                "an identity that `foam up` made or that was enrolled (--identity FILE)"
            )
        if policy is not None:
            fields["policy"] = policy
        if weights is not None:
            fields["weights"] = weights
        try:
            task = Task.model_validate(fields)
        except ValidationError as exc:
            field, problem = first_problem(exc)
            problem = problem.removeprefix("Value error, ")
            raise InvalidTask(f"{field}: {problem}" if field else problem, field=field) from exc
        payload = encode(task)
        if len(payload) > TASK_LIMIT_BYTES:
            raise TooLarge("task", size_bytes=len(payload), limit_bytes=TASK_LIMIT_BYTES)
        return await self._send(
            task, given_id=task_id is not None, book=self._book if verify else None
        )

    async def _send(self, task: Task, *, given_id: bool, book: PassportBook | None) -> TaskHandle:
        """Give a task to the routers, or find a node where none lives.

        Args:
            task: The task.
            given_id: Whether its id is the caller's: then it is never taken back from routers.
            book: What its result is checked with.
        """
        deadline = now_ms() + task.timeout_ms
        publish = self._publisher(task)
        if self._goes_past:
            await self._routers.hear(_HEAR_S)
            found = await self._road.instead(task, deadline=deadline, given_id=given_id)
            if found is not None:
                return TaskHandle(stream=found, client=self, publish=publish, book=book)
        opened = self._inbox.open(str(task.id), deadline=deadline)
        try:
            await publish()
        except BaseException:
            opened.close()
            raise
        since = asyncio.get_running_loop().time()
        kept = given_id or not self._goes_past
        detour = partial(self._road.after, task, deadline=deadline, since=since, kept=kept)
        return TaskHandle(stream=opened, client=self, publish=publish, book=book, detour=detour)

    async def follow(self, task_id: str, *, timeout_s: float = _TIMEOUT_S) -> TaskHandle:
        """Listen to a task that this client submitted before, from its first event that is kept.

        Routers tell what they know; about a task that none knows nobody says anything.

        Args:
            task_id: Its id.
            timeout_s: How long to listen, 0 to 86,400 seconds; the task's own deadline stays.

        Raises:
            InvalidTask: That is no id.
            BrokerUnavailable: The broker did not confirm the question in time.
        """
        if not is_identifier(task_id):
            raise InvalidTask(f"id: {task_id!r:.80} is no id of a task", field="id")
        topic = self._topics.build(TopicKind.RESUME, client=self.client)
        publish = partial(
            self._session.publish, topic, encode(ResumeRequest(task=task_id, from_seq=0))
        )
        opened = self._inbox.open(task_id, deadline=now_ms() + round(timeout_s * 1000), grace_ms=0)
        try:
            await publish()
        except BaseException:
            opened.close()
            raise
        return TaskHandle(stream=opened, client=self, publish=publish)

    def return_to_routers(
        self, stream: DirectStream
    ) -> tuple[TaskStream, Callable[[], Awaitable[None]]]:
        """Listen to routers for a task that no node has run, for one of them lives again.

        Args:
            stream: The closed events of the node that said so.

        Returns:
            The events to be, and what publishes the task.
        """
        task = stream.asked
        if not stream.given_id:  # which has ended, by the refusal
            task = task.model_copy(update={"id": new_uuid7()})
        opened = self._inbox.open(str(task.id), deadline=stream.deadline)
        return opened, self._publisher(task)

    def _publisher(self, task: Task) -> Callable[[], Awaitable[None]]:
        topic = self._topics.build(TopicKind.TASK, client=self.client)
        return partial(self._session.publish, topic, encode(task))

    async def ask(self, text: str | None = None, *, retries: int = 0, **options: Any) -> Result:
        """Submit a task and wait for its result.

        Args:
            text: What is wanted, in words.
            retries: How often to ask again, each time with an id of its own, when there is no room
                for the task (`Overloaded`): not before ``retry_after_ms`` is over, and all tries
                together within ``timeout_s``.
            options: As for `submit`.

        Raises:
            InvalidTask: Retries of a task whose id is given: the same id has the same outcome.
            FoamError: The task ended with an error; its class tells the code.
        """
        if retries and options.get("task_id") is not None:
            raise InvalidTask("a task with an id of its own is not tried again", field="task_id")
        clock = asyncio.get_running_loop().time
        deadline = clock() + options.get("timeout_s", _TIMEOUT_S)
        tries = Retries(most=retries, deadline=deadline)
        while True:
            try:
                return await self._ask(text, **options)
            except Overloaded as error:
                pause_s = tries.pause_s(error, clock())
                if pause_s is None:
                    raise
            await asyncio.sleep(pause_s)
            options["timeout_s"] = deadline - clock()

    async def _ask(self, text: str | None, **options: Any) -> Result:
        handle = await self.submit(text, **options)
        try:
            return await handle.result()
        except asyncio.CancelledError:
            with contextlib.suppress(FoamError):
                await handle.cancel()
            raise

    async def cancel(self, task_id: str) -> None:
        """Ask for the end of a task of this client.

        Raises:
            BrokerUnavailable: The broker did not confirm the request in time.
        """
        topic = self._topics.build(TopicKind.CANCEL, client=self.client)
        await self._session.publish(topic, encode(CancelRequest(task=task_id)))

    async def admin(
        self, verb: str, *, target: str | None = None, timeout_s: float = 10.0, **args: Any
    ) -> Any:
        """Ask a router or registry to do something; the client must be an administrator.

        Args:
            verb: What to do: ``nodes``, ``functions``, ``explain``, ``stats``, ``drain`` …
            target: Who shall do it; when omitted a router that answers, that of the mesh before
                others. What every router keeps for itself, all of them are told.
            timeout_s: Time limit, seconds.
            args: Arguments of the verb, JSON values.

        Returns:
            Its answer, any JSON: an object from a router, a list of ``claims`` from a registry.

        Raises:
            AccessDenied: This client is known to be no administrator or operator.
            NotFound: There is no router or registry of the name of ``target``.
            Unavailable: No answer: none is running, or this client may not ask it.
            FoamError: What it answered.
        """
        self.address.require(TopicKind.ADMIN)
        return await self._administration.ask(verb, target=target, timeout_s=timeout_s, **args)

    async def admin_all(self, verb: str, *, timeout_s: float = 10.0, **args: Any) -> Answers:
        """Ask all routers about tasks, of which each has its own.

        Args:
            verb: What to ask: ``task``, ``waiting``, ``stats`` …
            timeout_s: Time limit, seconds.
            args: Arguments of the verb, JSON values.

        Raises:
            NotFound: No router knows what was asked about.
            FoamError: As for `admin`.
        """
        self.address.require(TopicKind.ADMIN)
        return await self._administration.ask_all(verb, timeout_s=timeout_s, **args)

    async def routers(self) -> list[tuple[RouterState, bool]]:
        """Return what each router said of itself last, and whether it passes for alive."""
        await self._routers.live()
        return self._routers.states()

    async def admin_pages(
        self, verb: str, *, target: str | None = None, timeout_s: float = 10.0, **args: Any
    ) -> dict[str, Any]:
        """As `admin`, and where the answer is a page of a list, the pages after it too.

        Args:
            verb: What to ask.
            target: Which router is asked; that of the mesh when omitted.
            timeout_s: Time limit of each page, seconds.
            args: Arguments of the verb, JSON values.

        Returns:
            The answer, with the rows of all pages; they may be of slightly different times.

        Raises:
            FoamError: As for `admin`.
        """
        self.address.require(TopicKind.ADMIN)
        return await self._administration.pages(verb, target=target, timeout_s=timeout_s, **args)

    async def live_functions(self) -> set[tuple[str, str]]:
        """Return the pairs (node, function) that the router routes to: now, or when they wake.

        Raises:
            FoamError: As for `admin`.
        """
        answer = await self.admin_pages("functions", timeout_s=2.0)
        return {
            (str(row["node"]), str(row["function"]))
            for row in answer.get("functions", ())
            if row.get("live") or row.get("wake_at") is not None
        }
