"""What of an explanation deserves a column."""

from typing import Any

from foam.cli.look import telling_terms


def _row(similarity: float, value: float, **terms: float) -> dict[str, Any]:
    return {"similarity": {"score": similarity}, "value": value, "terms": terms}


def test_terms_that_say_nothing_have_no_column() -> None:
    rows = [
        _row(0.5, 0.4, sim=0.5, gates=1.0, alpha=0.5, load=0.1, cost=0.0),
        _row(0.3, 0.0, sim=0.3, gates=0.0, alpha=0.0, load=0.0, cost=0.0),
    ]
    columns, same = telling_terms(rows)
    assert columns == ["gates", "alpha", "load"]
    assert same == {"cost": 0.0}


def test_nobody_has_no_terms() -> None:
    assert telling_terms([]) == ([], {})
