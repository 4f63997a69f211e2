"""The functions of a node without a node: each call goes straight to an instance."""

import contextlib
import dataclasses
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Self

from capability_schemas.errors import NotFound
from capability_schemas.functions import FunctionSpec
from node_agent.runtimes import base


class DirectFunctions:
    """Local functions for tests of agents: an ``async with`` that starts instances when needed.

    Args:
        specs: What there is.
        runtimes: Runtime by name.

    Attributes:
        calls: Name and request of every call so far.
        closed: Ids of requests whose iterator was closed before its end.
    """

    def __init__(self, specs: Sequence[FunctionSpec], runtimes: Mapping[str, base.Runtime]) -> None:
        self._specs = {spec.name: spec for spec in specs}
        self._runtimes = dict(runtimes)
        self._instances: dict[str, base.Instance] = {}
        self.calls: list[tuple[str, base.Request]] = []
        self.closed: list[str] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for instance in self._instances.values():
            await instance.close(0.5)

    def specs(self) -> Mapping[str, FunctionSpec]:
        return self._specs

    def runtime(self, name: str) -> base.Runtime:
        return self._runtimes[self._spec(name).runtime]

    async def invoke(self, name: str, request: base.Request) -> AsyncGenerator[base.Answer, None]:
        self.calls.append((name, request))
        spec = self._spec(name)
        runtime = self._runtimes[spec.runtime]
        options: dict[str, Any] = {**runtime.call_options(spec), **request.options}
        ended = False
        try:
            if name not in self._instances or not self._instances[name].alive:
                self._instances[name] = await runtime.start(spec, died=lambda _: None)
            call = dataclasses.replace(request, options=options)
            async with contextlib.aclosing(self._instances[name].invoke(call)) as answers:
                async for answer in answers:
                    ended = isinstance(answer, base.Final)
                    yield answer
        finally:
            if not ended:
                self.closed.append(request.id)

    def _spec(self, name: str) -> FunctionSpec:
        if name not in self._specs:
            raise NotFound(f"no function {name}")
        return self._specs[name]
