"""The ``python`` runtime: user functions, each instance a child process with one function."""

import itertools
from pathlib import Path
from typing import Any

from capability_schemas.capability import ModelInfo
from capability_schemas.errors import ConfigurationError
from capability_schemas.functions import FunctionSpec
from node_agent.isolation.limits import limits_frame
from node_agent.runtimes import base
from node_agent.runtimes.child import ChildInstance


class PythonRuntime:
    """Runs Python functions.

    Args:
        context: What it may use of the node.
    """

    name = "python"
    chats = False

    def __init__(self, context: base.RuntimeContext) -> None:
        self._context = context
        self._numbers = itertools.count(1)

    def check(self, spec: FunctionSpec) -> None:
        """Check that the entry names a function of a module or of an existing file."""
        where, _, attribute = (spec.entry or "").rpartition(":")
        if not where or not attribute:
            raise ConfigurationError(
                f"function {spec.name}: entry {spec.entry!r}, write module:name or file.py:name"
            )
        if where.endswith(".py") and not Path(where).is_file():
            raise ConfigurationError(f"function {spec.name}: file {where} does not exist")
        if spec.options:
            raise ConfigurationError(
                f"function {spec.name}: python takes no options: {', '.join(spec.options)}"
            )

    def group(self, spec: FunctionSpec) -> str:
        """Every function has instances of its own; an edit makes new ones."""
        return base.own_group(spec)

    def call_options(self, spec: FunctionSpec) -> dict[str, Any]:
        """Calls need none."""
        return {}

    def model(self, spec: FunctionSpec, info: dict[str, Any]) -> ModelInfo | None:
        """There is no model behind it."""
        return None

    async def start(self, spec: FunctionSpec, *, died: base.Died) -> ChildInstance:
        """Start a process and import the function."""
        instance = ChildInstance(
            name=f"{spec.name}-{next(self._numbers)}",
            load={
                "runtime": "python",
                "entry": spec.entry,
                "concurrency": spec.concurrency,
                "folder": str(_folder(spec)),
                "limits": limits_frame(spec.limits),
            },
            start_timeout_s=self._context.start_timeout_s,
            cancel_grace_s=self._context.cancel_grace_s,
            died=died,
        )
        await instance.start()
        return instance


def _folder(spec: FunctionSpec) -> Path:
    """Return where a function runs: the folder of its file, or the agent's own."""
    where = (spec.entry or "").rpartition(":")[0]
    return Path(where).resolve().parent if where.endswith(".py") else Path.cwd()
