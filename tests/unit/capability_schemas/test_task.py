"""What a client may publish, and how each mistake is named."""

import json

import pytest

from capability_schemas.errors import ErrorCode, InvalidTask, TooLarge
from capability_schemas.task import (
    FunctionRef,
    Task,
    TaskPolicy,
    decode_task,
    peek_task_id,
    skim_task_id,
)
from capability_schemas.wire import encode


@pytest.mark.parametrize(
    "payload", [b"turn the pump off", b"42", b'"quoted"', b"[1, 2]", b"true", "zu heiß".encode()]
)
def test_anything_but_an_object_is_text(payload):
    assert decode_task(payload) == Task(text=payload.decode())


def test_defaults_are_those_of_the_protocol():
    task = decode_task(b'{"text": "hello"}')
    assert (task.timeout_ms, task.priority, task.stream, task.collaborate) == (
        60_000,
        5,
        True,
        "auto",
    )


@pytest.mark.parametrize(
    ("payload", "field", "says"),
    [
        (b"", "text", "empty"),
        (b"  \n", "text", "empty"),
        (b"\xff\xfe", "", "not UTF-8 at byte 0"),
        (b'{"text": "a"', "", "not JSON"),
        (b'{"text": NaN}', "", "NaN is not JSON"),
        (b'{"text": "a", "txet": 1}', "txet", "unknown field"),
        (b'{"text": "a", "policy": {"zone": "x"}}', "policy.zone", "unknown field"),
        (b'{"text": 5}', "text", "valid string"),
        (b'{"text": "a", "skills": "x"}', "skills", "should be an array"),
        (b'{"text": "a", "policy": 5}', "policy", "should be an object"),
        (b'{"text": " "}', "", "text is empty"),
        (b'{"input": {}}', "", "text is missing"),
        (b'{"text": "a", "timeout_ms": "5"}', "timeout_ms", "valid integer"),
        (b'{"text": "a", "timeout_ms": -1}', "timeout_ms", "greater than or equal to 0"),
        (b'{"text": "a", "priority": 10}', "priority", "less than or equal to 9"),
        (b'{"text": "a", "stream": "yes"}', "stream", "valid boolean"),
        (b'{"text": "a", "policy": {"local_only": "yes"}}', "policy.local_only", "valid boolean"),
        (b'{"text": "a", "policy": {"max_cost": "3"}}', "policy.max_cost", "valid number"),
        (b'{"text": "a", "id": "a/b"}', "id", "pattern"),
        (b'{"text": "a", "id": "trailing\\n"}', "id", "pattern"),
        (b'{"text": "a", "input": 1e999}', "", "too large a number"),
        (b'{"function": "f", "input": ' + b"[" * 300 + b"]" * 300 + b"}", "", "more than 128 deep"),
        (b'{"text": "a", "input": "\\ud800"}', "", "surrogate"),
        (b'{"text": "a", "collaborate": "always"}', "collaborate", "'never'"),
    ],
)
def test_each_mistake_is_named(payload, field, says):
    with pytest.raises(InvalidTask) as caught:
        decode_task(payload)
    assert caught.value.code is ErrorCode.INVALID_TASK
    assert caught.value.detail["field"] == field
    assert says in caught.value.message


def test_deep_nesting_is_refused_not_a_crash():
    with pytest.raises(InvalidTask):
        decode_task(b'{"input": ' + b"[" * 200_000 + b"]" * 200_000 + b"}")


def test_whatever_is_accepted_can_be_sent_on():
    deepest = b'{"function": "f", "input": ' + b"[" * 127 + b"]" * 127 + b"}"
    assert decode_task(encode(decode_task(deepest))) == decode_task(deepest)


def test_size_is_checked_before_anything_is_parsed():
    with pytest.raises(TooLarge) as caught:
        decode_task(b"\xff" * 11, limit_bytes=10)
    assert caught.value.detail == {"size_bytes": 11, "limit_bytes": 10}


@pytest.mark.parametrize(
    ("payload", "found"),
    [
        (b'{"id": "t-1", "bogus": 1}', "t-1"),
        (b'{"id": "not an id"}', None),
        (b'{"id": 7}', None),
        (b"plain", None),
        (b"\xff", None),
    ],
)
def test_the_id_of_a_broken_task_is_found_for_the_refusal(payload, found):
    assert peek_task_id(payload) == found


@pytest.mark.parametrize(
    ("payload", "found"),
    [
        (b'{"id": "t-1", "text": "%s"}', "t-1"),
        (b' { "v": 1, "stream": true, "id" : "t-1", "input": ["%s"]}', "t-1"),
        (b'{"text": "%s", "id": "t-1"}', "t-1"),
        (b'{"text": "%s", "id":"t-1", "timeout_ms": 500, "session": "s"}\n', "t-1"),
        (b'{"text": "%s", "input": {"a": 1, "id": "t-1"}}', None),
        (b'{"input": {"id": "t-1"}, "text": "%s"}', None),
        (b'{"text": "%s", "id": "a/b"}', None),
        (b'{"text": "%s, \\"id\\": \\"t-1\\"}', None),
        (b'%s, "id": "t-1"}', None),
    ],
)
def test_the_id_of_a_task_too_large_to_parse_is_found_at_its_ends(payload, found):
    assert skim_task_id(payload % (b"x" * 20_000)) == found


@pytest.mark.parametrize(
    ("reference", "version", "admitted"),
    [
        ("spectrum", "0.1.0", True),
        ("spectrum@>=1.2", "1.2.0", True),
        ("spectrum@>=1.2", "1.1.9", False),
        ("spectrum@>=1.2,<2", "2.0.0", False),
        ("spectrum@1.2.3", "1.2.3", True),
        ("spectrum@^1.2", "1.9.0", True),
    ],
)
def test_version_ranges(reference, version, admitted):
    assert FunctionRef.parse(reference).admits(version) is admitted


@pytest.mark.parametrize("reference", ["", "a b", "a@", "a@newest", "a@>=one"])
def test_bad_references_are_refused(reference):
    with pytest.raises(InvalidTask) as caught:
        FunctionRef.parse(reference)
    assert caught.value.detail["field"] == "function"


def test_unknown_fields_outside_the_task_are_ignored():
    task = json.dumps({"text": "a", "policy": {"zones": ["hall-3"]}}).encode()
    assert decode_task(task).policy.zones == ("hall-3",)


def test_policies_add_up():
    first = TaskPolicy(zones=("a", "b"), data="internal", max_cost=2.0, grants=("x",))
    second = TaskPolicy(zones=("b", "c"), data="private", local_only=True, grants=("x", "y"))
    both = TaskPolicy(
        zones=("b",), data="private", max_cost=2.0, local_only=True, grants=("x", "y")
    )
    assert first.narrowed(second) == both
    assert second.narrowed(first) == both
    assert TaskPolicy().narrowed(first) == first
    assert TaskPolicy().narrowed(TaskPolicy()) == TaskPolicy()
