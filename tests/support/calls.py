"""Calls of one instance, without a node around it."""

from contextlib import aclosing, asynccontextmanager

from capability_schemas.functions import FunctionSpec
from node_agent.runtimes.base import Request


def spec_of(runtime, **fields):
    return FunctionSpec.model_validate(
        {"name": "subject", "description": "d", "runtime": runtime, **fields}
    )


@asynccontextmanager
async def running(runtime, spec, died=None):
    """Check a function and run an instance of it for the body of a ``with``."""
    runtime.check(spec)
    instance = await runtime.start(spec, died=(died if died is not None else []).append)
    try:
        yield instance
    finally:
        await instance.close(1.0)


def request(runtime, spec, value=None, *, text=None, request_id="r1", **options):
    return Request(
        id=request_id,
        input={} if value is None else value,
        text=text,
        options={**runtime.call_options(spec), **options},
    )


async def collect(instance, asked):
    """Return everything a call yields."""
    async with aclosing(instance.invoke(asked)) as answers:
        return [item async for item in answers]


async def answer_of(runtime, spec, value=None, **more):
    """Return everything that one call of a fresh instance yields."""
    async with running(runtime, spec) as instance:
        return await collect(instance, request(runtime, spec, value, **more))
