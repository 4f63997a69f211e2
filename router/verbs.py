"""What the verbs of administration share: their arguments checked, their lists cut into pages."""

import asyncio
from bisect import bisect_right
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, Final, TypeVar

from capability_schemas.errors import InvalidTask, NotFound
from router.catalogue import Fleet, Key

Answer = dict[str, Any]
Verb = Callable[[dict[str, Any]], Awaitable[Answer]]

_PAGE: Final = 200
_LONGEST_PAGE: Final = 500
_ROWS_PER_TURN: Final = 64
_T = TypeVar("_T")


def only(args: dict[str, Any], *allowed: str) -> None:
    """Refuse arguments a verb does not have, so that a typing error is heard of.

    Raises:
        InvalidTask: There is such an argument.
    """
    unknown = sorted(set(args) - set(allowed))
    if unknown:
        takes = ", ".join(allowed) or "none"
        raise InvalidTask(
            f"unknown argument {unknown[0]!r}; this verb takes: {takes}", field="args"
        )


def whole(args: dict[str, Any], name: str, *, default: int, most: int) -> int:
    """Return an argument that is a number of rows, 1 to ``most``.

    Raises:
        InvalidTask: It is not.
    """
    value = args.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise InvalidTask(
            f"{name} is a whole number from 1 to {most}, not {value!r:.40}", field=name
        )
    return value


def word(args: dict[str, Any], name: str) -> str | None:
    """Return an argument that is a text, or None where it is not given.

    Raises:
        InvalidTask: It is something else.
    """
    value = args.get(name)
    if value is not None and not isinstance(value, str):
        raise InvalidTask(f"{name} is a text, not {value!r:.40}", field=name)
    return value


def flag(args: dict[str, Any], name: str) -> bool:
    """Return an argument that is true or false; false where it is not given.

    Raises:
        InvalidTask: It is something else.
    """
    value = args.get(name, False)
    if not isinstance(value, bool):
        raise InvalidTask(f"{name} is true or false, not {value!r:.40}", field=name)
    return value


def named_keys(fleet: Fleet, args: dict[str, Any]) -> Sequence[Key]:
    """Return the keys of all records in order, or of those of ``node``, of ``function``.

    Raises:
        InvalidTask: One of the two is no text.
        NotFound: The node is not known, or nobody offers the function.
    """
    node, function = word(args, "node"), word(args, "function")
    if node is not None and node not in fleet.nodes and not fleet.functions(node):
        raise NotFound(f"node {node} is not known here", node=node)
    if function is not None and not fleet.named(function):
        raise NotFound(f"no node offers a function {function}", function=function)
    if function is not None:
        return [(held, function) for held in sorted(fleet.named(function)) if node in {None, held}]
    if node is not None:
        return [(node, name) for name in fleet.functions(node)]
    return fleet.keys


async def key_page(
    keys: Sequence[Key], args: dict[str, Any], name: str, describe: Callable[[Key], Answer | None]
) -> Answer:
    """Answer with one page of a long list of ``node/function``; as ``name_page``."""
    after = word(args, "after")
    node, _, function = (after or "").partition("/")
    first = 0 if after is None else bisect_right(keys, (node, function))
    shown, more = _cut(keys, first, args)
    following = "/".join(shown[-1]) if more else None
    return {name: await _rows(shown, describe), "total": len(keys), "next": following}


async def name_page(
    names: Sequence[str], args: dict[str, Any], name: str, describe: Callable[[str], Answer | None]
) -> Answer:
    """Answer with one page of a long list.

    Args:
        names: The list, ascending.
        args: ``limit`` and ``after`` are looked at.
        name: What the rows are called in the answer.
        describe: Makes a row; None leaves it out.

    Returns:
        The rows, ``total``, and ``next``: what ``after`` is for the next page, or null.

    Raises:
        InvalidTask: ``limit`` or ``after`` does not fit.
    """
    after = word(args, "after")
    shown, more = _cut(names, 0 if after is None else bisect_right(names, after), args)
    following = shown[-1] if more else None
    return {name: await _rows(shown, describe), "total": len(names), "next": following}


def _cut(items: Sequence[_T], first: int, args: dict[str, Any]) -> tuple[Sequence[_T], bool]:
    """Return a page of a list, and whether more follows."""
    limit = whole(args, "limit", default=_PAGE, most=_LONGEST_PAGE)
    return items[first : first + limit], first + limit < len(items)


async def _rows(items: Iterable[_T], describe: Callable[[_T], Answer | None]) -> list[Answer]:
    """Describe many things, a few a turn: tasks come in between."""
    rows = []
    for count, item in enumerate(items):
        row = describe(item)
        if row is not None:
            rows.append(row)
        if count % _ROWS_PER_TURN == _ROWS_PER_TURN - 1:
            await asyncio.sleep(0)
    return rows
