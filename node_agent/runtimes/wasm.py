"""The ``wasm`` runtime: WebAssembly programs (WASI preview 1 commands) in a child process."""

from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from capability_schemas.errors import ConfigurationError
from capability_schemas.functions import FunctionSpec
from node_agent.isolation.limits import limits_frame
from node_agent.runtimes import base
from node_agent.runtimes.child import ChildInstance
from node_agent.runtimes.command import VariableName
from node_agent.runtimes.program import ProgramRuntime

_NATIVE_LIMITS = ("memory_bytes", "file_bytes")
"""Limits that wasmtime keeps, and that the process around it would break under: it reserves far
more address space than it uses, and the program can write no file."""

_HEAD = b"\0asm\x01\0\0\0"


class WasmOptions(BaseModel):
    """Options of a ``wasm`` function.

    Attributes:
        args: Arguments after the program's name.
        env: All its environment variables.
        folders: Folders it may read, never write: path inside (absolute) to path on the node.
        fuel: Work one call may do, about one unit an instruction; the default is about ten
            seconds of a plain loop on a small machine. Out of fuel the call fails.
        output: What its standard output is, see `node_agent.worker.programs`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    args: tuple[str, ...] = ()
    env: dict[VariableName, str] = Field(default_factory=dict)
    folders: dict[str, Path] = Field(default_factory=dict)
    fuel: Annotated[int, Field(ge=1, lt=2**63)] = 10_000_000_000
    output: Literal["text", "json", "jsonl"] = "text"


class WasmRuntime(ProgramRuntime):
    """Runs WebAssembly programs.

    Args:
        context: What it may use of the node.
    """

    name = "wasm"

    def check(self, spec: FunctionSpec) -> None:
        """Check the options, and that the file and the granted folders are there."""
        options = _options(spec)
        entry = Path(spec.entry or "")
        if entry.suffix not in (".wasm", ".wat"):
            raise ConfigurationError(
                f"function {spec.name}: entry {spec.entry!r}, write path/to/file.wasm (or .wat)"
            )
        if not entry.is_file():
            raise ConfigurationError(f"function {spec.name}: file {spec.entry} does not exist")
        if entry.suffix == ".wasm":
            _check_head(spec, entry)
        for inside, outside in options.folders.items():
            where = f"function {spec.name}: options.folders.{inside}"
            if not PurePosixPath(inside).is_absolute():
                raise ConfigurationError(f"{where}: write an absolute path, /data for instance")
            if not outside.is_dir():
                raise ConfigurationError(f"{where}: {outside} is no folder")

    async def start(self, spec: FunctionSpec, *, died: base.Died) -> ChildInstance:
        """Start a process and compile the module."""
        options = _options(spec)
        folders = {inside: str(path.absolute()) for inside, path in options.folders.items()}
        load = {
            "entry": str(_file(spec)),
            "options": {
                **options.model_dump(mode="json"),
                "folders": folders,
                "output_bytes": spec.limits.output_bytes,
                "memory_bytes": spec.limits.memory_bytes,
            },
            "limits": {**limits_frame(spec.limits), **dict.fromkeys(_NATIVE_LIMITS)},
        }
        return await self._start(spec, load, died=died)


def _file(spec: FunctionSpec) -> Path:
    return Path(spec.entry or "").absolute()


def _check_head(spec: FunctionSpec, path: Path) -> None:
    """Check that a file is a module (WebAssembly core specification 5.5.16, version 1)."""
    where = f"function {spec.name}: {path}"
    try:
        with path.open("rb") as file:
            head = file.read(len(_HEAD))
    except OSError as exc:
        raise ConfigurationError(f"{where} cannot be read: {exc.strerror or exc}") from exc
    if head[:4] != _HEAD[:4]:
        raise ConfigurationError(f"{where} is no WebAssembly file: it begins with {head!r}")
    if head != _HEAD:
        raise ConfigurationError(
            f"{where} is no module of version 1 (perhaps a component): build it for wasm32-wasip1"
        )


def _options(spec: FunctionSpec) -> WasmOptions:
    return base.read_options(WasmOptions, spec)
