"""Name patterns, and the door to RE2: expressions whose search takes time linear in the text.

A backtracking engine can be held up for minutes by one text that a client made for it. RE2 (Cox,
"Regular Expression Matching in the Wild", 2010) cannot: it knows no look-around and no back
references, and in return every search is one pass. Its memory is bounded too, per expression.
"""

import fnmatch
import functools
import re
from collections.abc import Callable, Iterable
from typing import Any, Final

import re2

_MAGIC: Final = re.compile(r"[*?\[]")
_MEMORY_BYTES: Final = 8 * 1024 * 1024
_PROGRAM: Final = 5_000
"""Most instructions of one expression; ``\\pL`` alone has about 800, so several of it still fit."""


def is_literal(pattern: str) -> bool:
    """Tell whether a name pattern stands for one name only."""
    return _MAGIC.search(pattern) is None


class Globs:
    """Some name patterns, any of which may fit: ``*``, ``?`` and ``[abc]`` as in file names.

    Args:
        patterns: The patterns; case counts.
    """

    __slots__ = ("_fits", "literals", "patterns")

    def __init__(self, patterns: Iterable[str]) -> None:
        self.patterns = tuple(patterns)
        self.literals = frozenset(filter(is_literal, self.patterns))
        wild = [fnmatch.translate(one) for one in self.patterns if one not in self.literals]
        self._fits = re.compile("|".join(wild)).match if wild else None

    @property
    def exact(self) -> bool:
        """Whether every pattern stands for one name."""
        return self._fits is None

    def match(self, name: str | None) -> bool:
        """Tell whether a name fits; no name never does."""
        if name is None:
            return False
        return name in self.literals or (self._fits is not None and self._fits(name) is not None)

    def match_any(self, names: Iterable[str]) -> bool:
        """Tell whether one of some names fits."""
        return any(map(self.match, names))


def covers(patterns: Iterable[str], pattern: str) -> bool:
    """Tell whether everything that fits one pattern certainly fits one of the others."""
    return any(
        other in (pattern, "*") or (is_literal(pattern) and _fits(pattern, other))
        for other in patterns
    )


def disjoint(one: str, other: str) -> bool:
    """Tell whether certainly no name fits both patterns: their fixed starts or ends disagree."""
    if is_literal(one) or is_literal(other):
        return not (_fits(one, other) if is_literal(one) else _fits(other, one))
    return any(
        not (a.startswith(b) or b.startswith(a))
        for a, b in (
            (_MAGIC.split(one)[0], _MAGIC.split(other)[0]),
            (_fixed_end(one)[::-1], _fixed_end(other)[::-1]),
        )
    )


def _fits(name: str, pattern: str) -> bool:
    if is_literal(pattern):
        return name == pattern
    # the start first: fnmatch compiles patterns, and remembers few
    return name.startswith(_MAGIC.split(pattern)[0]) and fnmatch.fnmatchcase(name, pattern)


def _fixed_end(pattern: str) -> str:
    return "" if "[" in pattern else re.split(r"[*?]", pattern)[-1]


@functools.lru_cache(maxsize=1_024)
def compile_expression(expression: str) -> Callable[[str], Any]:
    """Return the search function of a regular expression (RE2 syntax).

    Args:
        expression: The expression. ``(?i)`` in front makes it blind to case.

    Raises:
        ValueError: RE2 does not take it, or it is too large; the text says why.
    """
    try:
        compiled = _compiled(expression)
    except re2.error as exc:
        reason = exc.args[0].decode(errors="replace") if exc.args else "unreadable"
        looks = " (no look-around or back references)" if "perl operator" in reason else ""
        raise ValueError(f"is no regular expression of RE2: {reason}{looks}") from exc
    if compiled.programsize > _PROGRAM:
        raise ValueError(
            f"makes {compiled.programsize} instructions, at most {_PROGRAM}: repeat less, or "
            "write several rules"
        )
    search: Callable[[str], Any] = compiled.search
    return search


def any_of(expressions: Iterable[str]) -> Callable[[str], bool]:
    """Return a function that tells whether one of some expressions may be found in a text.

    It goes over the text once, however many they are. False is certain.

    Args:
        expressions: Each of them compiles.
    """
    joined = "|".join(f"(?:{one})" for one in sorted(expressions))
    if not joined:
        return lambda _: False
    try:
        search = _compiled(joined).search
    except re2.error:  # together they are too large
        return lambda _: True
    return lambda text: search(text) is not None


def _compiled(expression: str) -> Any:
    options = re2.Options()
    options.max_mem = _MEMORY_BYTES
    options.never_capture = True  # whether it is there, not where: that keeps to the fast automaton
    options.log_errors = False
    return re2.compile(expression, options)
