"""Which runtimes there are: the built-in ones, and those that other distributions bring.

A distribution adds one by an entry point of the group ``foam.runtimes``: its name is the runtime's,
its object a `base.RuntimeFactory` (a runtime class that takes a `base.RuntimeContext` is one)::

    [project.entry-points."foam.runtimes"]
    echo = "foam_echo:EchoRuntime"
"""

import importlib
from collections.abc import Iterable
from importlib.metadata import entry_points
from typing import Final

from capability_schemas.errors import ConfigurationError
from node_agent.runtimes.base import Runtime, RuntimeContext, RuntimeFactory

ENTRY_POINTS: Final = "foam.runtimes"

_BUILT_IN: Final = {
    "python": "node_agent.runtimes.python:PythonRuntime",
    "llama_cpp": "node_agent.runtimes.llama_cpp:LlamaCppRuntime",
}
"""Module and class by name; imported when a function asks for it, for some need much."""


def runtime_names() -> list[str]:
    """Return the names of all runtimes that functions of this installation may name."""
    return sorted({*_BUILT_IN, *(point.name for point in entry_points(group=ENTRY_POINTS))})


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


def _factory(name: str) -> RuntimeFactory:
    if name in _BUILT_IN:
        module, _, attribute = _BUILT_IN[name].partition(":")
        factory: RuntimeFactory = getattr(importlib.import_module(module), attribute)
        return factory
    for point in entry_points(group=ENTRY_POINTS, name=name):
        try:
            plugin: RuntimeFactory = point.load()
        except Exception as exc:  # supervision boundary: code of another distribution
            raise ConfigurationError(
                f"runtime {name!r} of {point.value} cannot be loaded: {exc}"
            ) from exc
        return plugin
    known = ", ".join(runtime_names())
    raise ConfigurationError(f"runtime {name!r} is unknown; known are {known}")
