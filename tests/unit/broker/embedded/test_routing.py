"""The subscription tree finds who gets a topic, and forgets who left."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.embedded.routing import SubscriptionTree, check_filter, check_topic
from capability_schemas.errors import InvalidTopic
from capability_schemas.topics import matches

LEVEL = st.sampled_from(["a", "b", "", "$s"])
TOPIC = st.lists(LEVEL, min_size=1, max_size=4).map("/".join).filter(bool)
FILTER = (
    st.tuples(
        st.lists(st.one_of(LEVEL, st.just("+")), min_size=0, max_size=4), st.sampled_from(["", "#"])
    )
    .map(lambda parts: "/".join([*parts[0], *filter(None, (parts[1],))]))
    .filter(bool)
)


@given(st.lists(st.tuples(st.sampled_from("xyz"), FILTER), max_size=12), TOPIC)
def test_the_tree_agrees_with_matching_filter_by_filter(subscriptions, topic):
    tree = SubscriptionTree()
    for session, topic_filter in subscriptions:
        tree.add(session, topic_filter, 1)
    assert dict(tree.match(topic)) == {s: 1 for s, f in subscriptions if matches(f, topic)}


@given(st.lists(st.tuples(st.sampled_from("xyz"), FILTER), max_size=12), TOPIC)
def test_removal_leaves_nothing_behind(subscriptions, topic):
    tree = SubscriptionTree()
    for session, topic_filter in subscriptions:
        tree.add(session, topic_filter, 1)
    tree.match(topic)
    for session, topic_filter in subscriptions[::2]:
        tree.remove(session, topic_filter)
    left = set(subscriptions) - set(subscriptions[::2])
    assert dict(tree.match(topic)) == {s: 1 for s, f in left if matches(f, topic)}
    for session in "xyz":
        tree.remove_session(session)
    assert tree.match(topic) == ()
    assert not tree._root.branches


def test_overlapping_filters_count_once_with_the_highest_quality_of_service():
    tree = SubscriptionTree()
    tree.add("x", "a/#", 0)
    tree.add("x", "a/+", 1)
    assert tree.match("a/b") == (("x", 1),)
    assert tree.match("a") == (("x", 0),)


def test_the_same_filter_again_replaces_its_quality_of_service():
    tree = SubscriptionTree()
    tree.add("x", "a", 1)
    assert tree.match("a") == (("x", 1),)
    tree.add("x", "a", 0)
    assert tree.match("a") == (("x", 0),)
    assert tree.filters("x") == {"a": 0}


@pytest.mark.parametrize("bad", ["", "a/#/b", "a#", "a/b+", "#/a", "a\0b", "x" * 65_536, "/" * 32])
def test_malformed_filters_are_refused(bad):
    with pytest.raises(InvalidTopic):
        check_filter(bad)


@pytest.mark.parametrize("bad", ["", "$SYS/x", "a/+", "a/#", "a\0"])
def test_topics_no_client_may_publish_to(bad):
    with pytest.raises(InvalidTopic):
        check_topic(bad)
