"""How a node goes on with an answer that another one has begun. Pure."""

from typing import Any, Final

from capability_schemas.capability import Continues
from capability_schemas.errors import ConfigurationError, ExecutionFailed
from capability_schemas.functions import FunctionSpec
from capability_schemas.invocation import Continuation
from node_agent.worker.frames import to_json

_FROM_TEXT: Final = frozenset({"llama_cpp", "xllamacpp", "openai"})
"""Runtimes that can go on behind a text."""

_BY_DEFAULT: Final = frozenset({"llama_cpp", "xllamacpp"})
"""Those that give the same answer for certain. Many servers of the OpenAI API begin anew."""


def continues_of(spec: FunctionSpec) -> Continues:
    """Return what becomes of an answer whose node is lost: as declared, or by the runtime."""
    if spec.continues is not None:
        return spec.continues
    return "prefix" if spec.runtime in _BY_DEFAULT else "restart"


def check_continues(spec: FunctionSpec) -> None:
    """Check that a function can do what it declares.

    Raises:
        ConfigurationError: Its runtime cannot go on behind a text.
    """
    if spec.continues in ("prefix", "any") and spec.runtime not in _FROM_TEXT:
        raise ConfigurationError(
            f'function {spec.name}: continues = "{spec.continues}" is for language models: a'
            f' {spec.runtime} function that says the same again can take "skip"'
        )
    if spec.idempotent and continues_of(spec) == "none":
        raise ConfigurationError(
            f'function {spec.name}: continues = "none" means at most once, idempotent means that'
            " twice is no harm: take one of them"
        )


def size_of(continuation: Continuation | None) -> int:
    """Return the bytes of what was shown by others, which count into the limit of an output."""
    return 0 if continuation is None else len(to_json(list(continuation.shown)).encode())


def shown_text(continuation: Continuation, spec: FunctionSpec) -> str:
    """Return the text that a model goes on behind.

    Raises:
        ExecutionFailed: What was shown is not text.
    """
    if len(continuation.shown) == 1 and isinstance(continuation.shown[0], str):
        return continuation.shown[0]
    raise ExecutionFailed(f"{spec.name} goes on behind text, and what was shown is none")


class Repetition:
    """Passes over what was shown of an answer that a function gives again from its beginning.

    Args:
        continuation: What was shown.
        function: Name of the function, for messages.
    """

    def __init__(self, continuation: Continuation, *, function: str) -> None:
        self._left: list[Any] = list(continuation.shown)
        self._function = function

    def fresh(self, data: Any) -> list[Any]:
        """Return what of a piece has not been shown: nothing, or the piece or its end.

        Raises:
            ExecutionFailed: It differs from what was shown.
        """
        if not self._left:
            return [data]
        expected = self._left[0]
        if isinstance(data, str) and isinstance(expected, str):
            common = min(len(data), len(expected))
            self._check(data[:common], expected[:common])
            if common < len(expected):
                self._left[0] = expected[common:]
                return []
            self._left.pop(0)
            rest = data[common:]
            return self.fresh(rest) if rest else []
        self._check(data, expected)
        self._left.pop(0)
        return []

    def end(self) -> None:
        """Take note of the end.

        Raises:
            ExecutionFailed: Less came than was shown.
        """
        if self._left:
            raise self._differs()

    def _check(self, data: Any, expected: Any) -> None:
        same = data == expected if isinstance(data, str) else to_json(data) == to_json(expected)
        if not same:
            raise self._differs()

    def _differs(self) -> ExecutionFailed:
        return ExecutionFailed(
            f"{self._function} gave another answer when it was run again than was shown of it"
            " before its node was lost: it is declared to give the same"
            ' (continues = "skip"), which does not hold',
            function=self._function,
        )
