"""What ``foam functions`` makes of the answer of a router."""

from typing import Any

import pytest

from foam.cli import look


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
