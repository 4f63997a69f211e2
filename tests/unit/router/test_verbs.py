"""Arguments and pages of administration."""

from typing import Any

import pytest

from capability_schemas.errors import InvalidTask, NotFound
from router.catalogue import Fleet
from router.verbs import flag, key_page, name_page, named_keys, only, whole, word
from support.capabilities import bare_record


def test_an_unknown_argument_is_named_with_those_that_exist() -> None:
    only({"limit": 1}, "limit", "after")
    with pytest.raises(InvalidTask, match="unknown argument 'limt'; this verb takes: limit, after"):
        only({"limt": 1}, "limit", "after")
    with pytest.raises(InvalidTask, match="takes: none"):
        only({"x": 1})


@pytest.mark.parametrize("value", [0, 501, -1, True, "5", 2.5, None])
def test_a_limit_outside_its_range_is_refused(value: Any) -> None:
    with pytest.raises(InvalidTask, match="limit is a whole number from 1 to 500"):
        whole({"limit": value}, "limit", default=5, most=500)


def test_texts_and_flags_are_what_they_say() -> None:
    assert (word({}, "node"), word({"node": "n1"}, "node")) == (None, "n1")
    assert (flag({}, "reset"), flag({"reset": True}, "reset")) == (False, True)
    with pytest.raises(InvalidTask, match="node is a text"):
        word({"node": 5}, "node")
    with pytest.raises(InvalidTask, match="reset is true or false"):
        flag({"reset": "yes"}, "reset")


async def _pages(fleet: Fleet, limit: int, **args: Any) -> list[list[str]]:
    pages: list[list[str]] = []
    after: dict[str, str] = {}
    while True:
        asked = {"limit": limit, **args, **after}
        answer = await key_page(
            named_keys(fleet, asked), asked, "rows", lambda key: {"key": "/".join(key)}
        )
        pages.append([row["key"] for row in answer["rows"]])
        if answer["next"] is None:
            return pages
        after = {"after": answer["next"]}


async def test_pages_hold_every_row_once_whatever_the_names() -> None:
    fleet = Fleet()
    for node in ("a", "a-b", "a_b", "a0", "b"):
        for function in ("x", "x-y", "x_y"):
            fleet.admit(bare_record(node, function))
    keys = ["/".join(key) for key in fleet.keys]
    for limit in (1, 2, 7, 15, 100):
        pages = await _pages(fleet, limit)
        assert [key for page in pages for key in page] == keys
        assert all(len(page) <= limit for page in pages)
    assert await _pages(fleet, 100, node="a-b") == [["a-b/x", "a-b/x-y", "a-b/x_y"]]
    assert await _pages(fleet, 2, function="x") == [["a/x", "a-b/x"], ["a0/x", "a_b/x"], ["b/x"]]
    assert await _pages(fleet, 2, node="a", function="x") == [["a/x"]]


async def test_a_page_goes_on_where_its_last_row_was_withdrawn() -> None:
    names = ["a", "b", "c", "d"]
    first = await name_page(names, {"limit": 2}, "nodes", lambda name: {"node": name})
    assert (first["next"], first["total"]) == ("b", 4)
    names.remove("b")
    second = await name_page(
        names, {"limit": 2, "after": "b"}, "nodes", lambda name: {"node": name}
    )
    assert [row["node"] for row in second["nodes"]] == ["c", "d"]
    assert second["next"] is None


def test_who_is_misspelt_is_not_an_empty_list() -> None:
    fleet = Fleet()
    fleet.admit(bare_record("a", "x"))
    with pytest.raises(NotFound, match="node b is not known"):
        named_keys(fleet, {"node": "b"})
    with pytest.raises(NotFound, match="no node offers a function y"):
        named_keys(fleet, {"function": "y"})
    assert named_keys(fleet, {"node": "a", "function": "x"}) == [("a", "x")]
