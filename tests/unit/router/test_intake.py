import json
from typing import Any

import pytest

from capability_schemas.errors import ErrorCode, InvalidTopic, Overloaded
from capability_schemas.topics import Topics
from router.intake import Arrival, Intake, Refusal

TOPIC = "foam/v1/local/task/pump-7"


@pytest.fixture
def intake() -> Intake:
    return Intake(topics=Topics(), limit_bytes=4096, new_id=lambda mark, at: f"made-{at}")


def arrived(intake: Intake, **fields: Any) -> Arrival:
    read = intake.read(TOPIC, json.dumps(fields).encode(), 1_000)
    assert isinstance(read, Arrival)
    return read


def refused(intake: Intake, payload: bytes) -> Refusal:
    read = intake.read(TOPIC, payload, 1_000)
    assert isinstance(read, Refusal)
    return read


def test_plain_text_is_a_task_with_an_id_made_here(intake: Intake) -> None:
    read = intake.read(TOPIC, b"the pump vibrates", 1_000)
    assert isinstance(read, Arrival)
    assert read.key == ("pump-7", "made-1000")
    assert read.task.id == "made-1000"
    assert read.reply == "foam/v1/local/reply/pump-7/made-1000"
    assert read.deadline == 61_000


def test_a_function_reference_is_read(intake: Intake) -> None:
    read = arrived(intake, function="echo@>=1.2", id="a")
    assert read.function is not None
    assert read.function.name == "echo"
    assert not read.function.admits("1.1.0")


@pytest.mark.parametrize("wanted", ["reply/pump-7/inbox", "foam/v1/local/reply/pump-7/inbox"])
def test_reply_to_may_name_another_topic_of_the_client(intake: Intake, wanted: str) -> None:
    assert arrived(intake, text="x", reply_to=wanted).reply == "foam/v1/local/reply/pump-7/inbox"


@pytest.mark.parametrize(
    "wanted",
    [
        "reply/pump-8/inbox",
        "reply/pump-7",
        "reply/pump-7/a/b",
        "reply/pump-7/+",
        "foam/v1/other/reply/pump-7/a",
        "capability/pump-7/a",
        "reply/pump-7/",
    ],
)
def test_reply_to_outside_the_clients_subtree_is_refused(intake: Intake, wanted: str) -> None:
    read = refused(intake, json.dumps({"text": "x", "reply_to": wanted, "id": "a"}).encode())
    assert read.error.code is ErrorCode.INVALID_TASK
    assert read.error.detail["field"] == "reply_to"
    assert read.reply == "foam/v1/local/reply/pump-7/a"


@pytest.mark.parametrize(
    ("payload", "field"),
    [
        (b'{"text": "x", "id": "a", "tetx": 1}', "tetx"),
        (b'{"text": "x", "id": "a", "timeout_ms": -1}', "timeout_ms"),
        (b'{"text": "x", "id": "a", "function": "echo@newest"}', "function"),
        (b'{"text": " ", "id": "a"}', ""),
    ],
)
def test_a_bad_task_is_refused_under_its_own_id(intake: Intake, payload: bytes, field: str) -> None:
    read = refused(intake, payload)
    assert read.task_id == "a"
    assert read.named
    assert read.error.code is ErrorCode.INVALID_TASK
    assert read.error.detail["field"] == field


@pytest.mark.parametrize("payload", [b"\xff\xfe", b"", b"{", b'{"id": "a/b", "text": "x"}'])
def test_without_a_readable_id_the_refusal_gets_a_new_one(intake: Intake, payload: bytes) -> None:
    read = refused(intake, payload)
    assert read.task_id == "made-1000"
    assert not read.named


def test_a_task_over_the_limit_is_refused_under_its_own_id(intake: Intake) -> None:
    read = refused(intake, json.dumps({"text": "x" * 5_000, "id": "a"}).encode())
    assert read.error.code is ErrorCode.TOO_LARGE
    assert read.error.detail["limit_bytes"] == 4096
    assert read.named
    assert read.reply == "foam/v1/local/reply/pump-7/a"


def test_a_foreign_topic_has_nobody_to_answer(intake: Intake) -> None:
    with pytest.raises(InvalidTopic):
        intake.read("foam/v1/other/task/pump-7", b"x", 0)


def test_a_task_not_looked_at_is_refused_by_its_id(intake: Intake) -> None:
    error = Overloaded("full", retry_after_ms=5)
    assert intake.refuse(TOPIC, b'{"text": "x", "id": "a"}', error, 0).key == ("pump-7", "a")
    assert not intake.refuse(TOPIC, b" " * 5_000, error, 0).named
