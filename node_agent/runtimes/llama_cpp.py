"""The ``llama_cpp`` runtime: a GGUF language model in a child process.

Functions with the same model and load options share their instances; what differs between them
(prompt template, length, schema) travels with every call. The engine is llama-cpp-python, or
xllamacpp where the former is not installed: the claim and the log say which.
"""

import hashlib
import itertools
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import structlog
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from capability_schemas.capability import ModelInfo
from capability_schemas.errors import ConfigurationError
from capability_schemas.functions import FunctionSpec
from capability_schemas.wire import first_problem
from node_agent.runtimes import base
from node_agent.runtimes.child import ChildInstance
from node_agent.runtimes.python import limits_frame

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

_FILE_TYPES = {0: "f32", 1: "f16", 2: "q4_0", 3: "q4_1", 7: "q8_0", 15: "q4_k_m", 17: "q5_k_m"}
"""Common values of the GGUF key ``general.file_type`` (``llama_ftype`` in llama.h)."""


class LlamaOptions(BaseModel):
    """Options of a ``llama_cpp`` function.

    Attributes:
        engine: ``auto`` takes the first that is installed.
        n_ctx: Context length, tokens; 0: as the model was trained.
        n_threads: Threads of one instance.
        n_batch: Prompt tokens decoded at a time.
        seed: Sampling seed.
        system: System message; ``{text}`` and names of input properties are filled in.
        template: User message, likewise.
        prepare: ``module:function`` or ``file.py:function``, called in the child with the input
            properties (``text`` among them) as one dictionary; what it returns takes the place of
            the text. Its ``ValueError`` refuses the input.
        max_tokens: Most tokens of an answer; the rest of the context when None.
        temperature: 0 is greedy and repeatable.
        stop: Texts that end the answer.
        json_output: Force the answer into the function's output schema and parse it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    engine: Literal["auto", "llama_cpp", "xllamacpp"] = "auto"
    n_ctx: Annotated[int, Field(ge=0)] = 0
    n_threads: Annotated[int, Field(ge=1)] = 1
    n_batch: Annotated[int, Field(ge=1)] = 512
    seed: Annotated[int, Field(ge=0)] = 0
    system: str | None = None
    template: str = "{text}"
    prepare: Annotated[str, Field(pattern=r"^[^:]+:[^:]+$")] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = 256
    temperature: Annotated[float, Field(ge=0)] = 0.0
    stop: tuple[str, ...] = ()
    json_output: bool = False


_LOAD_FIELDS = ("engine", "n_ctx", "n_threads", "n_batch", "seed")


class LlamaCppRuntime:
    """Runs language models.

    Args:
        context: What it may use of the node.
    """

    name = "llama_cpp"
    chats = True

    def __init__(self, context: base.RuntimeContext) -> None:
        self._context = context
        self._numbers = itertools.count(1)

    def check(self, spec: FunctionSpec) -> None:
        """Check the options and that the model file exists."""
        options = self._options(spec)
        if spec.model is None:
            raise ConfigurationError(
                f"function {spec.name}: a llama_cpp function needs a model file"
            )
        if not Path(spec.model).is_file():
            raise ConfigurationError(f"function {spec.name}: model {spec.model} does not exist")
        if options.json_output and spec.output_schema is None:
            raise ConfigurationError(f"function {spec.name}: json_output needs an output_schema")

    def group(self, spec: FunctionSpec) -> str:
        """Functions with equal model, load options and limits share instances."""
        load = {**self._load_options(spec), **limits_frame(spec.limits)}
        key = hashlib.sha256(json.dumps(load, sort_keys=True).encode()).hexdigest()[:12]
        return f"llama_cpp:{key}"

    def call_options(self, spec: FunctionSpec) -> dict[str, Any]:
        """Return the prompt and generation settings."""
        options = self._options(spec)
        chosen = options.model_dump(exclude={*_LOAD_FIELDS, "json_output"})
        if options.json_output:
            chosen |= {"schema": spec.output_schema, "parse": True}
        return chosen

    def model(self, spec: FunctionSpec, info: dict[str, Any]) -> ModelInfo | None:
        """Name, weight format and engine; the digest is the agent's business."""
        if spec.model is None:
            return None
        kind = info.get("file_type")
        engine = info.get("engine")
        return ModelInfo(
            name=str(info.get("model_name") or Path(spec.model).stem),
            quantisation=None if kind is None else _FILE_TYPES.get(int(kind), f"ftype-{kind}"),
            engine=None if engine is None else f"{engine} {info.get('engine_version', '')}".strip(),
        )

    async def start(self, spec: FunctionSpec, *, died: base.Died) -> ChildInstance:
        """Start a process and load the model."""
        instance = ChildInstance(
            name=f"{Path(str(spec.model)).stem}-{next(self._numbers)}",
            load={
                "runtime": "llama_cpp",
                "options": self._load_options(spec),
                "limits": limits_frame(spec.limits),
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

    def _options(self, spec: FunctionSpec) -> LlamaOptions:
        try:
            return LlamaOptions.model_validate(spec.options)
        except ValidationError as exc:
            field, problem = first_problem(exc)
            raise ConfigurationError(f"function {spec.name}: options.{field}: {problem}") from exc

    def _load_options(self, spec: FunctionSpec) -> dict[str, Any]:
        chosen = self._options(spec).model_dump(include=set(_LOAD_FIELDS))
        return {"model": str(Path(str(spec.model)).resolve()), **chosen}
