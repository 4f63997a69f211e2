"""What the runtimes of programs share: no model, instances of a function's own, one child each."""

import itertools
from typing import Any, ClassVar

from capability_schemas.capability import ModelInfo
from capability_schemas.functions import FunctionSpec
from node_agent.runtimes import base
from node_agent.runtimes.child import ChildInstance


class ProgramRuntime:
    """Runs code that is no language model; subclasses add ``check`` and ``start``.

    Args:
        context: What it may use of the node.
    """

    name: ClassVar[str]
    chats = False

    def __init__(self, context: base.RuntimeContext) -> None:
        self._context = context
        self._numbers = itertools.count(1)

    def group(self, spec: FunctionSpec) -> str:
        """Every function has instances of its own; an edit makes new ones."""
        return base.own_group(spec)

    def call_options(self, spec: FunctionSpec) -> dict[str, Any]:
        """Calls need none."""
        return {}

    def model(self, spec: FunctionSpec, info: dict[str, Any]) -> ModelInfo | None:
        """There is no model behind it."""
        return None

    async def _start(
        self, spec: FunctionSpec, load: dict[str, Any], *, died: base.Died
    ) -> ChildInstance:
        """Start a child with what its ``load`` frame says besides runtime and concurrency."""
        instance = ChildInstance(
            name=f"{spec.name}-{next(self._numbers)}",
            load={"runtime": self.name, "concurrency": spec.concurrency, **load},
            start_timeout_s=self._context.start_timeout_s,
            cancel_grace_s=self._context.cancel_grace_s,
            died=died,
        )
        await instance.start()
        return instance
