"""Fixtures for every kind of test: brokers, eventual assertions; and how tests are shared out."""

import asyncio
import gc
import logging
import os
import signal
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import structlog
from hypothesis import HealthCheck, settings

from capability_schemas.topics import Topics

EventuallyCheck = Callable[[], object]
Eventually = Callable[..., Awaitable[None]]

_PERIOD_S = 0.01
_TESTS = Path(__file__).parent
_MOST_WORKERS = 8
_MANY_EXAMPLES_S = 300  # fifteen seconds where nothing else runs
# Those that wait longest come first, so that no worker sits on one at the end of a run.
_ORDER = ("e2e", "simulation", "integration", "contract", "security", "property", "unit")


def pytest_configure() -> None:
    """Be the same wherever it runs.

    A worker is told of a terminal of 80 columns, which tables would be fitted to. A run in the
    background ignores Ctrl-C, and so would all that tests start and interrupt. How long an example
    of Hypothesis takes says how busy the machine is.
    """
    os.environ.pop("COLUMNS", None)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    settings.register_profile(
        "untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )
    settings.load_profile("untimed")


@pytest.hookimpl(optionalhook=True)  # a run without the plugin is a run here
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Share whole folders out among the workers asked for; a few tests run right here.

    None unless ``FOAM_TEST_WORKERS`` says how many: each needs half a gigabyte and a core to keep
    the limits of tests that wait for real processes far away.
    """
    whole = {_TESTS, *(_TESTS / folder for folder in _ORDER)}
    named = {config.invocation_params.dir / argument for argument in config.args}
    if config.option.keyword or not named <= whole:
        return 0
    return min(_MOST_WORKERS, int(os.environ.get("FOAM_TEST_WORKERS", "0")))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests that wait longest first; those of one file stay together and in order."""
    places: dict[Path, tuple[int, int, Path]] = {}
    for path in {item.path for item in items}:
        folder = path.relative_to(_TESTS).parts[0]
        rank = _ORDER.index(folder) if folder in _ORDER else len(_ORDER)
        places[path] = (rank, -path.stat().st_size, path)
    items.sort(key=lambda item: places[item.path])
    for item in items:
        if _TESTS / "property" in item.path.parents:
            item.add_marker(pytest.mark.timeout(_MANY_EXAMPLES_S))


@pytest.fixture(autouse=True)
def _quiet_logs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Structlog writes to the standard library, where pytest catches it, and keeps no logger.

    A module's logger that was first used while a test had set logging up would stay as it was, and
    so would the level of a command that a test ran in this process.
    """
    logging.getLogger().setLevel(logging.WARNING)
    configure = structlog.configure
    monkeypatch.setattr(
        structlog,
        "configure",
        lambda **options: configure(**{**options, "cache_logger_on_first_use": False}),
    )
    structlog.reset_defaults()
    structlog.configure(
        processors=[structlog.stdlib.add_log_level, structlog.processors.KeyValueRenderer()],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    yield
    structlog.reset_defaults()


@pytest.fixture(scope="module", autouse=True)
def _collect_garbage() -> Iterator[None]:
    """Have what a module leaked (a process, a socket) show in it, and not in some later test."""
    yield
    gc.collect()


@pytest.fixture
def topics() -> Topics:
    """The topic grammar of the default site."""
    return Topics()


@pytest.fixture
def eventually() -> Eventually:
    """Wait until a condition holds: ``await eventually(lambda: got == [1, 2])``.

    The test fails with the condition's name when it does not hold within ``timeout_s``.
    """

    async def wait(check: EventuallyCheck, *, timeout_s: float = 15.0) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                while not check():  # noqa: ASYNC110  # any condition, not an event
                    await asyncio.sleep(_PERIOD_S)
        except TimeoutError:
            pytest.fail(f"did not happen within {timeout_s} s: {check}")

    return wait


def require_broker(kind: str) -> None:
    """Skip the test when the machine cannot run this broker; fail where it must."""
    from support.broker_site import is_available  # noqa: PLC0415  # unit tests need no broker

    if not is_available(kind):
        if os.environ.get("FOAM_REQUIRE_BROKERS") == "1":
            pytest.fail(f"FOAM_REQUIRE_BROKERS=1, but there is no {kind} on this machine")
        pytest.skip(f"there is no {kind} binary on this machine")


async def _site(kind: str, factory: pytest.TempPathFactory) -> AsyncGenerator[object, None]:
    from support.broker_site import run_site  # noqa: PLC0415  # as above

    require_broker(kind)
    async with run_site(kind, factory.mktemp(kind)) as site:
        yield site


@pytest.fixture(scope="session")
def _site_loop() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


async def _next(site: AsyncGenerator[object, None]) -> object:
    return await anext(site, None)


def _run(runner: asyncio.Runner, site: AsyncGenerator[object, None]) -> Iterator[object]:
    yield runner.run(_next(site))
    runner.run(_next(site))


@pytest.fixture(scope="module")
def embedded_site(_site_loop, tmp_path_factory):
    """The embedded broker; a module has its own, for what others left in it would be heard."""
    yield from _run(_site_loop, _site("embedded", tmp_path_factory))


@pytest.fixture(scope="module")
def mosquitto_site(_site_loop, tmp_path_factory):
    """Mosquitto, likewise."""
    yield from _run(_site_loop, _site("mosquitto", tmp_path_factory))


@pytest.fixture(scope="module")
def mosquitto_static_site(_site_loop, tmp_path_factory):
    """Mosquitto with access files instead of its dynamic security plugin, likewise."""
    yield from _run(_site_loop, _site("mosquitto_static", tmp_path_factory))


@pytest.fixture(scope="module")
def nats_site(_site_loop, tmp_path_factory):
    """nats-server, likewise."""
    yield from _run(_site_loop, _site("nats", tmp_path_factory))
