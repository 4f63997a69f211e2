"""Picks the engine: the one asked for, or the first that is installed."""

import importlib
from typing import Final

from node_agent.worker.base import InvocationError
from node_agent.worker.engines.base import Engine, EngineOptions

ENGINES: Final = {
    "llama_cpp": ("node_agent.worker.engines.llama_cpp", "LlamaCppEngine"),
    "xllamacpp": ("node_agent.worker.engines.xllamacpp", "XllamaCppEngine"),
}
"""Module and class by name, in the order in which ``auto`` tries them; imported when wanted."""


def load_engine(name: str, options: EngineOptions) -> tuple[str, Engine, list[str]]:
    """Load a model with the engine asked for, or with the first that can be imported.

    Args:
        name: ``auto``, ``llama_cpp`` or ``xllamacpp``.
        options: Model file and context.

    Returns:
        Name of the engine, the engine, and why earlier ones were passed over.

    Raises:
        InvocationError: Unknown engine, none installed, or the model cannot be loaded.
    """
    if name != "auto" and name not in ENGINES:
        raise InvocationError("internal", f"engine {name!r}: use auto, {' or '.join(ENGINES)}")
    passed_over: list[str] = []
    for candidate in ENGINES if name == "auto" else (name,):
        module, class_name = ENGINES[candidate]
        try:
            engine_class = getattr(importlib.import_module(module), class_name)
        except (ImportError, OSError, RuntimeError) as exc:  # OSError: a shared library is missing
            passed_over.append(f"{candidate}: {exc}")
            continue
        return candidate, engine_class(options), passed_over
    raise InvocationError(
        "internal",
        f"no engine for language models: {'; '.join(passed_over)}",
        passed_over=passed_over,
    )
