"""The ``llama_cpp`` runtime: a GGUF language model in a child process.

Functions with the same model and load options share their instances; what differs between them
(prompt, length, sampling, schema) travels with every call. The engine is llama-cpp-python, or
xllamacpp where the former is not installed: the claim and the log say which.
"""

import hashlib
import importlib.util
import itertools
import json
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import structlog
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from capability_schemas.capability import ModelInfo
from capability_schemas.errors import ConfigurationError
from capability_schemas.functions import FunctionSpec
from node_agent.isolation.limits import limits_frame
from node_agent.models.gguf import quantisation_name, read_gguf
from node_agent.runtimes import base
from node_agent.runtimes.child import ChildInstance

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class LoraOptions(BaseModel):
    """A low-rank adapter.

    Attributes:
        path: GGUF file of the adapter.
        scale: Its weight; 0 leaves the model as it is.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    scale: float = 1.0


def _as_list(value: Any) -> Any:
    return [{"path": value}] if isinstance(value, str) else value


class LlamaOptions(BaseModel):
    """Options of a function of a language model.

    Attributes:
        engine: ``auto`` takes the first that is installed.
        n_ctx: Context length of one call, tokens; 0: as the model was trained.
        n_threads: Threads of one instance.
        n_batch: Most tokens decoded at a time.
        parallel: Calls that one instance decodes together, each with a context of its own; the
            function's concurrency when None. Functions that share an instance share the largest.
        lora: Adapters: a path, or a list of ``{path, scale}``.
        system: System message; ``{text}`` and names of input properties are filled in.
        template: User message, likewise.
        prepare: ``module:function`` or ``file.py:function``, called in the child with the input
            properties (``text`` among them) as one dictionary; what it returns takes the place of
            the text. Its ``ValueError`` refuses the input.
        tools_template: How a prompt states the tools of a call, for models trained on a form of
            their own: ``{tools}`` (JSON, one a line), ``{signatures}`` or ``{names}`` are filled
            in; with ``{text}`` it is the user's message, without it a system message.
        max_tokens: Most tokens of an answer; the rest of the context when None.
        temperature: 0 is greedy and repeatable.
        top_k: Only the k likeliest tokens; 0: all.
        top_p: Only the likeliest tokens that together have this probability.
        min_p: Only tokens at least this likely, as a share of the likeliest one's probability.
        seed: Of the random choice: the same seed makes the same text.
        stop: Texts that end the answer.
        json_output: Force the answer into the function's output schema and parse it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    engine: Literal["auto", "llama_cpp", "xllamacpp"] = "auto"
    n_ctx: Annotated[int, Field(ge=0, le=1 << 23)] = 0
    n_threads: Annotated[int, Field(ge=1)] = 1
    n_batch: Annotated[int, Field(ge=1)] = 512
    parallel: Annotated[int, Field(ge=1, le=256)] | None = None
    lora: Annotated[tuple[LoraOptions, ...], BeforeValidator(_as_list)] = ()
    system: str | None = None
    template: str = "{text}"
    prepare: Annotated[str, Field(pattern=r"^[^:]+:[^:]+$")] | None = None
    tools_template: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = 256
    temperature: Annotated[float, Field(ge=0)] = 0.0
    top_k: Annotated[int, Field(ge=0)] = 40
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.05
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    stop: tuple[str, ...] = ()
    json_output: bool = False


_LOAD_FIELDS = {"engine", "n_ctx", "n_threads", "n_batch", "lora"}


class LlamaCppRuntime:
    """Runs language models.

    Args:
        context: What it may use of the node.
    """

    name: ClassVar[str] = "llama_cpp"
    chats = True

    def __init__(self, context: base.RuntimeContext) -> None:
        self._context = context
        self._numbers = itertools.count(1)

    def check(self, spec: FunctionSpec) -> None:
        """Check the options, and that model and adapters are whole GGUF files."""
        options = self._options(spec)
        check_model(self._context, spec)
        for adapter in options.lora:
            read_whole(spec, Path(adapter.path))
        if options.json_output and spec.output_schema is None:
            raise ConfigurationError(f"function {spec.name}: json_output needs an output_schema")

    def group(self, spec: FunctionSpec) -> str:
        """Functions with equal model, load options and limits share instances."""
        load = {**self._load_options(spec), **limits_frame(spec.limits)}
        key = hashlib.sha256(json.dumps(load, sort_keys=True).encode()).hexdigest()[:12]
        return f"{self.name}:{key}"

    def call_options(self, spec: FunctionSpec) -> dict[str, Any]:
        """Return the prompt and generation settings."""
        options = self._options(spec)
        chosen = options.model_dump(exclude={*_LOAD_FIELDS, "parallel", "json_output"})
        if options.prepare is not None:
            chosen["code"] = spec.code  # an edit of it counts from the next call on
        if options.json_output:
            chosen |= {"schema": spec.output_schema, "parse": True}
        return chosen

    def model(self, spec: FunctionSpec, info: dict[str, Any]) -> ModelInfo | None:
        """Name, weight format and engine; the digest is the agent's business."""
        return describe_model(spec, info)

    async def start(self, spec: FunctionSpec, *, died: base.Died) -> ChildInstance:
        """Start a process and load the model."""
        options = self._load_options(spec)
        # xllamacpp is a server, and opens a port on the loopback interface.
        network = options["engine"] == "xllamacpp" or (
            options["engine"] == "auto" and importlib.util.find_spec("llama_cpp") is None
        )
        instance = ChildInstance(
            name=f"{Path(str(spec.model)).stem}-{next(self._numbers)}",
            load={
                "runtime": "llama_cpp",
                "options": {**options, "parallel": self._parallel(spec)},
                "limits": limits_frame(spec.limits, network=network or None),
            },
            start_timeout_s=self._context.start_timeout_s,
            cancel_grace_s=self._context.cancel_grace_s,
            died=died,
        )
        await instance.start()
        if instance.info.get("passed_over"):
            _log.warning(
                "engine.fallback",
                engine=instance.info.get("engine"),
                passed_over=instance.info["passed_over"],
            )
        return instance

    def _parallel(self, spec: FunctionSpec) -> int:
        """Return the slots of an instance: what the most concurrent function it serves wants."""
        sharing = [spec]
        if self._context.local is not None:
            group = self.group(spec)
            sharing += [
                other
                for other in self._context.local.specs().values()
                if other.runtime == self.name and self.group(other) == group
            ]
        return max(self._options(one).parallel or one.concurrency for one in sharing)

    def _options(self, spec: FunctionSpec) -> LlamaOptions:
        return base.read_options(LlamaOptions, spec)

    def _load_options(self, spec: FunctionSpec) -> dict[str, Any]:
        chosen = self._options(spec).model_dump(include=_LOAD_FIELDS, mode="json")
        for adapter in chosen["lora"]:
            adapter["path"] = str(Path(adapter["path"]).resolve())
        return {"model": model_file(self._context, spec), **chosen}


def model_file(context: base.RuntimeContext, spec: FunctionSpec) -> str:
    """Return the absolute path of a function's model, there or not."""
    try:
        return str(context.model_path(str(spec.model)).resolve())
    except ConfigurationError:  # `check` says so; whoever starts it anyway learns it from the child
        return str(Path(str(spec.model)).resolve())


def check_model(context: base.RuntimeContext, spec: FunctionSpec) -> None:
    """Check that a function's model is a whole GGUF file.

    Raises:
        ConfigurationError: There is none, or it is broken.
    """
    if spec.model is None:
        raise ConfigurationError(
            f"function {spec.name}: a {spec.runtime} function needs a model: a GGUF file, or a name"
            " in the model store"
        )
    try:
        path = context.model_path(spec.model)
    except ConfigurationError as exc:
        raise ConfigurationError(f"function {spec.name}: {exc.message}") from exc
    if not path.is_file():
        raise ConfigurationError(f"function {spec.name}: model {spec.model} does not exist")
    read_whole(spec, path)


def read_whole(spec: FunctionSpec, path: Path) -> None:
    """Check that a file is a whole GGUF file.

    Raises:
        ConfigurationError: It is not there, or broken.
    """
    if not path.is_file():
        raise ConfigurationError(f"function {spec.name}: {path} does not exist")
    try:
        read_gguf(path)
    except ConfigurationError as exc:
        raise ConfigurationError(f"function {spec.name}: {exc.message}") from exc


def describe_model(spec: FunctionSpec, info: dict[str, Any]) -> ModelInfo | None:
    """Return what a claim says of a model, given what its instance said."""
    if spec.model is None:
        return None
    kind = info.get("file_type")
    engine = info.get("engine")
    return ModelInfo(
        name=str(info.get("model_name") or Path(spec.model).stem),
        quantisation=None if kind is None else quantisation_name(int(kind)),
        engine=None if engine is None else f"{engine} {info.get('engine_version', '')}".strip(),
    )
