"""Quotas: exact times to come back, no harm to others, edits that count at once."""

import random

import pytest

from broker.access.policy import Role
from capability_schemas.errors import ConfigurationError, Overloaded, TooLarge
from router.quota import DEFAULT_LIMITS, QuotaBook, QuotaFile, Quotas

RULES = """
[default]
tasks_per_s = 2
burst = 3
bytes_per_s = "1KiB"

[role.node]
tasks_per_s = 10

[client.pump-7]
concurrent = 2
tasks_per_s = 0
task_bytes = 100

[client.vip]
tasks_per_s = 0
bytes_per_s = 0
"""


class World:
    """Quotas with a clock that stands until it is moved."""

    def __init__(self, path, text=RULES, **options):
        self.now = 1_000.0
        self.path = path / "quotas.toml"
        self.path.write_text(text)
        self.file = QuotaFile(self.path)
        self.file.load()
        self.roles = {"edge-1": Role.NODE}
        self.quotas = Quotas(
            file=self.file,
            role_of=lambda client: self.roles.get(client, Role.DEVICE),
            clock=lambda: self.now,
            **options,
        )

    def admit(self, client, size=10):
        """Return how long to wait; 0 when it got in."""
        try:
            self.quotas.admit(client, size)
        except Overloaded as error:
            return error.retry_after_ms / 1_000
        return 0.0

    def edit(self, text):
        self.path.write_text(text)
        self.file.refresh()
        return self.file.refresh()


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def test_a_burst_gets_in_and_then_the_rate_holds(world):
    assert [world.admit("a") for _ in range(4)] == [0, 0, 0, 0.5]
    world.now += 0.499
    assert world.admit("a") > 0
    world.now += 0.501
    assert world.admit("a") == 0


def test_one_that_asks_too_much_takes_nothing_from_others(world):
    for _ in range(100):
        world.admit("greedy")
    assert world.admit("modest") == 0


def test_who_waits_as_told_gets_in(world):
    """Many refused at once, each back at its own time: everyone gets in at the first return."""
    waits = [wait for wait in (world.admit("a") for _ in range(13)) if wait]
    assert waits == sorted(waits)
    assert len(waits) == 10
    start = world.now
    for wait in waits:
        world.now = start + wait
        assert world.admit("a") == 0, wait


def test_who_waits_as_told_gets_in_with_tasks_of_any_size(world):
    chance = random.Random(4)
    for _ in range(300):
        size = chance.choice([1, 100, 900, 5_000])
        wait = world.admit("a", size)
        if wait:
            world.now += wait
            assert world.admit("a", size) == 0
        world.now += chance.random() * 0.2


def test_in_the_long_run_the_rate_holds_whatever_is_tried(world):
    chance = random.Random(5)
    taken = tries = 0
    start = world.now
    while world.now < start + 200:
        world.now += chance.random() * 0.1
        tries += 1
        taken += world.admit("a", 1) == 0
    assert tries > 2_000
    assert taken <= 200 * 2 + 3 + 1
    assert taken >= 200 * 2 - 3


def test_bytes_count_too_and_a_large_one_is_paid_for_afterwards(world):
    assert world.admit("a", 4 * 1024) == 0  # four times the bucket, which was full
    assert world.admit("a", 1) == pytest.approx(3 + 1 / 1024, abs=0.01)
    world.now += 3.01
    assert world.admit("a", 1) == 0


def test_tasks_at_a_time(world):
    assert [world.admit("pump-7") for _ in range(3)] == [0, 0, 1.0]
    world.quotas.end("pump-7")
    assert world.admit("pump-7") == 0
    world.quotas.restore("pump-7")
    world.quotas.end("pump-7")
    assert world.admit("pump-7") == 1.0


def test_a_task_that_never_gets_in_is_told_so(world):
    with pytest.raises(TooLarge, match="task of pump-7 has 101 bytes, the limit is 100"):
        world.quotas.admit("pump-7", 101)
    assert world.admit("pump-7", 100) == 0


def test_a_refund_leaves_no_trace(world):
    for _ in range(20):
        assert world.admit("a", 1_000) == 0
        world.quotas.refund("a", 1_000)
    row = world.quotas.describe("a")["clients"][0]
    assert (row["live"], row["tasks_left"], row["bytes_left"]) == (0, 3, 1024)


def test_roles_and_clients_have_limits_of_their_own(world):
    assert sum(world.admit("edge-1") == 0 for _ in range(30)) == 10  # its burst: one second's
    assert all(world.admit("vip", 10_000) == 0 for _ in range(1_000))


def test_a_role_that_is_learnt_later_counts_from_then_on(world):
    for _ in range(5):
        world.admit("edge-2")
    world.roles["edge-2"] = Role.NODE
    world.now += 1
    assert sum(world.admit("edge-2") == 0 for _ in range(30)) == 10


def test_without_a_file_nobody_is_disturbed_that_does_not_run_wild(tmp_path):
    quotas = Quotas(file=None, role_of=lambda _: Role.DEVICE, clock=lambda: 0.0)
    for _ in range(10_000):
        quotas.admit("a", 100)
    with pytest.raises(Overloaded):
        quotas.admit("a", 100)


def test_an_edit_holds_at_once_and_forgets_no_use(world):
    for _ in range(4):
        world.admit("a")
    assert world.edit("[default]\ntasks_per_s = 100\n")
    world.now += 0.1
    assert sum(world.admit("a") == 0 for _ in range(50)) == 10
    assert world.edit("[default]\ntasks_per_s = 1\n")
    world.now += 100
    assert sum(world.admit("a") == 0 for _ in range(50)) == 1


def test_a_bad_edit_leaves_what_held_and_is_told(world):
    assert not world.edit("[default]\ntasks_per_s = -1\nburts = 3\n[rolle.x]\n")
    problem = world.file.problem
    assert problem is not None
    assert len(problem.splitlines()) == 3
    assert "quotas.toml: default.tasks_per_s: " in problem
    assert "default.burts" in problem
    assert [world.admit("a") for _ in range(4)] == [0, 0, 0, 0.5]
    assert world.quotas.describe()["problem"] == problem


@pytest.mark.parametrize(
    "text",
    ["a = ", "[role.king]\nburst = 1", "[client.'a b']\nburst = 1", "default = 3", "[" * 5_000],
)
def test_what_is_no_quota_file_is_refused(text):
    with pytest.raises(ConfigurationError, match=r"quotas\.toml"):
        QuotaBook.parse(text, "quotas.toml")


def test_a_rate_without_a_burst_gets_that_of_a_second_not_a_wider_tables():
    book = QuotaBook.parse("[client.a]\ntasks_per_s = 0.5\n", "x")
    limits = book.limits("a", Role.DEVICE)
    assert (limits.tasks_per_s, limits.burst) == (0.5, 1)
    assert book.limits("b", Role.DEVICE) == DEFAULT_LIMITS


def test_only_so_many_clients_are_remembered_and_live_tasks_are_never_forgotten(tmp_path):
    world = World(tmp_path, remembered=100)
    assert world.admit("pump-7") == 0
    assert world.admit("pump-7") == 0
    for number in range(1_000):
        world.admit(f"device-{number}")
    assert len(world.quotas) == 100
    assert world.admit("pump-7") == 1.0  # two still run, though its buckets were forgotten


def test_it_is_shown(world):
    for _ in range(5):
        world.admit("a")
    world.admit("edge-1")
    told = world.quotas.describe()
    assert told["total"] == 2
    assert told["overrides"] == 2
    assert [row["client"] for row in told["clients"]] == ["edge-1", "a"]
    assert told["clients"][1]["refused"] == 2
    assert told["clients"][1]["limits"]["concurrent"] is None
    assert told["role"]["node"]["tasks_per_s"] == 10
    assert world.quotas.describe("unheard")["clients"][0]["tasks_left"] == 3
