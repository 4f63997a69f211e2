"""Schemas from signatures, and arguments from inputs."""

from collections.abc import AsyncIterator, Generator, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from node_agent.functions import Answer, InvocationContext, function
from node_agent.worker.base import InvocationError, Request
from node_agent.worker.describe import input_schema, output_schema
from node_agent.worker.python_host import Signature, load_entry


@dataclass
class Point:
    x: int


def request(value, text=None):
    return Request(id="r", input=value, text=text)


def test_parameters_become_properties():
    def target(a: float, kind: Literal["x", "y"] = "x", *, context: InvocationContext): ...

    assert input_schema(target) == {
        "type": "object",
        "properties": {
            "a": {"type": "number"},
            "kind": {"enum": ["x", "y"], "type": "string", "default": "x"},
        },
        "required": ["a"],
        "additionalProperties": False,
    }


def test_a_parameter_called_title_survives():
    def target(title: str): ...

    assert input_schema(target)["properties"] == {"title": {"type": "string"}}


def test_open_functions_take_more():
    def target(**anything): ...

    assert input_schema(target)["additionalProperties"] is True


def test_what_cannot_be_passed_by_name_is_refused():
    def target(*values): ...

    with pytest.raises(InvocationError, match="by name"):
        input_schema(target)


def plain() -> int:
    return 1


def texts() -> Iterator[str]:
    yield ""


async def numbers() -> AsyncIterator[int]:
    yield 1


def returns() -> Generator[str, None, bool]:
    yield ""
    return True


def silent(): ...
def anything() -> Any: ...


def sure() -> Answer[int]:
    return Answer(1, confidence=0.5)


def sure_at_times() -> str | Answer[str]:
    return ""


def sure_of_anything() -> Answer:  # type: ignore[type-arg]  # bare, as an author may write it
    return Answer(1, confidence=0.5)


def thinks_aloud() -> Iterator[str | Answer[None]]:
    yield ""


@pytest.mark.parametrize(
    ("target", "schema"),
    [
        (plain, {"type": "integer"}),
        (texts, {"type": "string"}),
        (numbers, {"type": "array", "items": {"type": "integer"}}),
        (returns, {"type": "boolean"}),
        (silent, None),
        (anything, None),
        (sure, {"type": "integer"}),
        (sure_at_times, {"type": "string"}),
        (sure_of_anything, None),
        (thinks_aloud, {"type": "string"}),
    ],
)
def test_the_return_annotation_becomes_the_output(target, schema):
    assert output_schema(target) == schema


def test_inputs_become_arguments_of_their_types():
    def target(p: Point, text: str, context: InvocationContext, n: int = 3): ...

    arguments = Signature(target).arguments(request({"p": {"x": "4"}}, text="words"))
    assert arguments["p"] == Point(4)
    assert arguments["text"] == "words"
    assert isinstance(arguments["context"], InvocationContext)
    assert "n" not in arguments


def test_words_are_not_forced_on_a_function_that_does_not_ask_for_them():
    def target(a: int): ...

    assert Signature(target).arguments(request({"a": 1, "text": "add one"})) == {"a": 1}


def test_a_plain_value_goes_to_the_only_parameter():
    def target(values: list[float], context: InvocationContext): ...

    assert Signature(target).arguments(request([1, 2]))["values"] == [1, 2]


@pytest.mark.parametrize("value", [{"a": 1, "b": 2}, {"p": {"x": "no number"}}])
def test_inputs_that_do_not_fit_are_invalid_tasks(value):
    def target(a: int = 0, p: Point | None = None): ...

    with pytest.raises(InvocationError) as raised:
        Signature(target).arguments(request(value))
    assert raised.value.code == "invalid_task"


@pytest.mark.parametrize("entry", ["nothing", "no_such_module_at_all:f", "json:nothing", "x.py:f"])
def test_a_wrong_entry_says_what_is_wrong(entry):
    with pytest.raises(InvocationError):
        load_entry(entry)


@pytest.mark.parametrize("confidence", [-0.1, 1.01, float("nan")])
def test_a_confidence_is_a_share(confidence):
    with pytest.raises(ValueError, match="use 0 to 1"):
        Answer("x", confidence)


def test_the_decorator_returns_the_function_itself():
    def target(a: int) -> int:
        return a

    assert function(target) is target
    assert function(version="2.0.0")(target)(3) == 3


@pytest.mark.parametrize(
    "wrong", [{"concurrency": 0}, {"timeout_s": 0}, {"continues": "prefix"}, {"continues": "?"}]
)
def test_the_decorator_refuses_impossible_values(wrong):
    with pytest.raises(ValueError, match="use"):
        function(**wrong)
