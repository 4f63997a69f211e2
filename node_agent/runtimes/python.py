"""The ``python`` runtime: user functions, each instance a child process with one function."""

from pathlib import Path

from capability_schemas.errors import ConfigurationError
from capability_schemas.functions import FunctionSpec
from node_agent.isolation.limits import limits_frame
from node_agent.runtimes import base
from node_agent.runtimes.child import ChildInstance
from node_agent.runtimes.program import ProgramRuntime


class PythonRuntime(ProgramRuntime):
    """Runs Python functions.

    Args:
        context: What it may use of the node.
    """

    name = "python"

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

    async def start(self, spec: FunctionSpec, *, died: base.Died) -> ChildInstance:
        """Start a process and import the function."""
        load = {
            "entry": spec.entry,
            "folder": str(_folder(spec)),
            "limits": limits_frame(spec.limits),
        }
        return await self._start(spec, load, died=died)


def _folder(spec: FunctionSpec) -> Path:
    """Return where a function runs: the folder of its file, or the agent's own."""
    where = (spec.entry or "").rpartition(":")[0]
    return Path(where).resolve().parent if where.endswith(".py") else Path.cwd()
