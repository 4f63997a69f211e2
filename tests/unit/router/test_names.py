"""Which known names a mistyped one may mean."""

import pytest

from router.names import NameIndex


def index_of(*names: str) -> NameIndex:
    index = NameIndex()
    for name in names:
        index.add(name)
    return index


@pytest.mark.parametrize(
    ("asked", "meant"),
    [("ecko", "echo"), ("Echo", "echo"), ("summarize", "summarise"), ("readmeter", "read_meter")],
)
def test_the_likeliest_comes_first(asked: str, meant: str) -> None:
    index = index_of("echo", "summarise", "read_meter", "translate", "open_valve")
    (name, likeness), *_ = index.nearest(asked, 3)
    assert name == meant
    assert likeness > 0.5


def test_few_names_are_all_compared_and_the_count_holds() -> None:
    index = index_of("echo", "translate")
    assert [name for name, _ in index.nearest("zzz", 5)] == ["echo", "translate"]
    assert len(index.nearest("zzz", 1)) == 1
    assert index.nearest("zzz", 0) == []
    assert NameIndex().nearest("zzz", 3) == []


def test_among_thousands_only_those_that_share_parts_are_compared() -> None:
    index = index_of(*(f"pump_{n}" for n in range(5_000)), "summarise_report")
    assert index.nearest("sumarise_report", 1)[0][0] == "summarise_report"
    assert index.nearest("qqqq", 3) == []


def test_a_forgotten_name_is_not_meant_any_more() -> None:
    index = index_of("echo", "echo", "translate")
    assert len(index) == 2
    index.discard("echo")
    index.discard("unknown")
    assert "echo" not in index
    assert [name for name, _ in index.nearest("ecko", 3)] == ["translate"]
