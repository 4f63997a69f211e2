"""Looks functions over before a node runs them: what reading alone does not show."""

import dataclasses
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping
from typing import Final

from capability_schemas.errors import ConfigurationError, NotFound, Unavailable
from capability_schemas.functions import FunctionSpec
from capability_schemas.problem import Problem
from node_agent.continuation import check_continues
from node_agent.declaration.introspection import Introspector
from node_agent.declaration.reader import Declaration
from node_agent.pool.memory import total_memory_bytes
from node_agent.runtimes.base import Answer, Request, Runtime, RuntimeContext
from node_agent.runtimes.catalogue import make_runtimes

_FEW_EXAMPLES: Final = 3
_SHORT_WORDS: Final = 4


class DeclaredFunctions:
    """Functions that nothing runs yet, with runtimes that see just these (`LocalFunctions`).

    A function may name others of its node (an agent its model and its tools), so all of a new
    declaration are checked together, whatever the node runs meanwhile.

    Args:
        functions: Names unique.
        context: What the runtimes may use; they get these functions in place of the node's.
        given: Runtimes that are there already, by name.
    """

    def __init__(
        self,
        functions: Iterable[FunctionSpec],
        context: RuntimeContext,
        given: Mapping[str, Runtime] | None = None,
    ) -> None:
        self._specs = {spec.name: spec for spec in functions}
        self._context = dataclasses.replace(context, local=self)
        self._runtimes = dict(given or {})

    def specs(self) -> Mapping[str, FunctionSpec]:
        """Return them, by name."""
        return self._specs

    def runtime(self, name: str) -> Runtime:
        """Return the runtime that is to run a function.

        Raises:
            NotFound: There is no such function.
            ConfigurationError: There is no such runtime, or its library is not installed.
        """
        if name not in self._specs:
            raise NotFound(f"no function {name} is declared")
        wanted = self._specs[name].runtime
        if wanted not in self._runtimes:
            self._runtimes |= make_runtimes([wanted], self._context)
        return self._runtimes[wanted]

    def invoke(self, name: str, request: Request) -> AsyncGenerator[Answer, None]:
        """Refuse the call, for nothing runs.

        Raises:
            Unavailable: Always.
        """
        raise Unavailable(f"function {name} is only being checked: call {request.id} is refused")

    def broken_servers(self) -> dict[str, str]:
        """Return what is wrong with servers of tools, by name; also with those nobody uses."""
        servers = self._context.mcp_servers
        if not servers:
            return {}
        from node_agent.agents.servers import check_servers  # noqa: PLC0415 - few nodes have any

        broken = {}
        for name, table in servers.items():
            try:
                check_servers({name: table})
            except ConfigurationError as exc:
                broken[name] = exc.message
        return broken

    def check(self) -> None:
        """Have every function checked by its runtime; blocks, for they look at files.

        Raises:
            ConfigurationError: With every reason, one a line.
        """
        wrong = [*self.broken_servers().values()]
        for spec in self._specs.values():
            try:
                self.runtime(spec.name).check(spec)
                check_continues(spec)
            except ConfigurationError as exc:
                wrong.append(exc.message)
        if wrong:
            raise ConfigurationError("\n".join(dict.fromkeys(wrong)))


def inspect_declaration(
    declaration: Declaration,
    *,
    source: str,
    context: RuntimeContext,
    total: Callable[[], int | None] = total_memory_bytes,
) -> list[Problem]:
    """Find what would keep functions from running, or from being found.

    Runtimes and their options, models, the code that prepares inputs, and words that routing has
    too few of. Blocks while children import code.

    Args:
        declaration: Read with all its code imported.
        source: Where it was read from.
        context: What runtimes may use; the tool servers are those of the declaration.
        total: Returns the memory of this machine, bytes; None when unknown.

    Returns:
        Further problems, those of each function together.
    """
    declared = DeclaredFunctions(
        declaration.functions, dataclasses.replace(context, mcp_servers=declaration.mcp)
    )
    broken, memory = _broken_preparations(declaration), total()
    found = [
        Problem(file=source, what=f'mcp "{name}"', message=message.removeprefix(f"mcp.{name}."))
        for name, message in declared.broken_servers().items()
    ]
    for spec in declaration.functions:
        wrong = [*_misfits(spec, declared), *_weak_words(spec)]
        if memory is not None and not any(field == "runtime" for field, *_ in wrong):
            wrong += _large_model(spec, declared.runtime(spec.name), context, memory)
        if spec.options.get("prepare") in broken:
            wrong.append(("options.prepare", broken[spec.options["prepare"]], False))
        found += [
            Problem(
                file=source,
                line=declaration.lines.get(spec.name),
                what=f'function "{spec.name}"',
                field=field,
                message=message,
                warning=warning,
            )
            for field, message, warning in wrong
        ]
    return found


def _misfits(spec: FunctionSpec, declared: DeclaredFunctions) -> Iterator[tuple[str, str, bool]]:
    """Yield why its runtime would not take a function; one reason at most."""
    try:
        runtime = declared.runtime(spec.name)
    except ConfigurationError as exc:
        yield "runtime", exc.message, False
        return
    try:
        runtime.check(spec)
    except ConfigurationError as exc:
        yield "", exc.message.removeprefix(f"function {spec.name}: "), False


def _large_model(
    spec: FunctionSpec, runtime: Runtime, context: RuntimeContext, memory: int
) -> Iterator[tuple[str, str, bool]]:
    """Yield that a model does not fit here; the file may be meant for a larger machine."""
    about = runtime.model(spec, {})
    if spec.model is None or about is None or about.engine is not None:  # none, or a server has it
        return
    try:
        size = context.model_path(spec.model).stat().st_size
    except (OSError, ConfigurationError):  # `_misfits` says it
        return
    if size > memory:
        figures = f"{spec.model} is {size / 1e6:,.0f} MB, this machine has {memory / 1e6:,.0f} MB"
        yield "model", f"{figures} of memory: it runs on a larger one only", True


def _weak_words(spec: FunctionSpec) -> Iterator[tuple[str, str, bool]]:
    """Yield what leaves routing by meaning little to go by."""
    if len(spec.description.split()) < _SHORT_WORDS:
        short = f"{spec.description!r} is short"
        yield "description", f"{short}: say in the words of a task what it does", True
    if len(spec.examples) < _FEW_EXAMPLES:
        few = f"{len(spec.examples)} given; fewer than {_FEW_EXAMPLES} route poorly"
        yield "examples", f"{few}: add tasks as people would word them", True


def _broken_preparations(declaration: Declaration) -> dict[str, str]:
    """Import the code that prepares inputs; returns what is wrong by ``module:name``."""
    broken = {}
    introspector = Introspector()
    for entry in dict.fromkeys(
        spec.options["prepare"]
        for spec in declaration.functions
        if isinstance(spec.options.get("prepare"), str)
    ):
        try:
            introspector.describe(entry.rpartition(":")[0])
        except ConfigurationError as exc:
            broken[entry] = exc.message
    return broken
