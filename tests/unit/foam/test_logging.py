import io
import json

import pytest
import structlog

from capability_schemas.errors import AccessDenied
from foam.logging import configure_logging


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


def test_less_severe_events_are_left_out(lines) -> None:
    structlog.get_logger("x").debug("noise")
    assert lines() == []
