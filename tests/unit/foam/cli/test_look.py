"""What ``foam functions`` makes of the answer of a router."""

from typing import Any

import pytest

from capability_schemas.errors import error_from_wire
from foam.cli import look
from foam.cli.admin import _limit
from foam.cli.app import complain


def _row(name: str, *, live: bool, load: dict[str, Any] | None) -> dict[str, Any]:
    return {"function": name, "version": "1.0.0", "node": "n", "live": live, "load": load}


def test_functions_that_crash_in_a_row_are_shown_as_degraded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def ask(*_: object, **__: object) -> dict[str, Any]:
        return {
            "functions": [
                _row("well", live=True, load={"degraded": False}),
                _row("unheard", live=True, load=None),
                _row("crashing", live=True, load={"degraded": True}),
                _row("gone", live=False, load={"degraded": True}),
            ]
        }

    monkeypatch.setattr(look, "ask_admin", ask)
    look.show(None, "functions", look._draw_functions)  # type: ignore[arg-type]  # not asked
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert {row[0]: row[3] for row in rows if row[1:2] == ["1.0.0"]} == {
        "well": "yes",
        "unheard": "yes",
        "crashing": "degraded",
        "gone": "no",
    }


def test_a_node_that_was_thrown_out_is_shown_as_revoked(
    capsys: pytest.CaptureFixture[str],
) -> None:
    look._draw_nodes(
        {
            "nodes": [
                {"node": "old", "state": "birth", "live": False, "revoked": True},
                {"node": "cut", "state": "birth", "live": False, "revoked": False},
                {"node": "well", "state": "birth", "live": True, "revoked": False},
            ]
        }
    )
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert {row[0]: row[1] for row in rows if row and row[0] in {"old", "cut", "well"}} == {
        "old": "revoked",
        "cut": "silent",
        "well": "ready",
    }


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("bytes_per_s", 64 * 1024 * 1024, "64 MiB"),
        ("bytes_per_s", 1_536, "1.5 KiB"),
        ("bytes_per_s", 500, "500 B"),
        ("bytes_per_s", None, ""),
        ("tasks_per_s", 2_000.0, "2000"),
    ],
)
def test_quotas_are_shown_in_units_people_read(name: str, value: float | None, shown: str) -> None:
    assert _limit(name, value) == shown


def test_who_is_over_quota_is_told_when_to_come_back(capsys: pytest.CaptureFixture[str]) -> None:
    told = error_from_wire("overloaded", "4 tasks per second", True, {"retry_after_ms": 1_250})
    assert complain(told) == 15
    assert capsys.readouterr().err == "foam: 4 tasks per second; try again in 1.25 s\n"
