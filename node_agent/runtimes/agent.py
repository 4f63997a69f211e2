"""The ``agent`` runtime: functions that think with a model and act with tools.

What a run of an agent is, and what it may do, stands in `node_agent.agents`. The agent itself is a
task in the node's own loop; model and tools run where they always run.
"""

import asyncio
import contextlib
import itertools
import json
from collections.abc import Mapping
from typing import Any, Final

from capability_schemas.capability import ModelInfo
from capability_schemas.errors import (
    ConfigurationError,
    ExecutionFailed,
    FoamError,
    InvalidTask,
    Overloaded,
)
from capability_schemas.functions import FunctionSpec
from node_agent.agents.loop import AgentLoop, Ask, Calls, Finish, ToolCall, cut
from node_agent.agents.options import AgentOptions, agent_options, check_agent
from node_agent.agents.servers import ServerProcesses, mcp_server
from node_agent.agents.tools import BoundTool, Toolbox
from node_agent.runtimes import base
from node_agent.runtimes.inloop import InLoopInstance, Put
from node_agent.worker.engines.base import fill_template
from node_agent.worker.frames import NotJsonError, to_json

_SHOWN_CHARS: Final = 400
"""Longest text of arguments and results in an event."""

_CLOSE_S: Final = 1.0
_COUNTS: Final = ("input_tokens", "output_tokens", "cached_tokens")


class AgentRuntime:
    """Runs agents.

    Args:
        context: What it may use of the node: its functions, the mesh, the MCP servers.
    """

    name = "agent"
    chats = False

    def __init__(self, context: base.RuntimeContext) -> None:
        self._context = context
        self._numbers = itertools.count(1)

    def check(self, spec: FunctionSpec) -> None:
        """Check the options, the MCP servers, and that the functions it names are there."""
        local = self._context.local
        if local is not None:
            check_agent(spec, local.specs(), lambda name: _chats(local, name))
        for tool in agent_options(spec).tools:
            kind, server, _ = tool.target
            if kind == "mcp":
                where = f"function {spec.name}"
                mcp_server(self._context.mcp_servers, server, where).check_access(spec)
        if self._context.local is not None:
            _check_links(spec, self._context.local)

    def group(self, spec: FunctionSpec) -> str:
        """Every agent has instances of its own; an edit makes new ones."""
        return base.own_group(spec)

    def call_options(self, spec: FunctionSpec) -> dict[str, Any]:
        """Calls need none."""
        return {}

    def model(self, spec: FunctionSpec, info: dict[str, Any]) -> ModelInfo | None:
        """Its model is another function's."""
        return None

    async def start(self, spec: FunctionSpec, *, died: base.Died) -> "AgentInstance":
        """Make an instance; servers of tools start with the first call."""
        instance = AgentInstance(
            spec=spec,
            context=self._context,
            name=f"{spec.name}-{next(self._numbers)}",
            died=died,
        )
        await instance.start()
        return instance


class AgentInstance(InLoopInstance):
    """An agent; state owned by the event loop it was started on.

    Args:
        spec: The agent.
        context: What it may use of the node.
        name: For logs and task names.
        died: Called once after the end.
    """

    def __init__(
        self, *, spec: FunctionSpec, context: base.RuntimeContext, name: str, died: base.Died
    ) -> None:
        super().__init__(name=name, slots=spec.concurrency, died=died)
        self._spec = spec
        self._context = context
        self._options = agent_options(spec)
        self._servers = ServerProcesses(agent=spec, context=context, slots=self._options.parallel)
        self._toolbox = Toolbox(agent=spec.name, context=context, servers=self._servers)

    async def answer(self, request: base.Request, put: Put) -> None:
        """Run the agent once; see `InLoopInstance.answer`."""
        local = self._context.local
        if local is None:
            raise ConfigurationError(f"function {self._spec.name}: an agent needs a node around it")
        _check_links(self._spec, local)  # again: functions come and go
        messages = conversation(request, self._options)
        tools = await self._toolbox.tools(self._options)
        run = _Run(
            loop=AgentLoop(
                messages=messages,
                tools=[bound.tool for bound in tools.values()],
                limits=self._options.limits,
                approved=_approved(request.input),
            ),
            tools=tools,
            options=self._options,
            local=local,
            request=request,
            put=put,
        )
        await run.to_end()

    async def _on_stopped(self) -> None:
        await self._servers.close(_CLOSE_S)


class _Run:
    """One run of an agent, from the words of the task to its final."""

    def __init__(
        self,
        *,
        loop: AgentLoop,
        tools: Mapping[str, BoundTool],
        options: AgentOptions,
        local: base.LocalFunctions,
        request: base.Request,
        put: Put,
    ) -> None:
        self._loop = loop
        self._tools = tools
        self._options = options
        self._local = local
        self._request = request
        self._put = put
        self._clock = asyncio.get_running_loop().time
        left_ms = request.left_ms
        self._ends_at = None if left_ms is None else self._clock() + left_ms / 1000
        self._usage = dict.fromkeys(_COUNTS, 0)
        self._confidence: float | None = None
        self._said: list[str] = []
        self._lead = ""  # stands before the first words of a turn
        self._at_once = asyncio.Semaphore(options.parallel)

    async def to_end(self) -> None:
        """Turn by turn to the answer.

        Raises:
            ExecutionFailed: The model comes to none within the limits.
            FoamError: The model failed.
        """
        while True:
            content, calls = await self._turn(self._loop.ask())
            action = self._loop.answered(content, calls)
            if isinstance(action, Finish):
                break
            self._loop.results(await self._act(action))
        await self._put(
            base.Final(
                output="".join(self._said),
                usage={name: count for name, count in self._usage.items() if count},
                finish="stop",
                confidence=self._confidence,
            )
        )

    def _left_s(self) -> float | None:
        return None if self._ends_at is None else max(0.0, self._ends_at - self._clock())

    async def _turn(self, ask: Ask) -> tuple[str | None, list[Any]]:
        """Ask the model; returns its words and the calls it wants."""
        left_s = self._left_s()
        request = base.Request(
            id=f"{self._request.id}/turn-{self._loop.turns}",
            input={},
            text=_last_words(ask.messages),
            left_ms=None if left_s is None else left_s * 1000,
            options={"messages": ask.messages, **({"tools": ask.tools} if ask.tools else {})},
            session=self._request.session,
            policy=self._request.policy,
        )
        aloud = not ask.tools or self._options.stream == "words"
        heard = len(self._said)
        self._lead = "\n\n" if heard else ""
        final: base.Final | None = None
        try:
            invoked = self._local.invoke(self._options.model, request)
            async with contextlib.aclosing(invoked) as answers:
                async for item in answers:
                    if isinstance(item, base.Piece) and aloud:
                        await self._say(item.data)
                    elif isinstance(item, base.Final):
                        final = item
        except (Overloaded, base.InstanceDied, base.InstanceFailed) as error:
            if not self._loop.ran:
                raise
            # What was done is not done again by another attempt elsewhere.
            raise ExecutionFailed(
                f"the model failed after {self._loop.ran} tool calls: {error.message}"
            ) from error
        if final is None:
            raise ExecutionFailed(f"{self._options.model} ended without an answer")
        content, calls = _read(final.output)
        self._count(final)
        if content and len(self._said) == heard and (aloud or not calls):
            await self._say(content)
        return content, calls

    async def _say(self, text: Any) -> None:
        words, self._lead = f"{self._lead}{text}", ""
        self._said.append(words)
        await self._put(base.Piece(words))

    def _count(self, final: base.Final) -> None:
        for name in _COUNTS:
            self._usage[name] += final.usage.get(name, 0)
        if final.confidence is not None:
            known = 1.0 if self._confidence is None else self._confidence
            self._confidence = min(known, final.confidence)

    async def _act(self, action: Calls) -> dict[str, str]:
        """Run calls, some at a time; returns what came of each in words."""
        results: dict[str, str] = {}

        async def run(call: ToolCall) -> None:
            async with self._at_once:
                results[call.step] = await self._call(call, self._tools[call.tool])

        for call in action.calls:
            if call.refused:
                await self._show(call, "failed" if call.wrong else "refused", error=call.refused)
        async with asyncio.TaskGroup() as group:
            for call in action.calls:
                if not call.refused:
                    name = f"node_agent.AgentInstance[{self._request.id}].{call.step}"
                    group.create_task(run(call), name=name)
        return results

    async def _call(self, call: ToolCall, bound: BoundTool) -> str:
        """Run one tool; returns its result or its error in words."""
        await self._show(call, "running", source=bound.source)
        started = self._clock()
        limit_s = self._options.tool_timeout_ms / 1000
        left_s = self._left_s()
        limit_s = limit_s if left_s is None else min(limit_s, left_s)
        request = base.Request(
            id=f"{self._request.id}/{call.step}",
            input=call.arguments,
            text=None,
            left_ms=limit_s * 1000,
            session=self._request.session,
            policy=self._request.policy,
        )
        result = error = ""
        try:
            async with asyncio.timeout(limit_s):
                result = _words(await self._result(call, bound, request))
        except TimeoutError:
            error = f"{call.tool} did not answer within {limit_s:.3g} s"
        except FoamError as exc:
            error = exc.message
        except NotJsonError as exc:
            error = f"{call.tool} returned no JSON: {exc}"
        took_ms = round((self._clock() - started) * 1000, 1)
        if error:
            await self._show(call, "failed", error=cut(error, _SHOWN_CHARS), ms=took_ms)
            return f"Error: {error}"
        await self._show(call, "finished", result=cut(result, _SHOWN_CHARS), ms=took_ms)
        return result

    async def _result(self, call: ToolCall, bound: BoundTool, request: base.Request) -> Any:
        async with contextlib.aclosing(bound.run(request)) as answers:
            async for item in answers:
                if isinstance(item, base.Final):
                    return item.output
                if isinstance(item, base.Progress):  # of an agent that is a tool
                    step = f"{call.step}.{item.step}"
                    await self._put(base.Progress(step=step, state=item.state, detail=item.detail))
        raise ExecutionFailed(f"{call.tool} ended without a result")

    async def _show(self, call: ToolCall, state: str, **detail: Any) -> None:
        detail = {"tool": call.tool, "arguments": _shown(call.arguments), **detail}
        await self._put(base.Progress(step=call.step, state=state, detail=detail))


def _chats(local: base.LocalFunctions, name: str) -> bool:
    try:
        return local.runtime(name).chats
    except ConfigurationError:  # of that function, and told there
        return False


def _check_links(spec: FunctionSpec, local: base.LocalFunctions) -> None:
    def chats(name: str) -> bool:
        try:
            return local.runtime(name).chats
        except FoamError:  # it has no runtime that works here, which is said elsewhere
            return False

    check_agent(spec, local.specs(), chats)


def conversation(request: base.Request, options: AgentOptions) -> list[dict[str, Any]]:
    """Return the messages that a run begins with: system, what came before, what is wanted.

    Raises:
        InvalidTask: ``input.messages`` is no conversation, or nothing is wanted.
    """
    values = dict(request.input) if isinstance(request.input, Mapping) else {}
    if request.text is not None:
        values.setdefault("text", request.text)
    messages = _history(values.get("messages") or [])
    words = ""
    if "{text}" not in options.template or str(values.get("text") or "").strip():
        words = fill_template(options.template, values)
    if words.strip():
        messages.append({"role": "user", "content": words})
    if not messages or messages[-1]["role"] != "user":
        raise InvalidTask("there is no text: say what is wanted", field="text")
    if options.system:
        messages.insert(0, {"role": "system", "content": fill_template(options.system, values)})
    return messages


def _history(given: Any) -> list[dict[str, Any]]:
    """Check a conversation that came with a task: nobody may speak as the system or a tool."""
    messages = []
    for number, message in enumerate(given if isinstance(given, list) else [None]):
        fields = message if isinstance(message, Mapping) else {}
        role, content = fields.get("role"), fields.get("content")
        if role not in ("user", "assistant") or not isinstance(content, str):
            raise InvalidTask(
                f"input.messages[{number}]: write an object with role user or assistant and "
                "content, a text",
                field=f"input.messages[{number}]",
            )
        messages.append({"role": role, "content": content})
    return messages


def _approved(given: Any) -> frozenset[str]:
    names = given.get("approved_tools") if isinstance(given, Mapping) else None
    if names is None:
        return frozenset()
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InvalidTask(
            "input.approved_tools: write a list of names of tools", field="input.approved_tools"
        )
    return frozenset(names)


def _last_words(messages: list[dict[str, Any]]) -> str:
    return next(str(m["content"]) for m in reversed(messages) if m["role"] == "user")


def _read(output: Any) -> tuple[str | None, list[Any]]:
    """Return words and calls of a model's answer; without tools it is words only."""
    if isinstance(output, Mapping) and "tool_calls" in output:
        content, calls = output.get("content"), output["tool_calls"]
        return (None if content is None else str(content)), list(calls or ())
    return _words(output), []


def _words(output: Any) -> str:
    return output if isinstance(output, str) else to_json(output)


def _shown(arguments: Any) -> Any:
    """Return arguments for an event; as cut-off text where they are long."""
    text = json.dumps(arguments, ensure_ascii=False, default=str)
    return arguments if len(text) <= _SHOWN_CHARS else cut(text, _SHOWN_CHARS)
