"""Who makes room when there are too many connections."""

from broker.embedded.crowd import Crowd, Guest


class Door:
    """A crowd with guests that remember that they were cut."""

    def __init__(self, *, limit: int = 100, address_limit: int = 100) -> None:
        self.now_s = 0.0
        self.cut: list[str] = []
        self.crowd = Crowd(limit=limit, address_limit=address_limit, clock=lambda: self.now_s)

    def enter(self, name: str, address: str = "a") -> tuple[Guest, bool]:
        guest = Guest(address, lambda: self._cut(name, guest))
        return guest, self.crowd.enter(guest)

    def _cut(self, name: str, guest: Guest) -> None:
        self.cut.append(name)
        self.crowd.leave(guest)


def test_the_oldest_stranger_makes_room() -> None:
    door = Door(limit=3)
    first, _ = door.enter("first")
    for name in ("second", "third"):
        door.enter(name)
    door.crowd.admitted(first)
    assert door.enter("fourth")[1]
    assert door.cut == ["second"]
    assert len(door.crowd) == 3


def test_a_full_address_makes_room_for_itself_alone() -> None:
    door = Door(address_limit=2)
    door.enter("other", address="b")
    for name in ("one", "two", "three"):
        door.enter(name)
    assert door.cut == ["one"]


def test_who_is_admitted_is_never_cut_and_the_newcomer_is_turned_away() -> None:
    door = Door(limit=2)
    guests = [door.enter(name)[0] for name in ("one", "two")]
    for guest in guests:
        door.crowd.admitted(guest)
    assert not door.enter("three")[1]
    assert door.cut == []
    door.crowd.leave(guests[0])
    assert door.enter("four")[1]


def test_a_full_crowd_makes_room_where_most_strangers_are() -> None:
    door = Door(limit=5)
    door.enter("good", address="b")
    for number in range(30):
        door.enter(str(number), address="a" if number % 2 else "c")
    assert "good" not in door.cut
    assert len(door.crowd) == 5


def test_a_network_of_ipv6_is_one_address() -> None:
    door = Door(address_limit=2)
    door.enter("other", address="2001:db8:0:1::1")
    for number in range(4):
        door.enter(str(number), address=f"2001:db8:0:2::{number}")
    assert door.cut == ["0", "1"]


def test_it_says_so_once_in_a_while(caplog) -> None:
    door = Door(limit=1)
    for number in range(50):
        door.enter(str(number))
    assert len(caplog.records) == 1
    door.now_s = 11.0
    door.enter("later")
    assert len(caplog.records) == 2
    assert "turned_away=50" in caplog.records[1].getMessage()


def test_nothing_is_kept_of_who_left() -> None:
    door = Door()
    for number in range(10):
        guest, _ = door.enter(str(number), address=str(number))
        door.crowd.leave(guest)
    assert len(door.crowd) == 0
    assert not door.crowd._of_address
    assert not door.crowd._strangers
