"""Which runtimes there are: the built-in ones, and those that other distributions bring.

A distribution adds one by an entry point of the group ``foam.runtimes``: its name is the runtime's,
its object a `base.RuntimeFactory` (a runtime class that takes a `base.RuntimeContext` is one)::

    [project.entry-points."foam.runtimes"]
    echo = "foam_echo:EchoRuntime"
"""

import importlib
import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Final

from capability_schemas.errors import ConfigurationError
from node_agent.runtimes.base import Runtime, RuntimeContext, RuntimeFactory

ENTRY_POINTS: Final = "foam.runtimes"

_BUILT_IN: Final = {
    "python": "node_agent.runtimes.python:PythonRuntime",
    "llama_cpp": "node_agent.runtimes.llama_cpp:LlamaCppRuntime",
    "xllamacpp": "node_agent.runtimes.xllamacpp:XllamaCppRuntime",
    "embeddings": "node_agent.runtimes.embeddings:EmbeddingsRuntime",
    "command": "node_agent.runtimes.command:CommandRuntime",
    "wasm": "node_agent.runtimes.wasm:WasmRuntime",
    "openai": "node_agent.runtimes.openai:OpenAIRuntime",
    "agent": "node_agent.runtimes.agent:AgentRuntime",
    "mcp": "node_agent.runtimes.mcp:McpRuntime",
}
"""Module and class by name; imported when a function asks for it, for some need much."""


_LIBRARIES: Final[dict[str, tuple[tuple[str, str], ...]]] = {
    "llama_cpp": (("llama_cpp", "llm"), ("xllamacpp", "llm-wheel")),
    "xllamacpp": (("xllamacpp", "llm-wheel"),),
    "embeddings": (("llama_cpp", "llm"),),
    "wasm": (("wasmtime", "wasm"),),
    "openai": (("httpx2", "node"),),
    "mcp": (("mcp", "agent"),),
}
"""Libraries of which a built-in runtime needs one, and the extras that bring them."""


@dataclass(frozen=True, slots=True)
class RuntimeState:
    """What there is to say about a runtime on this machine.

    Attributes:
        name: Name in function specifications.
        origin: ``built in``, or the distribution that brings it.
        problem: Why it cannot run here; empty when it can.
        remedy: What to do about that.
    """

    name: str
    origin: str
    problem: str = ""
    remedy: str = ""


def runtime_names() -> list[str]:
    """Return the names of all runtimes that functions of this installation may name."""
    return sorted({*_BUILT_IN, *(point.name for point in _plugins())})


def runtime_states() -> list[RuntimeState]:
    """Look whether each runtime can run here; loads the code of other distributions."""
    states = [_built_in_state(name) for name in sorted(_BUILT_IN)]
    for point in sorted(_plugins(), key=lambda point: point.name):
        origin = point.value if point.dist is None else f"{point.dist.name} {point.dist.version}"
        try:
            _load(point)
        except ConfigurationError as exc:
            remedy = "mend or remove that distribution"
            states.append(RuntimeState(point.name, origin, exc.message, remedy))
        else:
            states.append(RuntimeState(point.name, origin))
    return states


def make_runtimes(names: Iterable[str], context: RuntimeContext) -> dict[str, Runtime]:
    """Make the runtimes that functions name.

    Args:
        names: Names of runtimes, repeats allowed.
        context: What they may use of the node.

    Raises:
        ConfigurationError: There is none of a name (the message says which there are), or its
            library is not installed.
    """
    return {name: _factory(name)(context) for name in dict.fromkeys(names)}


def _built_in_state(name: str) -> RuntimeState:
    wanted = _LIBRARIES.get(name, ())
    if not wanted or any(importlib.util.find_spec(library) for library, _ in wanted):
        return RuntimeState(name, "built in")
    problem = f"{' or '.join(library for library, _ in wanted)} is not installed"
    remedy = " or ".join(f"pip install 'foam-mesh[{extra}]'" for _, extra in wanted)
    return RuntimeState(name, "built in", problem, remedy)


def _plugins() -> list[EntryPoint]:
    """Return the entry points of other distributions; a built-in runtime is not replaced."""
    return [point for point in entry_points(group=ENTRY_POINTS) if point.name not in _BUILT_IN]


def _factory(name: str) -> RuntimeFactory:
    if name in _BUILT_IN:
        state = _built_in_state(name)
        if state.problem:
            raise ConfigurationError(f"runtime {name!r}: {state.problem}: {state.remedy}")
        module, _, attribute = _BUILT_IN[name].partition(":")
        factory: RuntimeFactory = getattr(importlib.import_module(module), attribute)
        return factory
    for point in _plugins():
        if point.name == name:
            return _load(point)
    here = [state.name for state in runtime_states() if not state.problem]
    raise ConfigurationError(
        f"runtime {name!r} is unknown: this installation has {', '.join(here)}; another"
        f" distribution may bring it (entry point {ENTRY_POINTS})"
    )


def _load(point: EntryPoint) -> RuntimeFactory:
    try:
        plugin: RuntimeFactory = point.load()
    except Exception as exc:  # supervision boundary: code of another distribution
        raise ConfigurationError(
            f"runtime {point.name!r} of {point.value} cannot be loaded: {exc}"
        ) from exc
    if not callable(plugin):
        raise ConfigurationError(f"runtime {point.name!r}: {point.value} makes no runtime")
    return plugin
