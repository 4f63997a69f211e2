"""Topic grammar against the table of the protocol page."""

import pytest

from capability_schemas.errors import InvalidTopic, ProtocolError
from capability_schemas.topics import TOPICS, TopicKind, Topics, matches

LOCAL = Topics()


def test_build_fills_every_level():
    topic = LOCAL.build(TopicKind.REPLY, client="esp32-1", task="t1", source="edge-1")
    assert topic == "foam/v1/local/reply/esp32-1/t1/edge-1"


def test_filter_leaves_wildcards_for_open_levels():
    assert LOCAL.filter(TopicKind.REPORT, router="r1") == "foam/v1/local/report/r1/+"
    assert LOCAL.filter(TopicKind.CANCEL) == "foam/v1/local/task/+/cancel"


@pytest.mark.parametrize(
    "levels",
    [{}, {"client": "a", "node": "b"}, {"client": "a/b"}, {"client": ""}, {"client": "x" * 65}],
)
def test_build_refuses_wrong_levels(levels):
    with pytest.raises(ProtocolError):
        LOCAL.build(TopicKind.TASK, **levels)


@pytest.mark.parametrize(
    "topic",
    [
        "foam/v1/other/task/a",
        "foam/v1/local/task",
        "foam/v1/local/task/a/pause",
        "foam/v1/local/task/a.b",
        "foam/v1/local/node/a/mood",
        "foam/v1/local/task/+",
        "$SYS/broker/uptime",
        "",
    ],
)
def test_foreign_topics_do_not_parse(topic):
    with pytest.raises(InvalidTopic):
        LOCAL.parse(topic)


def test_site_and_prefix_are_part_of_the_grammar():
    plant = Topics(site="hall-3", prefix="acme/foam")
    assert plant.build(TopicKind.TASK, client="a") == "acme/foam/hall-3/task/a"
    assert plant.parse("acme/foam/hall-3/task/a").levels == {"client": "a"}


def test_a_prefix_may_not_push_topics_past_eight_levels():
    with pytest.raises(InvalidTopic):
        Topics(prefix="a/b/c/d")


def test_every_row_stays_within_eight_levels_and_avoids_system_topics():
    for spec in TOPICS.values():
        assert len(f"{LOCAL.root}/{spec.pattern}".split("/")) <= 8
        assert not spec.pattern.startswith("$")


@pytest.mark.parametrize(
    ("topic_filter", "topic", "expected"),
    [
        ("a/#", "a", True),
        ("a/#", "a/b/c", True),
        ("a/+", "a/", True),
        ("a/+", "a", False),
        ("+/b", "/b", True),
        ("#", "$SYS/x", False),
        ("+/x", "$SYS/x", False),
        ("$SYS/#", "$SYS/x", True),
        ("a/+/c", "a/b/c", True),
        ("a/b", "a/b/c", False),
    ],
)
def test_filters_match_as_mqtt_says(topic_filter, topic, expected):
    assert matches(topic_filter, topic) is expected
