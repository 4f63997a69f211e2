"""Functions of simulated nodes: they take virtual time and answer what can be foretold."""

import asyncio
from typing import Any, Final

from capability_schemas.capability import ModelInfo
from capability_schemas.errors import ExecutionFailed
from capability_schemas.functions import FunctionSpec
from foam.chaos.functions import answer_of
from node_agent.runtimes.base import Died, Piece, Request, own_group
from node_agent.runtimes.base import Final as FinalPiece
from node_agent.runtimes.inloop import InLoopInstance, Put

__all__ = ["FUNCTIONS", "RUNTIME", "SimulatedRuntime"]

RUNTIME: Final = "simulated"


def _spec(name: str, description: str, **more: Any) -> FunctionSpec:
    return FunctionSpec(
        name=name, description=description, runtime=RUNTIME, concurrency=4, warm=True, **more
    )


FUNCTIONS: Final = (
    _spec("look_up", "looks a figure up and tells it at once"),
    _spec("count", "counts, and tells every number as a value of its own", continues="skip"),
    _spec("recite", "recites a text word by word", continues="skip"),
)


class _Instance(InLoopInstance):
    """Answers as `answer_of` says, in the time that the input asks for."""

    def __init__(self, spec: FunctionSpec, died: Died) -> None:
        super().__init__(name=spec.name, slots=spec.concurrency, died=died)
        self._function = spec.name

    async def answer(self, request: Request, put: Put) -> None:
        """Run one call; ``fails`` in the input makes it fail half-way."""
        asked: dict[str, Any] = request.input
        pieces, output = answer_of(self._function, str(asked["key"]), int(asked["pieces"]))
        pause_s = float(asked["ms"]) / 1000 / max(1, len(pieces))
        for number, piece in enumerate(pieces):
            if asked.get("fails") and 2 * number >= len(pieces):
                break
            await asyncio.sleep(pause_s)
            await put(Piece(piece))
        if not pieces:
            await asyncio.sleep(pause_s)
        if asked.get("fails"):
            raise ExecutionFailed("as it was asked to")
        await put(FinalPiece(output=output))


class SimulatedRuntime:
    """See the module; implements `node_agent.runtimes.base.Runtime`."""

    name = RUNTIME
    chats = False

    def check(self, spec: FunctionSpec) -> None:
        """Take any specification."""

    def group(self, spec: FunctionSpec) -> str:
        """Return the group of a function that shares instances with no other."""
        return own_group(spec)

    def call_options(self, spec: FunctionSpec) -> dict[str, Any]:
        """Return no options."""
        return {}

    def model(self, spec: FunctionSpec, info: dict[str, Any]) -> ModelInfo | None:
        """Return None: there is no model."""
        return None

    async def start(self, spec: FunctionSpec, *, died: Died) -> _Instance:
        """Start an instance."""
        instance = _Instance(spec, died)
        await instance.start()
        return instance
