"""Keywords: which of thousands stand in a text, whole words only, blind to case."""

import re
import unicodedata
from collections.abc import Iterable
from typing import Final

_WORD: Final = re.compile(r"[^\W_]+")
_BETWEEN: Final = re.compile(r"[\s\-'\u2019/._,:]")
_SIGNS: Final = {code: " " for code in range(128) if not chr(code).isalnum()}
_UNSPACED: Final = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\U00020000-\U0003ffff]"
)
"""Scripts written without spaces: Thai, Lao, Burmese, Khmer, kana, Han."""


def words_of(text: str) -> list[str]:
    """Return the words of a text as they are compared: compatible forms made one, case folded."""
    if text.isascii():  # the same, several times faster
        return text.lower().translate(_SIGNS).split()
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def needle_of(keyword: str) -> str:
    """Return what a keyword is looked for as in ``" the words of a text "``.

    Spaces at its ends mean that a word begins or ends there; a ``*`` leaves them away, and so do
    scripts without spaces.

    Args:
        keyword: A word or several, as written; ``*`` in front or behind for words that end or
            begin so.

    Raises:
        ValueError: It holds no word, or signs that are no part of words.
    """
    bare = keyword.removeprefix("*").removesuffix("*")
    words = words_of(bare)
    if not words:
        raise ValueError(f"{keyword!r} holds no word")
    rest = _BETWEEN.sub("", _WORD.sub("", unicodedata.normalize("NFKC", bare).casefold()))
    if "*" in rest:
        raise ValueError(f"{keyword!r}: a * stands in front of everything or behind it")
    if rest:
        raise ValueError(f"{keyword!r} holds {rest[0]!r}, which is no part of a word: use regex")
    phrase = " ".join(words)
    if _UNSPACED.search(phrase):
        return phrase
    return f"{'' if keyword[0] == '*' else ' '}{phrase}{'' if keyword[-1] == '*' else ' '}"


class WordIndex:
    """Finds needles in texts; the time does not grow with the number of plain ones.

    Plain needles, whole words on both ends, are looked up: every run of as many words as some
    needle has. The others (with a ``*``, or without spaces) cost one search of the text each.

    Args:
        needles: As ``needle_of`` returns them; the number of a needle is its place.
    """

    def __init__(self, needles: Iterable[str]) -> None:
        self._plain: dict[int, dict[str, int]] = {}
        self._open: list[tuple[int, str]] = []
        for number, needle in enumerate(needles):
            if needle[0] == needle[-1] == " ":
                phrase = needle.strip()
                self._plain.setdefault(phrase.count(" ") + 1, {})[phrase] = number
            else:
                self._open.append((number, needle))

    def found(self, text: str) -> set[int]:
        """Return the numbers of the needles that stand in a text."""
        if not self._plain and not self._open:
            return set()
        words = words_of(text)
        joined = f" {' '.join(words)} "
        numbers = {number for number, needle in self._open if needle in joined}
        for length, phrases in self._plain.items():
            runs = zip(*(words[start:] for start in range(length)), strict=False)
            there = phrases.keys() & (words if length == 1 else map(" ".join, runs))
            numbers.update(phrases[phrase] for phrase in there)
        return numbers
