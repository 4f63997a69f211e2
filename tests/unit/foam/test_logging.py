import io
import json
import logging

import pytest
import structlog

from capability_schemas.errors import AccessDenied
from foam.logging import configure_library_logging, configure_logging


@pytest.fixture
def lines():
    stream = io.StringIO()
    configure_logging("info", process="router-1", stream=stream)
    return lambda: [json.loads(line) for line in stream.getvalue().splitlines()]


def test_one_json_object_per_event(lines) -> None:
    structlog.get_logger("x").info("task.ended", task="t", ms=3)
    (event,) = lines()
    assert (event["event"], event["task"], event["process"]) == ("task.ended", "t", "router-1")
    assert event["level"] == "info"
    assert event["timestamp"].endswith("Z")


def test_secret_fields_are_masked(lines) -> None:
    structlog.get_logger("x").warning("login", password="hunter2", client_secret="s")
    assert [lines()[0][name] for name in ("password", "client_secret")] == ["***", "***"]


def test_expected_errors_have_no_traceback(lines) -> None:
    log = structlog.get_logger("x")
    log.error("session.refused", exc_info=AccessDenied("wrong password"))
    try:
        1 / 0  # noqa: B018
    except ZeroDivisionError as error:
        log.warning("odd", exc_info=error)
    expected, odd = lines()
    assert (expected["error"], expected["kind"]) == ("wrong password", "AccessDenied")
    assert "exception" not in expected
    assert "ZeroDivisionError" in odd["exception"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_traceback_on_a_terminal_shows_no_values() -> None:
    stream = Terminal()
    configure_logging("info", stream=stream)
    passphrase = "hunter2" * 2
    try:
        int(passphrase[:3])
    except ValueError as error:
        structlog.get_logger("x").error("odd", exc_info=error)
    assert "ValueError" in stream.getvalue()
    assert "hunter2hunter2" not in stream.getvalue()


def test_less_severe_events_are_left_out(lines) -> None:
    structlog.get_logger("x").debug("noise")
    assert lines() == []


def test_a_program_that_configured_nothing_hears_warnings_on_stderr_only(
    capsys: pytest.CaptureFixture[str],
) -> None:
    structlog.reset_defaults()
    handlers = list(logging.getLogger().handlers)
    configure_library_logging()
    structlog.get_logger("x").info("session.connected")
    structlog.get_logger("x").warning("session.lost")
    heard = capsys.readouterr()
    assert heard.out == ""
    assert "session.lost" in heard.err
    assert "session.connected" not in heard.err
    assert logging.getLogger().handlers == handlers


def test_the_configuration_of_a_program_stays(lines) -> None:
    configure_library_logging()
    structlog.get_logger("x").info("task.ended")
    assert lines()[0]["event"] == "task.ended"
