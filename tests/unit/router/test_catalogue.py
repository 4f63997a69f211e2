from typing import Any

import pytest

from capability_schemas.capability import CatalogRecord
from capability_schemas.node import NodeLoad, NodeState
from capability_schemas.wire import MAX_COUNT
from router.catalogue import Fleet


def state(presence: Any = "birth", epoch: int = 10, node: str = "n1") -> NodeState:
    return NodeState(node=node, state=presence, epoch=epoch, at=0, load_interval_s=1.0)


def load(epoch: int = 10, **fields: Any) -> NodeLoad:
    values: dict[str, Any] = {"node": "n1", "epoch": epoch, "at": 0}
    return NodeLoad(**(values | fields))


def record(revision: int = 1, **fields: Any) -> CatalogRecord:
    values: dict[str, Any] = {
        "node": "n1",
        "function": "echo",
        "version": "1.0.0",
        "epoch": 10,
        "revision": revision,
        "description": "Repeat the text.",
        "registry": "registry-1",
        "admitted_at": 0,
        "claim_digest": "sha256:0",
    }
    return CatalogRecord(**(values | fields))


@pytest.fixture
def fleet() -> Fleet:
    fleet = Fleet()
    fleet.hear_state(state(), 0)
    return fleet


def test_a_node_is_live_and_open_after_its_birth(fleet: Fleet) -> None:
    assert fleet.node("n1").live
    assert fleet.node("n1").open
    assert not fleet.node("stranger").live


def test_offline_of_the_same_epoch_loses_its_work(fleet: Fleet) -> None:
    assert fleet.hear_state(state("offline"), 1) is not None
    assert not fleet.node("n1").live


def test_a_will_of_an_earlier_process_kills_nobody(fleet: Fleet) -> None:
    assert fleet.hear_state(state("offline", epoch=9), 1) is None
    assert fleet.node("n1").live


def test_a_birth_again_in_the_same_epoch_loses_nothing(fleet: Fleet) -> None:
    assert fleet.hear_state(state(), 1) is None


def test_a_new_epoch_means_the_earlier_work_is_lost(fleet: Fleet) -> None:
    assert fleet.hear_state(state(epoch=11), 1) == "the node started anew"
    assert fleet.node("n1").live
    assert fleet.hear_load(load(epoch=12), 2) == "the node started anew"


def test_three_missed_heartbeats_silence_a_node_once(fleet: Fleet) -> None:
    assert fleet.silenced(3_000) == []
    assert fleet.silenced(3_001) == ["n1"]
    assert fleet.silenced(9_000) == []
    assert not fleet.node("n1").live
    assert fleet.hear_load(load(), 9_500) is None
    assert fleet.node("n1").live


def test_a_heartbeat_of_before_the_silence_revives_nobody(fleet: Fleet) -> None:
    for at in (1_000, 500_000, 499_000):  # the last one comes late
        fleet.hear_load(load(at=at), 500_000)
    assert fleet.silenced(503_001) == ["n1"]
    for at in (499_999, 480_000, 200_001):
        assert fleet.hear_load(load(at=at), 503_100) is None
        assert not fleet.node("n1").live
    fleet.hear_load(load(at=500_001), 503_200)
    assert fleet.node("n1").live


def test_a_clock_that_was_set_back_does_not_keep_a_node_away(fleet: Fleet) -> None:
    fleet.hear_load(load(at=4_000_000), 500_000)
    assert fleet.silenced(503_001) == ["n1"]
    fleet.hear_load(load(at=400_000), 503_100)
    assert fleet.node("n1").live


def test_a_load_that_a_will_overtook_revives_nobody(fleet: Fleet) -> None:
    fleet.hear_state(state("offline"), 1)
    fleet.hear_load(load(), 2)
    assert not fleet.node("n1").live


def test_heartbeats_of_the_process_after_a_will_count_without_its_birth() -> None:
    fleet = Fleet()  # of a router that starts after the will of the process before came late
    fleet.hear_state(NodeState(node="n1", state="offline", epoch=9, at=0, since=1), 0, kept=True)
    assert fleet.hear_load(load(epoch=8), 1) is None
    assert fleet.hear_load(load(epoch=9), 2) is None
    assert not fleet.node("n1").live
    assert fleet.hear_load(load(epoch=10), 3) == "the node started anew"
    assert fleet.node("n1").live


def test_heartbeats_count_against_a_will_whose_birth_nobody_heard() -> None:
    fleet = Fleet()
    fleet.hear_state(state("offline", epoch=11), 0, kept=True)
    assert fleet.hear_load(load(epoch=11), 1) is None
    assert not fleet.node("n1").live
    assert fleet.hear_load(load(epoch=10), 2) is None
    assert fleet.node("n1").live
    assert fleet.node("n1").epoch == 10


def test_being_cut_off_ourselves_silences_nobody(fleet: Fleet) -> None:
    fleet.wake_all(60_000)
    assert fleet.silenced(61_000) == []


def test_draining_and_cordoned_nodes_are_live_but_closed(fleet: Fleet) -> None:
    assert fleet.hear_state(state("draining"), 1) is None
    assert fleet.node("n1").live
    assert not fleet.node("n1").open
    fleet.hear_state(state(), 2)
    fleet.cordon(["n1"])
    assert not fleet.node("n1").open
    fleet.cordon(["n1"], closed=False)
    assert fleet.node("n1").open


def test_a_node_that_went_to_sleep_is_not_live(fleet: Fleet) -> None:
    assert fleet.hear_state(state("sleeping"), 1) == "the node is sleeping"


def test_an_emptied_state_topic_removes_the_node(fleet: Fleet) -> None:
    assert fleet.forget_state("n1")
    assert not fleet.forget_state("n1")
    assert not fleet.forget_state("stranger")


def test_an_older_record_is_no_news(fleet: Fleet) -> None:
    assert fleet.admit(record(2))
    assert not fleet.admit(record(1))
    assert not fleet.admit(record(2))
    assert fleet.admit(record(3))
    assert fleet.named("echo") == {"n1": record(3)}
    assert fleet.withdraw(("n1", "echo"))
    assert not fleet.withdraw(("n1", "echo"))


def test_busy_takes_the_greater_of_its_word_and_ours(fleet: Fleet) -> None:
    view = fleet.node("n1")
    assert view.busy == 0
    fleet.hear_load(load(running=1, capacity=4, queue_limit=2), 1)
    assert view.busy == 0.25
    view.assigned = 2
    assert view.busy == 0.5
    fleet.hear_load(load(running=4, queued=2, capacity=4, queue_limit=2), 2)
    assert view.full
    assert view.busy == 1.0


def test_records_are_found_by_name_and_by_node_and_listed_in_order(fleet: Fleet) -> None:
    for node, function in (("n2", "echo"), ("n1", "weld"), ("n1", "echo"), ("n10", "echo")):
        fleet.admit(record(node=node, function=function))
    assert list(fleet.keys) == [("n1", "echo"), ("n1", "weld"), ("n10", "echo"), ("n2", "echo")]
    assert set(fleet.named("echo")) == {"n1", "n2", "n10"}
    assert fleet.functions("n1") == ["echo", "weld"]
    assert fleet.functions("n3") == []
    assert fleet.admit(record(2, version="2.0.0"))
    assert fleet.named("echo")["n1"].version == "2.0.0"
    assert len(fleet.keys) == 4


def test_what_is_withdrawn_is_in_no_index(fleet: Fleet) -> None:
    fleet.admit(record())
    fleet.admit(record(node="n2"))
    assert fleet.withdraw(("n1", "echo"))
    assert not fleet.withdraw(("n1", "echo"))
    assert (list(fleet.keys), set(fleet.named("echo"))) == ([("n2", "echo")], {"n2"})
    assert "echo" in fleet.names
    fleet.withdraw(("n2", "echo"))
    assert (list(fleet.keys), dict(fleet.named("echo")), len(fleet.names)) == ([], {}, 0)


# ---- members that were thrown out


def test_a_revoked_node_is_gone_whatever_it_says(fleet: Fleet) -> None:
    fleet.hear_load(load(), 1)
    assert fleet.revoke("n1") == "the node was revoked"
    assert not fleet.node("n1").live
    assert fleet.revoke("n1") is None  # its tasks were lost once
    fleet.hear_load(load(), 2)
    assert fleet.hear_state(state(epoch=11), 3) is not None
    assert not fleet.node("n1").live
    assert fleet.silenced(10**9) == []
    assert fleet.revoke("n1", revoked=False) is None
    assert fleet.node("n1").live


def test_a_member_that_is_heard_of_after_its_revocation_is_not_live(fleet: Fleet) -> None:
    assert fleet.revoke("n2") is None
    assert "n2" not in fleet.nodes  # it may be no node at all
    fleet.hear_state(state(node="n2"), 0)
    assert not fleet.node("n2").live


def asleep(*, at: int, wake_at: int | None, epoch: int = 10) -> NodeState:
    return NodeState(node="n1", state="sleeping", epoch=epoch, at=at, wake_at=wake_at, since=1)


def test_a_sleeper_is_neither_live_nor_gone_until_it_is_overdue(fleet: Fleet) -> None:
    fleet.hear_state(asleep(at=7_000_000, wake_at=7_060_000), 1_000)  # its clock is wrong
    view = fleet.node("n1")
    assert [view.asleep, view.live, view.open] == [True, False, False]
    assert view.wake_at == 61_000
    assert fleet.silenced(61_000 + 3_000) == []
    assert fleet.node("n1").asleep
    assert fleet.silenced(61_000 + 3_001) == []  # nobody counted on it: nothing is lost
    assert not fleet.node("n1").asleep
    assert fleet.node("n1").wake_at is None
    assert fleet.hear_state(state(), 90_000) is None
    assert fleet.node("n1").live


def test_waking_in_time_says_nothing_about_the_line(fleet: Fleet) -> None:
    patience_ms = fleet.node("n1").pulse.patience_ms
    fleet.hear_state(asleep(at=0, wake_at=600_000), 0)
    assert fleet.hear_state(state(), 600_000) is None
    assert fleet.node("n1").live
    assert fleet.node("n1").pulse.patience_ms == patience_ms


@pytest.mark.parametrize(
    ("now", "left_ms"),
    [(120_000, 40_000), (200_000, 0), (5, 60_000)],
    ids=["said a while ago", "should be back", "of a clock ahead of ours"],
)
def test_a_kept_word_about_sleep_may_be_old(now: int, left_ms: int) -> None:
    fleet = Fleet()
    fleet.hear_state(asleep(at=100_000, wake_at=160_000), now, kept=True)
    assert fleet.node("n1").wake_at == now + left_ms


def test_who_does_not_say_when_it_wakes_is_waited_for_without_end(fleet: Fleet) -> None:
    fleet.hear_state(asleep(at=0, wake_at=None), 0)
    assert fleet.silenced(10**12) == []
    assert fleet.node("n1").asleep


def test_a_router_that_was_away_itself_gives_a_sleeper_its_time_again(fleet: Fleet) -> None:
    fleet.hear_state(asleep(at=0, wake_at=60_000), 0)
    fleet.wake_all(3_600_000)
    assert fleet.silenced(3_600_001) == []
    assert fleet.node("n1").asleep


def test_a_will_of_a_process_that_was_never_announced_kills_nobody(fleet: Fleet) -> None:
    second = NodeState(node="n1", state="offline", epoch=11, at=0, reason="connection lost")
    assert fleet.hear_state(second, 1) is None
    assert fleet.node("n1").live
    assert fleet.hear_load(load(), 2) is None
    goodbye = second.model_copy(update={"since": 5})
    assert fleet.hear_state(goodbye, 3) is not None
    assert not fleet.node("n1").live


def test_a_will_without_a_birth_does_not_stand_in_the_way_of_an_earlier_process() -> None:
    fleet = Fleet()  # of a router that has just started, and finds the second process's will kept
    fleet.hear_state(state("offline", epoch=11), 0, kept=True)
    assert not fleet.node("n1").live
    assert fleet.hear_state(state(epoch=10), 1) is None
    assert fleet.node("n1").live
    assert fleet.hear_state(state(epoch=11), 2) == "the node started anew"


def test_what_a_registry_writes_that_was_replaced_is_passed_over(fleet: Fleet) -> None:
    assert fleet.admit(record(revision=3, term=7, registry="registry-2"))
    assert not fleet.admit(record(revision=3, term=6, description="Say it twice."))
    assert not fleet.admit(record(revision=4, term=6))
    assert not fleet.admit(record(revision=4))
    assert fleet.admit(record(revision=3, term=8, description="Say it thrice."))
    assert fleet.records["n1", "echo"].term == 8


# ---- lost a moment ago

WILL = state("offline")
GOODBYE = WILL.model_copy(update={"at": 5})


def waited_for(fleet: Fleet, now: int) -> bool:
    return not fleet.node("n1").live and fleet.node("n1").just_lost(now)


@pytest.fixture
def patient() -> Fleet:
    fleet = Fleet(grace_ms=5_000)
    fleet.hear_state(state(), 0)
    return fleet


def test_a_node_that_was_lost_is_waited_for_for_a_moment(patient: Fleet) -> None:
    patient.hear_state(WILL, 1_000)
    assert [waited_for(patient, now) for now in (1_000, 5_999, 6_000)] == [True, True, False]
    assert patient.node("n1").back_by == 6_000


def test_one_that_fell_silent_is_waited_for_and_its_late_will_changes_nothing(
    patient: Fleet,
) -> None:
    assert patient.silenced(60_000) == ["n1"]
    patient.hear_state(WILL, 64_000)
    assert [waited_for(patient, now) for now in (64_999, 65_000)] == [True, False]


def test_nobody_waits_for_who_said_that_it_goes(patient: Fleet) -> None:
    patient.hear_state(GOODBYE, 1)
    assert not waited_for(patient, 1)
    patient.hear_state(state(epoch=11), 2)
    patient.hear_load(load(epoch=11).model_copy(update={"at": 6}), 3)
    patient.hear_state(state("offline", epoch=11).model_copy(update={"at": 5}), 4)
    assert waited_for(patient, 4), "written before its last load: a will"


@pytest.mark.parametrize("way", ["draining", "sleeping"])
def test_nor_for_one_that_took_no_work_any_more(patient: Fleet, way: str) -> None:
    patient.hear_state(state(way), 1)
    patient.hear_state(WILL, 2)
    patient.silenced(10**9)
    assert not waited_for(patient, 2)
    assert patient.node("n1").lost_at is None


def test_nor_for_one_that_was_thrown_out_or_removed(patient: Fleet) -> None:
    patient.hear_state(WILL, 1)
    patient.revoke("n1")
    assert not waited_for(patient, 2)
    patient.revoke("n1", revoked=False)
    assert waited_for(patient, 2)
    patient.forget_state("n1")
    assert not waited_for(patient, 2)


def test_nor_for_one_that_was_away_before_anybody_listened() -> None:
    fleet = Fleet(grace_ms=5_000)
    fleet.hear_state(WILL, 1, kept=True)
    assert not waited_for(fleet, 1)


def test_a_clock_that_was_set_back_makes_no_wait_longer(patient: Fleet) -> None:
    patient.hear_state(WILL, 10**9)
    assert not waited_for(patient, 5)


def test_one_that_was_started_anew_unnoticed_is_just_back(patient: Fleet) -> None:
    patient.hear_state(state(epoch=11), 1_000)
    assert patient.node("n1").live
    assert [patient.node("n1").just_lost(now) for now in (1_000, 6_000)] == [True, False]


def test_without_grace_nobody_is_waited_for(fleet: Fleet) -> None:
    fleet.hear_state(WILL, 1)
    assert not fleet.node("n1").just_lost(1)


def test_a_sleep_of_centuries_is_not_believed(fleet: Fleet) -> None:
    now = 1_700_000_000_000
    fleet.hear_state(asleep(at=1, wake_at=MAX_COUNT), now)
    wake_at = fleet.node("n1").wake_at
    assert wake_at is not None
    assert now < wake_at < now + 500 * 86_400_000
