"""Saying again what was said already: an answer that was begun elsewhere, gone on with here. Pure.

The text that was shown is no guess about the answer, it is the answer; what is not known are the
tokens it was made of. To cut a text into tokens anew may give others, after which a model goes on
differently. So the text serves as a draft in the sense of speculative decoding (Leviathan et al.,
arXiv 2211.17192): the model chooses every token itself, many in one decode, and as long as what it
chooses spells the shown text, those are the tokens of the first time. Where a sum of floating-point
numbers has come out differently and it would spell something else, the draft decides.
"""

from collections.abc import Callable
from typing import Final

from node_agent.worker.base import InvocationError

ANOTHER: Final = "the model does not say again what was shown of the answer"

DRAFTED: Final = 32
"""Most tokens drafted for one decode: each makes the engine write out a row of the vocabulary."""


class Echo:
    """The text that has to come again before anything of an answer is new, for any engine.

    Args:
        shown: The text.
    """

    def __init__(self, shown: str) -> None:
        self._left = shown

    def fresh(self, text: str) -> str:
        """Return what of a text has not been shown.

        Raises:
            InvocationError: ``execution_failed``: something else comes than what was shown.
        """
        common = min(len(text), len(self._left))
        if text[:common] != self._left[:common]:
            raise InvocationError("execution_failed", ANOTHER)
        self._left = self._left[common:]
        return text[common:]


class Repetition:
    """What is left to be said again of one answer.

    Args:
        shown: The text.
        tokenize: Cuts text into tokens, without marks around it.
        piece: Returns the bytes of a token; None for one that ends an answer.
    """

    def __init__(
        self,
        shown: str,
        *,
        tokenize: Callable[[str], list[int]],
        piece: Callable[[int], bytes | None],
    ) -> None:
        self._left = shown.encode()
        self._silent = shown
        self._tokenize = tokenize
        self._piece = piece
        self._draft: list[int] | None = None
        self.forced = 0

    @property
    def over(self) -> bool:
        """Whether all of the text was said again."""
        return not self._left

    def draft(self, most: int) -> list[int]:
        """Return tokens that spell what is left, or a part of it.

        Args:
            most: Most tokens.
        """
        if self._draft is None:
            self._draft = self._spelt()
        return self._draft[:most]

    def take(self, token: int) -> int | None:
        """Take the token that the model has chosen.

        Returns:
            The token that counts: the chosen one where it spells what comes next, else the drafted
            one; None when there is none that does.
        """
        if self.over:
            return token
        drafted = self.draft(1)
        if not self._fits(token):
            if not drafted:
                return None
            token = drafted[0]
            self.forced += 1
        spelt = self._piece(token) or b""
        self._left = self._left[len(spelt) :]
        self._draft = self._draft[1:] if self._draft and drafted == [token] else None
        return token

    def fresh(self, text: str) -> str:
        """Return what of a text that is being handed out has not been shown."""
        common = min(len(text), len(self._silent))
        self._silent = self._silent[common:]
        return text[common:]

    def _fits(self, token: int) -> bool:
        spelt = self._piece(token)
        if not spelt:
            return False
        return self._left.startswith(spelt) or spelt.startswith(self._left)

    def _spelt(self) -> list[int]:
        """Cut what is left into tokens, as far as these spell it (some tokenizers add a space)."""
        found, rest = [], self._left
        for token in self._tokenize(self._left.decode("utf-8", "ignore")):
            spelt = self._piece(token)
            if not spelt or not rest.startswith(spelt):
                break
            found.append(token)
            rest = rest[len(spelt) :]
        return found
