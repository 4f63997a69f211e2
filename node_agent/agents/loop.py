"""The conversation of an agent with its model, and its limits. Pure: no I/O, no clock.

The model may say anything; whatever it says, an agent asks it at most ``turns`` times and runs at
most ``calls`` tools. In the last turn no tools are offered, so that what was found out becomes an
answer; a model that still has none is an error.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from capability_schemas.errors import ExecutionFailed, InvalidTask
from capability_schemas.functions import check_input

Approval = Literal["auto", "ask", "never"]
"""Whether a tool may run: always; when the task names it in ``approved_tools``; not at all."""

_ID_CHARS: Final = 40
_NAME_CHARS: Final = 64
_SHOWN_CHARS: Final = 500
_ARGUMENT_CHARS: Final = 64 * 1024
_NO_NAME: Final = re.compile(r"[^A-Za-z0-9_-]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A tool as the model sees it, and what it may do with it.

    Attributes:
        name: What the model calls it; unique, of the form that the OpenAI API takes.
        description: What it does, in words.
        parameters: JSON Schema (2020-12) of the arguments, an object.
        approval: Whether it may run.
        calls: Most calls of it in one run of the agent.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    approval: Approval = "auto"
    calls: int | None = None

    def offer(self) -> dict[str, Any]:
        """Return the tool in the form of the OpenAI API."""
        return {
            "type": "function",
            "function": {
                "name": self.name,
                "description": self.description,
                "parameters": dict(self.parameters),
            },
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopLimits:
    """What one run of an agent may take.

    Attributes:
        turns: Most times that the model is asked, the last one without tools; at least 1.
        calls: Most tool calls that run.
        same: Most times that a tool runs with the same arguments.
        at_once: Most calls of one answer of the model; further ones are dropped.
        result_chars: Longest result that the model is told; the rest is cut off.
    """

    turns: int = 8
    calls: int = 16
    same: int = 2
    at_once: int = 8
    result_chars: int = 8000


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A call that the model asked for.

    Attributes:
        step: Unique within the run.
        id: As the model named it.
        tool: Name of the tool, which there may be none of.
        arguments: As the model wrote them; an object when the call is to run.
        refused: Why it does not run; empty when it does.
        wrong: Whether it is refused as a mistake of the model, not by a rule.
    """

    step: str
    id: str
    tool: str
    arguments: Any
    refused: str = ""
    wrong: bool = False


@dataclass(frozen=True, slots=True)
class Ask:
    """Ask the model next.

    Attributes:
        messages: The conversation, in the message format of the OpenAI chat API.
        tools: What it may call, likewise; empty: it has to answer.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Calls:
    """Run those of these calls that are not refused, then give their results."""

    calls: tuple[ToolCall, ...]


@dataclass(frozen=True, slots=True)
class Finish:
    """The answer."""

    text: str


@dataclass(slots=True)
class AgentLoop:
    """One run of an agent: `ask`, `answered`, and `results` after calls; again until `Finish`.

    After the last turn, the one without tools, `answered` finishes or raises.

    Args:
        messages: The conversation so far, ending in what is wanted now.
        tools: What the model may call; names unique.
        limits: What it may take.
        approved: Tools of approval ``ask`` that whoever sent the task allows.
    """

    messages: list[dict[str, Any]]
    tools: Sequence[Tool]
    limits: LoopLimits = LoopLimits()
    approved: frozenset[str] = frozenset()
    turns: int = field(default=0, init=False)
    ran: int = field(default=0, init=False)
    _steps: int = field(default=0, init=False)
    _per_tool: Counter[str] = field(default_factory=Counter, init=False)
    _same: Counter[str] = field(default_factory=Counter, init=False)
    _open: tuple[ToolCall, ...] = field(default=(), init=False)
    _last: bool = field(default=False, init=False)

    def ask(self) -> Ask:
        """Return what the model is asked next."""
        self.turns += 1
        self._last = self.turns >= self.limits.turns or self.ran >= self.limits.calls
        offered = [] if self._last else [t.offer() for t in self.tools if t.approval != "never"]
        return Ask(list(self.messages), offered)

    def answered(self, content: str | None, tool_calls: Sequence[Any]) -> Finish | Calls:
        """Take the model's answer.

        Args:
            content: Its words.
            tool_calls: ``{"id", "name", "arguments"}`` each, or whatever the model made of it.

        Raises:
            ExecutionFailed: It said nothing, or asks for tools where none are offered.
        """
        if not tool_calls or self._last:
            if content is None or not content.strip():
                why = "it still asks for tools" if tool_calls else "it said nothing"
                raise self._no_answer(why)
            return Finish(content)
        calls = tuple(self._planned(call) for call in tool_calls[: self.limits.at_once])
        self._open = calls
        self.messages.append(
            {
                "role": "assistant",
                "content": content,
                "tool_calls": [
                    {
                        "id": call.id,
                        "type": "function",
                        "function": {"name": call.tool, "arguments": _written(call.arguments)},
                    }
                    for call in calls
                ],
            }
        )
        return Calls(calls)

    def results(self, results: Mapping[str, str]) -> None:
        """Take what came of the calls.

        Args:
            results: Result or error by ``ToolCall.step``, in words, of every call that ran.
        """
        for call in self._open:
            text = call.refused or results[call.step]
            self.messages.append(
                {
                    "role": "tool",
                    "tool_call_id": call.id,
                    "name": call.tool,
                    "content": cut(text, self.limits.result_chars),
                }
            )
        self._open = ()

    def _planned(self, asked: Any) -> ToolCall:
        self._steps += 1
        fields = asked if isinstance(asked, Mapping) else {}
        name = tool_name(str(fields.get("name") or "unnamed"))
        arguments = fields.get("arguments")
        arguments = {} if arguments is None else arguments
        refused, wrong = self._refusal(name, arguments)
        if not refused:
            self.ran += 1
            self._per_tool[name] += 1
            self._same[name + _written(arguments)] += 1
        return ToolCall(
            step=f"call-{self._steps}",
            id=f"{str(fields.get('id') or 'call')[:_ID_CHARS]}-{self._steps}",
            tool=name,
            arguments=arguments,
            refused=refused,
            wrong=wrong,
        )

    def _refusal(self, name: str, arguments: Any) -> tuple[str, bool]:
        """Return why a call does not run (empty when it does), and whether it is a mistake."""
        tool = next((tool for tool in self.tools if tool.name == name), None)
        if tool is None:
            known = ", ".join(tool.name for tool in self.tools) or "none"
            return f"Error: there is no tool {name!r}. There are: {known}.", True
        mistake = _mistake(tool, arguments)
        if mistake:
            return f"Error: {mistake}", True
        if tool.approval == "never":
            return f"Refused: {name} may not be used.", False
        if tool.approval == "ask" and name not in self.approved:
            return f"Refused: whoever asked has not approved {name}. Do without it.", False
        if self.ran >= self.limits.calls:
            return f"Refused: all {self.limits.calls} tool calls are used up. Answer now.", False
        if tool.calls is not None and self._per_tool[name] >= tool.calls:
            return f"Refused: {name} may be called {tool.calls} times. Do without it.", False
        if self._same[name + _written(arguments)] >= self.limits.same:
            times = f"{name} was called with these arguments {self.limits.same} times"
            return f"Refused: {times} and has nothing new. Answer, or do something else.", False
        return "", False

    def _no_answer(self, why: str) -> ExecutionFailed:
        return ExecutionFailed(
            f"the model came to no answer in {self.turns} turns and {self.ran} tool calls: {why}",
            turns=self.turns,
            calls=self.ran,
        )


def cut(text: str, limit: int) -> str:
    """Return text of at most ``limit`` characters, with a note behind it when there was more."""
    if len(text) <= limit:
        return text
    return f"{text[:limit]}\n[cut off: the first {limit} of {len(text)} characters]"


def tool_name(text: str) -> str:
    """Return a name in the form that the OpenAI API takes: 1 to 64 of ``A-Z a-z 0-9 _ -``."""
    return _NO_NAME.sub("_", text)[:_NAME_CHARS]


def _mistake(tool: Tool, arguments: Any) -> str:
    """Return what is wrong with the arguments of a call; empty when nothing is."""
    if not isinstance(arguments, Mapping):
        shown = str(arguments)[:_SHOWN_CHARS]
        return f"the arguments of {tool.name} are no JSON object: {shown}"
    if len(_written(arguments)) > _ARGUMENT_CHARS:
        return f"the arguments of {tool.name} are longer than {_ARGUMENT_CHARS} characters"
    try:
        check_input(arguments, tool.parameters)
    except InvalidTask as error:
        return f"wrong arguments for {tool.name}: {error.message}"
    return ""


def _written(arguments: Any) -> str:
    """Return arguments as a JSON object in text, as servers want it in a conversation."""
    if not isinstance(arguments, Mapping):
        arguments = {"text": str(arguments)[:_SHOWN_CHARS]}
    try:
        return json.dumps(arguments, ensure_ascii=False, allow_nan=False, sort_keys=True)
    except (TypeError, ValueError, RecursionError):
        return "{}"
