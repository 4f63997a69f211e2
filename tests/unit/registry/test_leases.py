from registry.leases import LeaseTable


def test_a_lease_ends_at_its_instant_and_only_once() -> None:
    table: LeaseTable[str] = LeaseTable()
    table.grant("a", 100)
    assert table.expire(99) == []
    assert table.expire(100) == ["a"]
    assert table.expire(1_000) == []
    assert "a" not in table


def test_a_renewal_counts_and_so_does_a_shortening() -> None:
    table: LeaseTable[str] = LeaseTable()
    table.grant("longer", 100)
    table.grant("longer", 300)
    table.grant("shorter", 300)
    table.grant("shorter", 50)
    assert table.expire(200) == ["shorter"]
    assert table.expires_at("longer") == 300
    assert table.expire(300) == ["longer"]


def test_no_end_and_release_mean_no_expiry() -> None:
    table: LeaseTable[str] = LeaseTable()
    table.grant("a", 100)
    table.grant("a", None)
    table.grant("b", 100)
    table.release("b")
    table.release("never there")
    assert table.expire(10**15) == []
    assert len(table) == 0


def test_leases_end_in_order() -> None:
    table: LeaseTable[str] = LeaseTable()
    for key, end in (("c", 3), ("a", 1), ("b", 2)):
        table.grant(key, end)
    assert table.expire(3) == ["a", "b", "c"]


def test_many_renewals_do_not_pile_up() -> None:
    table: LeaseTable[str] = LeaseTable()
    for end in range(10_000):
        table.grant("a", end)
    assert len(table._heap) < 200
    assert table.expire(10_000) == ["a"]
