"""Codec, errors on the wire, functions, signatures and the written contract."""

import json
from typing import Any

import pytest
from pydantic import ValidationError

from capability_schemas import errors, export
from capability_schemas.capability import CapabilityClaim
from capability_schemas.errors import (
    BadSignature,
    ConfigurationError,
    ErrorCode,
    InvalidTask,
    MalformedPayload,
    Overloaded,
    TooLarge,
    error_from_wire,
)
from capability_schemas.functions import FunctionSpec, check_input, effective_input
from capability_schemas.invocation import Report
from capability_schemas.node import NodeState
from capability_schemas.reply import Chunk, ErrorEvent, Result, decode_reply
from capability_schemas.signing import SigningKey, digest, sign, verify
from capability_schemas.topics import TOPICS
from capability_schemas.wire import decode, encode


def claim(**changes: Any) -> CapabilityClaim:
    fields: dict[str, Any] = {
        "node": "edge-1",
        "function": "triage",
        "version": "1.0.0",
        "epoch": 7,
        "revision": 1,
        "description": "Judge an alert",
    }
    return CapabilityClaim(**(fields | changes))


def test_events_tell_their_kind_and_survive_the_wire():
    sent = Chunk(task="t", at=1, seq=0, data={"a": None})
    assert encode(sent).startswith(b'{"v":1,"task":"t","event":"chunk"')
    assert decode_reply(encode(sent)) == sent


@pytest.mark.parametrize(
    "event", [Chunk(task="t", at=1, seq=0, data=None), Result(task="t", at=1, seq=0)]
)
def test_null_answers_stay_on_the_wire(event):
    field = "data" if isinstance(event, Chunk) else "output"
    assert json.loads(encode(event))[field] is None
    assert decode_reply(encode(event)) == event


def test_decode_names_the_field_and_ignores_what_it_does_not_know():
    good = {"node": "n", "state": "birth", "epoch": 1, "at": 2, "colour": "red"}
    assert decode(NodeState, json.dumps(good).encode()).state == "birth"
    with pytest.raises(MalformedPayload) as caught:
        decode(NodeState, json.dumps(good | {"epoch": "soon"}).encode())
    assert caught.value.detail["field"] == "epoch"
    with pytest.raises(TooLarge):
        decode(NodeState, b" " * 11, limit_bytes=10)


def test_another_major_version_is_refused():
    with pytest.raises(MalformedPayload):
        decode(NodeState, b'{"v":2,"node":"n","state":"birth","epoch":1,"at":2}')


@pytest.mark.parametrize("code", list(ErrorCode))
def test_every_code_survives_the_wire_as_an_exception(code):
    raised = error_from_wire(code, "why", True, {"field": "x"})
    assert (raised.code, raised.remote) == (code, True)


def test_codes_of_a_newer_peer_are_kept_as_a_plain_error():
    raised = error_from_wire("from_the_future", "why", True)
    assert type(raised) is errors.FoamError
    assert raised.retryable


def test_an_error_event_carries_fields_and_comes_back():
    event = ErrorEvent.from_error(
        Overloaded("queue is full", retry_after_ms=250), task="t", at=1, seq=3
    )
    back = decode(ErrorEvent, encode(event)).to_error()
    assert isinstance(back, Overloaded)
    assert back.retry_after_ms == 250


def test_words_of_a_task_reach_a_function_that_has_a_place_for_them():
    schema = {"type": "object", "properties": {"text": {"type": "string"}}}
    assert effective_input("hi", None, schema) == {"text": "hi"}
    assert effective_input("hi", {"text": "mine"}, schema) == {"text": "mine"}
    assert effective_input("hi", {"a": 1}, {"type": "object", "properties": {"a": {}}}) == {"a": 1}
    assert effective_input("hi", [1], None) == [1]


def test_input_that_breaks_the_schema_names_the_path():
    schema = {
        "type": "object",
        "properties": {"samples": {"type": "array", "items": {"type": "number"}}},
        "required": ["samples"],
    }
    check_input({"samples": [1, 2.5]}, schema)
    with pytest.raises(InvalidTask) as caught:
        check_input({"samples": [1, "x"]}, schema)
    assert caught.value.detail["field"] == "input.samples[1]"


def test_a_schema_cannot_make_the_node_fetch_anything():
    with pytest.raises(InvalidTask, match="cannot be resolved"):
        check_input({}, {"$ref": "http://127.0.0.1:9/schema.json"})


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"version": "1"}, "version"),
        ({"name": "a b"}, "name"),
        ({"input_schema": {"type": "objekt"}}, "input_schema"),
        ({"runtme": "python"}, "runtme"),
        ({"concurrency": 0}, "concurrency"),
    ],
)
def test_declarations_are_checked(change, problem):
    fields: dict[str, Any] = {"name": "f", "description": "d"} | change
    with pytest.raises(ValidationError) as caught:
        FunctionSpec(**fields)
    assert caught.value.errors()[0]["loc"][0] == problem


def test_a_signature_covers_every_field_even_unknown_ones():
    key = SigningKey.generate()
    payload = encode(sign(claim(), key))
    verify(payload, key.public)
    altered = json.loads(payload) | {"description": "Do anything"}
    extended = json.loads(payload) | {"grants": ["root"]}
    for forged in (altered, extended):
        with pytest.raises(BadSignature):
            verify(json.dumps(forged).encode(), key.public)


def test_a_signature_does_not_depend_on_spelling():
    key = SigningKey.generate()
    fields = json.loads(encode(sign(claim(), key)))
    respelled = json.dumps(dict(reversed(fields.items())), indent=1).encode()
    verify(respelled, key.public)


@pytest.mark.parametrize("signature", [None, "", "?", "AAAA", 5])
def test_missing_and_malformed_signatures_are_refused(signature):
    fields = json.loads(encode(claim())) | {"signature": signature}
    with pytest.raises(BadSignature):
        verify(json.dumps(fields).encode(), SigningKey.generate().public)


def test_another_key_does_not_verify():
    with pytest.raises(BadSignature):
        verify(sign(claim(), SigningKey.generate()), SigningKey.generate().public)


def test_integers_beyond_double_precision_have_a_digest():
    assert digest(2**60) != digest(2**60 + 1)


def test_a_key_is_kept_for_its_owner_only_and_never_overwritten(tmp_path):
    path = tmp_path / "key.pem"
    key = SigningKey.generate()
    key.save(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert SigningKey.load(path).public == key.public
    with pytest.raises(ConfigurationError):
        SigningKey.generate().save(path)
    path.write_bytes(b"not a key")
    with pytest.raises(ConfigurationError):
        SigningKey.load(path)


def test_a_key_never_shows_its_private_half():
    key = SigningKey.generate()
    assert repr(key) == f"SigningKey(public={key.public!r})"


def test_written_contracts_are_what_the_models_say():
    written = {path.name: path.read_text("utf-8") for path in export.FOLDER.glob("*.json")}
    assert written == export.documents(), "run: python -m capability_schemas.export"


def test_every_json_topic_has_a_written_message():
    for spec in TOPICS.values():
        assert spec.payload in export.MESSAGES or "binary" in spec.payload


def test_the_tables_of_the_protocol_page_are_what_the_code_says():
    page = export.PROTOCOL_PAGE.read_text("utf-8")
    assert export.with_tables(page) == page, "run: python -m capability_schemas.export"


def test_a_page_without_a_table_mark_is_refused():
    with pytest.raises(ConfigurationError, match="task"):
        export.with_tables("<!-- table: topics --><!-- end -->")


def test_asyncapi_references_resolve():
    document = export.asyncapi()
    messages = document["components"]["messages"]
    for channel in document["channels"].values():
        for message in channel["messages"].values():
            assert message["$ref"].rsplit("/", 1)[1] in messages
    for message in messages.values():
        if "payload" in message:
            assert (export.FOLDER / message["payload"]["$ref"]).is_file()


@pytest.mark.parametrize(
    "field", [{"seq": 2**60}, {"seq": -1}, {"retry_after_ms": -1}, {"confidence": 2.0}]
)
def test_a_report_holds_no_number_that_means_nothing(field: dict[str, Any]) -> None:
    report = {"task": "t", "client": "c", "attempt": 1, "node": "n", "status": "unsure"}
    decode(Report, json.dumps(report).encode())
    with pytest.raises(MalformedPayload, match=next(iter(field))):
        decode(Report, json.dumps(report | field).encode())
    with pytest.raises(MalformedPayload, match="confidence"):
        decode(Report, json.dumps(report | {"confidence": float("nan")}).encode())


@pytest.mark.parametrize(
    ("model", "fields"),
    [
        (Report, {"task": "t", "client": "c", "node": "n", "status": "running", "attempt": 10**30}),
        (NodeState, {"node": "n", "state": "sleeping", "epoch": 1, "at": 1, "wake_at": 10**25}),
        (NodeState, {"node": "n", "state": "sleeping", "epoch": 1, "at": -(10**25)}),
        (Result, {"task": "t", "at": 1, "seq": 0, "attempt": 10**30}),
    ],
    ids=["attempt", "wake_at", "at", "attempt of a result"],
)
def test_numbers_that_nobody_can_count_with_are_refused(model: Any, fields: dict[str, Any]) -> None:
    with pytest.raises(MalformedPayload, match="Input should be"):
        decode(model, json.dumps(fields).encode())
