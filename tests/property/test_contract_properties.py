"""Laws of the contract that hold for every input."""

import json

import rfc8785
from hypothesis import given
from hypothesis import strategies as st

from capability_schemas.errors import InvalidTask, InvalidTopic, TooLarge
from capability_schemas.reply import Chunk, decode_reply
from capability_schemas.signing import canonical_bytes
from capability_schemas.task import Task, decode_task
from capability_schemas.topics import TOPICS, TopicKind, Topics, matches
from capability_schemas.wire import encode

IDS = st.from_regex(r"\A[A-Za-z0-9_-]{1,64}\Z")
KINDS = st.sampled_from(list(TopicKind))
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
LEVELS = st.sampled_from(["a", "b", "", "$s", "+", "#"])


@given(KINDS, st.data())
def test_a_built_topic_parses_back_and_its_filters_match(kind, data):
    topics = Topics(site=data.draw(IDS))
    levels = {name: data.draw(IDS) for name in TOPICS[kind].variables}
    topic = topics.build(kind, **levels)
    parsed = topics.parse(topic)
    assert (parsed.kind, parsed.levels) == (kind, levels)
    pinned = {name: value for name, value in levels.items() if data.draw(st.booleans())}
    assert matches(topics.filter(kind, **pinned), topic)


@given(st.text())
def test_any_topic_parses_or_is_refused(topic):
    try:
        Topics().parse("foam/v1/local/" + topic)
    except InvalidTopic:
        return


def reference_match(topic_filter: list[str], topic: list[str]) -> bool:
    """MQTT 3.1.1 section 4.7.1, by recursion."""
    if not topic_filter:
        return not topic
    if topic_filter[0] == "#":
        return True
    if not topic:
        return False
    return topic_filter[0] in {"+", topic[0]} and reference_match(topic_filter[1:], topic[1:])


@given(
    st.lists(LEVELS, min_size=1, max_size=5),
    st.lists(st.sampled_from(["a", "b", ""]), min_size=1, max_size=5),
)
def test_matching_agrees_with_the_standard(wanted, given_levels):
    if "#" in wanted:
        wanted = wanted[: wanted.index("#") + 1]
    expected = reference_match(wanted, given_levels)
    assert matches("/".join(wanted), "/".join(given_levels)) is expected


@given(st.binary(max_size=200))
def test_any_bytes_are_a_task_or_a_named_refusal(payload):
    outcome: Task | str | None
    try:
        outcome = decode_task(payload, limit_bytes=150)
    except TooLarge:
        outcome = None
    except InvalidTask as error:
        outcome = error.message
    assert (outcome is None) is (len(payload) > 150)
    assert outcome != ""


@given(st.dictionaries(st.sampled_from([*Task.model_fields, "other"]), JSON, max_size=6))
def test_any_object_is_a_task_or_a_refusal_that_names_its_field(fields):
    try:
        named = decode_task(json.dumps(fields).encode()) is not None
    except InvalidTask as error:
        named = "field" in error.detail
    assert named


@given(JSON, st.integers(min_value=0, max_value=2**31))
def test_chunks_survive_the_wire(data, seq):
    sent = Chunk(task="t", at=1, seq=seq, data=data)
    assert decode_reply(encode(sent)) == sent


@given(st.dictionaries(st.text(), JSON, max_size=5))
def test_canonical_bytes_ignore_order_and_the_signature(fields):
    shuffled = dict(reversed(fields.items())) | {"signature": "x"}
    assert canonical_bytes(fields | {"signature": "y"}) == canonical_bytes(shuffled)


@given(JSON)
def test_canonical_bytes_are_those_of_rfc_8785(value):
    """Whichever way they are made; integers that it has no words for stand as strings."""
    assert canonical_bytes({"x": value}) == rfc8785.dumps({"x": _in_words(value)})


def _in_words(value):
    if isinstance(value, dict):
        return {key: _in_words(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_in_words(item) for item in value]
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 2**53:
        return str(value)
    return value
