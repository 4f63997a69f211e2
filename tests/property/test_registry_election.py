"""At most one registry writes at any moment, whatever happens to processes, links and clocks.

Assumed, and so modelled: the broker hands everything it takes to every connected registry in one
order, or ends the connection; of single messages at most two in a row are lost on the way to one;
clocks run equally fast within `DRIFT`.
"""

from hypothesis import given, settings
from hypothesis import strategies as st

from registry.election import Election, Mode, Word
from support.registries import LEASE_MS, Fault, World

FAULTS = st.lists(
    st.builds(
        Fault,
        at=st.integers(0, 25_000),
        kind=st.sampled_from(["kill", "stop", "cut", "half_open", "leave", "broker"]),
        who=st.integers(0, 3),
        lasts=st.integers(1, 12_000),
        told=st.booleans(),
    ),
    max_size=12,
)
END_MS = 38_000
SETTLED_MS = END_MS + 8 * LEASE_MS


def play(world: World, faults: list[Fault]) -> list[str]:
    """Run a world to its end; returns who led at the end."""
    for fault in faults:
        world.apply(fault)

    def check() -> None:
        assert len(world.leaders()) <= 1, f"{world.leaders()} write at {world.real:.0f} ms"

    world.run(SETTLED_MS, check)
    return world.leaders()


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 2**32), registries=st.integers(1, 4), faults=FAULTS)
def test_at_most_one_writes_and_in_the_end_one_does(
    seed: int, registries: int, faults: list[Fault]
) -> None:
    assert len(play(World(seed=seed, registries=registries), faults)) == 1


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), faults=FAULTS)
def test_lost_messages_leave_no_two_writers(seed: int, faults: list[Fault]) -> None:
    play(World(seed=seed, registries=3, loss=0.3, slowest_ms=100.0), faults)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), faults=FAULTS)
def test_a_slow_broker_leaves_no_two_writers(seed: int, faults: list[Fault]) -> None:
    play(World(seed=seed, registries=3, slowest_ms=5_000.0), faults)


WORDS = st.builds(
    Word,
    registry=st.sampled_from(["registry-1", "registry-2", "registry-3"]),
    term=st.integers(0, 6),
    epoch=st.integers(0, 3),
    beat=st.integers(0, 5),
    leads=st.booleans(),
    leaves=st.booleans(),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(WORDS, st.integers(0, 3_000)), max_size=40))
def test_terms_only_grow_and_nobody_leads_unheard(words: list[tuple[Word, int]]) -> None:
    election = Election(own="registry-2", epoch=2, lease_ms=LEASE_MS)
    now, term = 0.0, 0
    election.connect(now)
    for word, later in words:
        now += later
        if word.registry != "registry-2" or word.epoch != 2:
            election.hear(word, now)
        election.look(now)
        assert election.term >= term
        term = election.term
        assert election.mode is not Mode.LEADING  # no word of its own has come back
        assert not election.leads(now)
