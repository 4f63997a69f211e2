"""The ``embeddings`` runtime: texts to vectors, by a GGUF model in a child process.

Input: ``{"text": …}`` or ``{"texts": […]}``; output: a list with one vector for each text.
"""

import hashlib
import itertools
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from capability_schemas.capability import ModelInfo
from capability_schemas.functions import FunctionSpec
from node_agent.isolation.limits import limits_frame
from node_agent.runtimes import base
from node_agent.runtimes.child import ChildInstance
from node_agent.runtimes.llama_cpp import check_model, describe_model, model_file


class EmbeddingOptions(BaseModel):
    """Options of an ``embeddings`` function.

    Attributes:
        n_ctx: Longest text, and most tokens of one decode; 0: up to 2048 as the model allows.
        n_threads: Threads of one instance.
        pooling: How the vectors of the tokens become one; ``auto``: the model's own way, or mean.
        normalise: Scale vectors to length 1.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    n_ctx: Annotated[int, Field(ge=0, le=1 << 23)] = 0
    n_threads: Annotated[int, Field(ge=1)] = 1
    pooling: Literal["auto", "mean", "cls", "last"] = "auto"
    normalise: bool = True


class EmbeddingsRuntime:
    """Runs embedding models.

    Args:
        context: What it may use of the node.
    """

    name = "embeddings"
    chats = False

    def __init__(self, context: base.RuntimeContext) -> None:
        self._context = context
        self._numbers = itertools.count(1)

    def check(self, spec: FunctionSpec) -> None:
        """Check the options, and that the model is a whole GGUF file."""
        self._options(spec)
        check_model(self._context, spec)

    def group(self, spec: FunctionSpec) -> str:
        """Functions with equal model, options and limits share instances."""
        load = {**self._load_options(spec), **limits_frame(spec.limits)}
        key = hashlib.sha256(json.dumps(load, sort_keys=True).encode()).hexdigest()[:12]
        return f"{self.name}:{key}"

    def call_options(self, spec: FunctionSpec) -> dict[str, Any]:
        """Calls need none."""
        return {}

    def model(self, spec: FunctionSpec, info: dict[str, Any]) -> ModelInfo | None:
        """Name, weight format and engine."""
        return describe_model(spec, info)

    async def start(self, spec: FunctionSpec, *, died: base.Died) -> ChildInstance:
        """Start a process and load the model."""
        instance = ChildInstance(
            name=f"{Path(str(spec.model)).stem}-{next(self._numbers)}",
            load={
                "runtime": "embeddings",
                "options": {**self._load_options(spec), "slots": spec.concurrency},
                "limits": limits_frame(spec.limits),
            },
            start_timeout_s=self._context.start_timeout_s,
            cancel_grace_s=self._context.cancel_grace_s,
            died=died,
        )
        await instance.start()
        return instance

    def _options(self, spec: FunctionSpec) -> EmbeddingOptions:
        return base.read_options(EmbeddingOptions, spec)

    def _load_options(self, spec: FunctionSpec) -> dict[str, Any]:
        return {"model": model_file(self._context, spec), **self._options(spec).model_dump()}
