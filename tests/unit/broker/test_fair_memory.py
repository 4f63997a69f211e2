"""What one client leaves costs another nothing."""

from broker.fair_memory import FairMemory


def test_the_latest_of_each_id_counts() -> None:
    memory: FairMemory[int] = FairMemory(limit=2)
    assert memory.put(("a", "1"), 1) is None
    assert memory.put(("a", "1"), 2) is None
    assert (len(memory), memory.get(("a", "1")), memory.get(("a", "2"))) == (1, 2, None)
    assert ("a", "1") in memory
    assert memory.pop(("a", "1")) == 2
    assert memory.pop(("a", "1")) is None
    assert ("a", "1") not in memory
    assert len(memory) == 0


def test_a_flood_pushes_out_its_own() -> None:
    memory: FairMemory[int] = FairMemory(limit=10)
    for number in range(3):
        memory.put((f"quiet-{number}", "t"), number)
    dropped = [memory.put(("loud", str(number)), 100 + number) for number in range(1_000)]
    assert len(memory) == 10
    assert sorted(memory.values()) == [0, 1, 2, *range(1_093, 1_100)]
    assert dropped[7:] == list(range(100, 1_093))


def test_a_newcomer_takes_the_place_of_whoever_has_most() -> None:
    memory: FairMemory[str] = FairMemory(limit=4)
    for number in range(4):
        memory.put(("loud", str(number)), str(number))
    assert memory.put(("quiet", "t"), "t") == "0"
    assert ("quiet", "t") in memory


def test_as_many_clients_as_there_is_room_for_lose_nothing_to_themselves() -> None:
    memory: FairMemory[int] = FairMemory(limit=3)
    for number in range(4):
        memory.put((f"client-{number}", "t"), number)
    assert sorted(memory.values()) == [1, 2, 3]
