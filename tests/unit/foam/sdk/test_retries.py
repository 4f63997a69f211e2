"""Asking again when there is no room."""

import random
from typing import Any

import pytest

from capability_schemas.errors import InvalidTask, NoCapableNode, Overloaded
from capability_schemas.ids import now_ms
from capability_schemas.reply import Result
from foam.sdk.client import MeshClient
from foam.sdk.retries import Retries

FULL = Overloaded("full", retry_after_ms=1_000)


def test_nobody_comes_back_before_the_mesh_says_and_not_all_at_once() -> None:
    tries = Retries(most=50, deadline=1e9, chance=random.Random(7))
    pauses = [tries.pause_s(FULL, 0.0) for _ in range(50)]
    assert all(pause is not None and 1.0 <= pause <= 1.5 for pause in pauses)
    assert len(set(pauses)) > 40
    assert tries.pause_s(FULL, 0.0) is None, "so often and no more"


def test_no_try_begins_after_the_deadline() -> None:
    assert Retries(most=5, deadline=10.0).pause_s(FULL, 9.5) is None
    assert Retries(most=5, deadline=20.0).pause_s(FULL, 9.5) is not None


@pytest.mark.parametrize("most", [-1, 101])
def test_an_absurd_number_of_tries_is_refused(most: int) -> None:
    with pytest.raises(InvalidTask, match="retries"):
        Retries(most=most, deadline=1.0)


@pytest.fixture
def mesh(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a client of which the first asks end as listed, and the others with a result."""
    client: Any = MeshClient("mqtt://127.0.0.1:1")
    client.asked, client.ends = [], []

    async def ask(text: str | None, **options: Any) -> Result:
        client.asked.append(options)
        if client.ends:
            raise client.ends.pop(0)
        return Result(task="t", at=now_ms(), seq=0, output="done")

    monkeypatch.setattr(client, "_ask", ask)
    return client


async def test_a_question_is_asked_again_until_there_is_room(mesh: Any) -> None:
    mesh.ends = [Overloaded("full", retry_after_ms=1) for _ in range(3)]
    assert (await mesh.ask("what now?", retries=5, timeout_s=30.0)).output == "done"
    times = [options["timeout_s"] for options in mesh.asked]
    assert len(times) == 4
    assert sorted(times, reverse=True) == times, "all tries share one time limit"


async def test_without_retries_the_first_answer_counts(mesh: Any) -> None:
    mesh.ends = [Overloaded("full", retry_after_ms=1)]
    with pytest.raises(Overloaded):
        await mesh.ask("what now?")
    assert len(mesh.asked) == 1


async def test_only_want_of_room_is_worth_another_try(mesh: Any) -> None:
    mesh.ends = [NoCapableNode("nobody")]
    with pytest.raises(NoCapableNode):
        await mesh.ask("what now?", retries=5)


async def test_a_task_with_an_id_is_not_tried_again(mesh: Any) -> None:
    with pytest.raises(InvalidTask, match="id"):
        await mesh.ask("what now?", retries=1, task_id="mine")
