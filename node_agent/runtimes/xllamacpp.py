"""The ``xllamacpp`` runtime: language models in llama.cpp's server as a wheel, no compiler needed.

The runtime ``llama_cpp`` falls back to the same engine; this one asks for it by name.
"""

from typing import ClassVar

from capability_schemas.errors import ConfigurationError
from capability_schemas.functions import FunctionSpec
from node_agent.runtimes.llama_cpp import LlamaCppRuntime, LlamaOptions


class XllamaCppRuntime(LlamaCppRuntime):
    """Runs language models with xllamacpp; options as `LlamaOptions`, without ``engine``."""

    name: ClassVar[str] = "xllamacpp"

    def _options(self, spec: FunctionSpec) -> LlamaOptions:
        options = super()._options(spec)
        if options.engine not in ("auto", "xllamacpp"):
            raise ConfigurationError(
                f"function {spec.name}: options.engine: {options.engine} has a runtime of its own"
            )
        return options.model_copy(update={"engine": "xllamacpp"})
