"""The ``command`` runtime: any executable, a process for every call."""

import os
import shutil
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from capability_schemas.errors import ConfigurationError
from capability_schemas.functions import FunctionSpec
from node_agent.isolation.limits import limits_frame
from node_agent.runtimes import base
from node_agent.runtimes.child import ChildInstance
from node_agent.runtimes.program import ProgramRuntime
from node_agent.worker.command_host import placeholder

VariableName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


class CommandOptions(BaseModel):
    """Options of a ``command`` function.

    Attributes:
        command: Program and arguments; no shell is involved. The program is a path, or is looked
            for on the PATH of the node. An argument that is ``{name}`` as a whole becomes that
            property of the input (text as it is, anything else as JSON); since a text may begin
            with a dash, put ``--`` before it where the program knows that.
        env: Environment variables, over those that every instance gets (``PATH``, ``HOME``,
            ``LANG``, ``TMPDIR`` and their like; see `node_agent.isolation.environment`).
        folder: Where it runs; the node's working folder when None.
        output: What its standard output is, see `node_agent.worker.programs`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    command: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)]
    env: dict[VariableName, str] = Field(default_factory=dict)
    folder: Path | None = None
    output: Literal["text", "json", "jsonl"] = "text"


class CommandRuntime(ProgramRuntime):
    """Runs programs.

    Args:
        context: What it may use of the node.
    """

    name = "command"

    def check(self, spec: FunctionSpec) -> None:
        """Check the options, that the program is there, and that the schema has what it wants."""
        options = _options(spec)
        _find_program(spec, options)
        if options.folder is not None and not options.folder.is_dir():
            raise ConfigurationError(
                f"function {spec.name}: options.folder: {options.folder} is no folder"
            )
        known = (spec.input_schema or {}).get("properties")
        for argument in options.command[1:]:
            wanted = placeholder(argument)
            if wanted and wanted != "text" and known is not None and wanted not in known:
                raise ConfigurationError(
                    f"function {spec.name}: options.command: {argument} is no property of the"
                    f" input schema, which has {', '.join(known) or 'none'}"
                )

    async def start(self, spec: FunctionSpec, *, died: base.Died) -> ChildInstance:
        """Start the process that will run the program."""
        options = _options(spec)
        try:
            program = _find_program(spec, options)
        except ConfigurationError as exc:
            raise base.InstanceFailed(exc.message) from exc
        folder = str((options.folder or Path.cwd()).absolute())
        load = {
            "options": {
                "command": [program, *options.command[1:]],
                "env": options.env,
                "folder": folder,
                "output": options.output,
                "output_bytes": spec.limits.output_bytes,
                # In time before the agent kills the whole instance.
                "grace_s": self._context.cancel_grace_s / 2,
            },
            "limits": limits_frame(spec.limits),
        }
        return await self._start(spec, load, died=died)


def _options(spec: FunctionSpec) -> CommandOptions:
    return base.read_options(CommandOptions, spec)


def _find_program(spec: FunctionSpec, options: CommandOptions) -> str:
    """Return the absolute path of the program.

    Raises:
        ConfigurationError: It is not there, or not executable.
    """
    name = options.command[0]
    where = f"function {spec.name}: options.command: {name}"
    if os.sep not in name:
        found = shutil.which(name)
        if found is None:
            raise ConfigurationError(f"{where} is not on the PATH: install it, or write its path")
        return str(Path(found).absolute())
    path = Path(name).absolute()
    if not path.is_file():
        raise ConfigurationError(f"{where} does not exist")
    if not os.access(path, os.X_OK):
        raise ConfigurationError(f"{where} is not executable: chmod +x it")
    return str(path)
