"""Which router has a task: the same answer everywhere."""

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capability_schemas.node import LOST, RouterState
from router.ownership import (
    GENERATION,
    Claim,
    RouterBook,
    first_attempt,
    generation_of,
    is_made_from,
    made_id,
    mark_of,
    rank,
)
from router.settings import RouterSettings

ROUTERS = ("router-1", "router-2", "router-3")


def state(router: str = "router-2", **fields: Any) -> RouterState:
    given: dict[str, Any] = {"router": router, "state": "birth", "epoch": 1, "at": 0}
    return RouterState(**given | fields)


def test_all_routers_see_the_same_order_whatever_the_order_they_know_them_in() -> None:
    for task in ("a", "b", "c"):
        assert rank(task, ROUTERS) == rank(task, reversed(ROUTERS))


def test_tasks_spread_and_only_those_of_a_lost_router_change_hands() -> None:
    owners = {f"t{number}": rank(f"t{number}", ROUTERS)[0] for number in range(3_000)}
    assert all(900 < count < 1_100 for count in Counter(owners.values()).values())
    left = {task: rank(task, ROUTERS[:2])[0] for task in owners}
    assert {task for task in owners if left[task] != owners[task]} == {
        task for task, owner in owners.items() if owner == "router-3"
    }


def test_no_router_makes_more_attempts_than_a_generation_holds() -> None:
    most = RouterSettings.model_fields["attempts"].metadata
    assert any(getattr(bound, "le", GENERATION) + 1 < GENERATION for bound in most)


@given(st.integers(0, 1_000))
def test_generations_do_not_overlap(generation: int) -> None:
    first = first_attempt(generation)
    assert generation_of(first) == generation == generation_of(first + GENERATION - 1)
    assert generation_of(first + GENERATION) == generation + 1
    assert generation_of(0) == 0


@given(st.text(max_size=8), st.binary(max_size=20), st.integers(0, 2**48 - 1))
def test_an_id_tells_which_task_it_was_made_for(client: str, payload: bytes, at: int) -> None:
    mark = mark_of(client, payload)
    made = made_id(mark, at)
    assert made[14] == "7"
    assert made[19] in "89ab"
    assert is_made_from(made, mark)
    assert not is_made_from(made, mark_of(client, payload + b"!"))
    assert not is_made_from(made.upper() + "x", mark)


def test_ids_of_later_tasks_sort_after_earlier_ones() -> None:
    mark = mark_of("pump-7", b"x")
    assert made_id(mark, 1) < made_id(mark, 2) < made_id(mark, 2**40)


def test_the_higher_generation_outranks_and_within_one_the_earlier_router() -> None:
    first, second = rank("t", ("router-1", "router-2"))
    assert Claim(second, 101).outranks(Claim(first, 1), "t")
    assert not Claim(first, 1).outranks(Claim(second, 101), "t")
    assert Claim(first, 1).outranks(Claim(second, 1), "t")
    assert not Claim(second, 1).outranks(Claim(first, 1), "t")
    assert not Claim(first, 1).outranks(Claim(first, 1), "t")


@pytest.fixture
def book() -> RouterBook:
    return RouterBook(own="router-1", heartbeat_s=1.0, missed=3)


def test_a_router_counts_from_its_birth_to_its_goodbye(book: RouterBook) -> None:
    assert book.alone
    assert book.order("t") == ["router-1"]
    assert book.hear(state(), 1_000) == "came"
    assert book.hear(state(), 2_000) is None  # a heartbeat
    assert set(book.order("t")) == {"router-1", "router-2"}
    assert book.hear(state(state="offline"), 2_500) == "gone"
    assert book.hear(state(state="offline"), 2_600) is None
    assert book.order("t") == ["router-1"]
    assert book.hear(state(epoch=2), 3_000) == "came"
    assert book.epoch_of("router-2") == 3_000
    assert book.hear(state(state="offline"), 3_100) is None  # the will of the process before


def test_the_will_of_one_that_was_refused_its_place_takes_nobody_away(book: RouterBook) -> None:
    unborn = state(state="offline", epoch=9, reason=LOST)
    assert book.hear(unborn, 0) is None
    assert book.hear(state(since=1), 0) == "came"
    assert book.hear(unborn, 0) is None
    assert book.is_live("router-2")
    assert book.hear(state(state="offline", epoch=1, reason=LOST), 0) == "gone"  # its birth counts


def test_a_router_that_starts_anew_unnoticed_has_come(book: RouterBook) -> None:
    book.hear(state(), 1_000)
    assert book.hear(state(epoch=2), 1_500) == "came"


def test_a_silent_router_is_gone_and_may_be_back(book: RouterBook) -> None:
    subject = next(f"t{n}" for n in range(99) if rank(f"t{n}", ROUTERS[:2])[0] == "router-2")
    book.hear(state(heartbeat_s=1.0), 1_000)
    assert book.silenced(3_900) == []
    assert book.silenced(4_100) == ["router-2"]
    assert book.silenced(4_200) == []
    assert book.order(subject) == ["router-1"]
    assert book.doubts(subject) == 1  # it may be alive and take the task, too
    assert book.hear(state(heartbeat_s=1.0), 9_000) == "came"
    assert book.doubts(subject) == 0


def test_nobody_is_silent_when_it_was_us_who_heard_nothing(book: RouterBook) -> None:
    book.hear(state(heartbeat_s=1.0), 1_000)
    book.wake_all(60_000)
    assert book.silenced(62_000) == []


def test_a_removed_router_is_forgotten(book: RouterBook) -> None:
    book.hear(state(), 1_000)
    assert book.forget("router-2")
    assert book.alone
    assert not book.forget("router-2")


def test_a_router_that_was_thrown_out_is_gone_whatever_it_says(book: RouterBook) -> None:
    book.hear(state(), 1_000)
    assert book.revoke("router-2", revoked=True)
    assert not book.revoke("router-2", revoked=True)
    assert "router-2" not in book
    assert book.hear(state(), 2_000) is None
    assert book.hear(state(epoch=2), 3_000) is None
    assert book.order("t") == ["router-1"]
    assert not book.revoke("router-2", revoked=False)
    assert "router-2" in book
    assert book.order("t") == ["router-1"]  # until it says that it is there
    assert book.hear(state(epoch=2), 4_000) == "came"


def test_a_revocation_may_come_before_the_router(book: RouterBook) -> None:
    assert not book.revoke("router-2", revoked=True)
    assert book.hear(state(), 1_000) is None
    assert "router-2" not in book
    assert not book.is_live("router-2")
