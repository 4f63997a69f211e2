"""Models that do not fit are refused before they are loaded."""

import pytest

from node_agent.worker.base import InvocationError
from node_agent.worker.engines import memory

GB = 10**9


@pytest.fixture
def machine(monkeypatch):
    def have(*, free, addresses=None):
        monkeypatch.setattr(memory, "free_bytes", lambda: free)
        monkeypatch.setattr(memory, "free_addresses", lambda: addresses)

    return have


def test_the_system_says_what_is_free_and_what_this_process_takes():
    free, taken = memory.free_bytes(), memory.resident_bytes()
    assert free is not None
    assert taken is not None
    assert taken > 1_000_000
    assert free > 0


def test_weights_and_context_count_together(machine):
    machine(free=5 * GB)
    memory.check_fits("m", weights_bytes=4 * GB, cache_bytes=GB, tokens=8192)
    with pytest.raises(InvocationError, match=r"4000 MB for its weights and 2000 MB .* 5000 MB"):
        memory.check_fits("m", weights_bytes=4 * GB, cache_bytes=2 * GB, tokens=8192)


def test_a_limit_of_the_address_space_counts_too_but_mapped_weights_only_once(machine):
    machine(free=100 * GB, addresses=2 * GB)
    memory.check_fits("m", weights_bytes=9 * GB, cache_bytes=GB, mapped=True)
    with pytest.raises(InvocationError, match="raise its memory limit") as raised:
        memory.check_fits("m", weights_bytes=3 * GB)
    assert raised.value.detail == {"needed_bytes": 3 * GB, "free_bytes": 2 * GB}


def test_where_nothing_is_known_nothing_is_refused(machine):
    machine(free=None)
    memory.check_fits("m", weights_bytes=10**15)
