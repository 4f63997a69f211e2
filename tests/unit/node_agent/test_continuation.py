"""What a node needs to go on with an answer that another one has begun."""

from typing import Any

import pytest

from capability_schemas.errors import ConfigurationError, ExecutionFailed
from capability_schemas.functions import FunctionSpec
from capability_schemas.invocation import Continuation
from node_agent.continuation import (
    Repetition,
    check_continues,
    continues_of,
    shown_text,
    size_of,
)


def spec(runtime: str = "python", **fields: Any) -> FunctionSpec:
    given = {"name": "f", "description": "d", "runtime": runtime, **fields}
    return FunctionSpec.model_validate(given)


def passed(shown: tuple[Any, ...], *pieces: Any) -> list[Any]:
    again = Repetition(Continuation(shown=shown, chunks=1), function="f")
    fresh = [one for piece in pieces for one in again.fresh(piece)]
    again.end()
    return fresh


@pytest.mark.parametrize(
    ("shown", "pieces", "fresh"),
    [
        (("abc",), ("ab", "cd", "e"), ["d", "e"]),
        (("abc",), ("abc", "d"), ["d"]),
        (("a", {"n": 1}, "b"), ("a", {"n": 1}, "bc", {"n": 2}), ["c", {"n": 2}]),
        (({"n": 1.0, "m": None},), ({"n": 1.0, "m": None}, 2), [2]),
        ((None,), (None, None), [None]),
    ],
)
def test_what_was_shown_is_passed_over(shown: Any, pieces: Any, fresh: list[Any]) -> None:
    assert passed(shown, *pieces) == fresh


@pytest.mark.parametrize(
    ("shown", "pieces"),
    [(("abc",), ("abd",)), (("abc",), ("ab",)), (({"n": 1},), ({"n": 2},)), (("1",), (1,))],
)
def test_anything_else_is_an_error(shown: Any, pieces: Any) -> None:
    with pytest.raises(ExecutionFailed, match="another answer"):
        passed(shown, *pieces)


def test_language_models_go_on_by_themselves() -> None:
    assert continues_of(spec("llama_cpp")) == "prefix"
    assert continues_of(spec("openai")) == "restart"
    assert continues_of(spec("openai", continues="any")) == "any"
    assert continues_of(spec()) == "restart"


def test_what_a_runtime_cannot_do_is_a_mistake_of_the_declaration() -> None:
    with pytest.raises(ConfigurationError, match="for language models"):
        check_continues(spec(continues="prefix"))
    with pytest.raises(ConfigurationError, match="at most once"):
        check_continues(spec(continues="none", idempotent=True))
    check_continues(spec(continues="skip", idempotent=True))


def test_a_model_goes_on_behind_text_only() -> None:
    assert shown_text(Continuation(shown=("ab",), chunks=2), spec()) == "ab"
    with pytest.raises(ExecutionFailed):
        shown_text(Continuation(shown=("ab", 1), chunks=2), spec())
    assert size_of(None) == 0
    assert size_of(Continuation(shown=("ab",), chunks=1)) > 2
