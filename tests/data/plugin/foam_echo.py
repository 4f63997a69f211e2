"""A runtime that says the words of a task again: an example of one from another distribution.

A node file uses it like any other::

    [[function]]
    name = "parrot"
    description = "Say it again."
    runtime = "echo"
    options = { times = 2 }
"""

import asyncio
from typing import Any

from capability_schemas.capability import ModelInfo
from capability_schemas.errors import ConfigurationError, ExecutionFailed, InvalidTask
from capability_schemas.functions import FunctionSpec
from node_agent.runtimes.base import (
    Died,
    Final,
    Instance,
    Piece,
    Request,
    RuntimeContext,
    own_group,
)
from node_agent.runtimes.inloop import InLoopInstance, Put


class EchoInstance(InLoopInstance):
    """Says words again."""

    async def answer(self, request: Request, put: Put) -> None:
        if not request.text:
            raise InvalidTask("there is nothing to say", field="text")
        if "\a" in request.text:
            raise ExecutionFailed("that cannot be said, only rung")
        words: list[str] = []
        for _ in range(request.options["times"]):
            for word in request.text.split():
                words.append(f"{word} ")
                await put(Piece(words[-1]))
                await asyncio.sleep(0)
        await put(Final(output="".join(words)))


class EchoRuntime:
    """Makes instances that say words again.

    Args:
        context: What it may use of the node.
    """

    name = "echo"
    chats = False

    def __init__(self, context: RuntimeContext) -> None:
        self._node = context.node

    def check(self, spec: FunctionSpec) -> None:
        """Check the only option."""
        unknown = sorted(spec.options.keys() - {"times"})
        if unknown or not isinstance(spec.options.get("times", 1), int):
            raise ConfigurationError(
                f"function {spec.name}: echo takes the option times, a number, and no other"
            )

    def group(self, spec: FunctionSpec) -> str:
        """Every function has instances of its own."""
        return own_group(spec)

    def call_options(self, spec: FunctionSpec) -> dict[str, Any]:
        """How often to say it."""
        return {"times": spec.options.get("times", 1)}

    def model(self, spec: FunctionSpec, info: dict[str, Any]) -> ModelInfo | None:
        """There is none."""
        return None

    async def start(self, spec: FunctionSpec, *, died: Died) -> Instance:
        """Start an instance."""
        instance = EchoInstance(name=spec.name, slots=spec.concurrency, died=died)
        await instance.start()
        return instance
