"""What the system says about memory."""

import os

from node_agent.pool.memory import available_memory_bytes, resident_bytes, total_memory_bytes

MEMINFO = "MemTotal:       2000 kB\nMemFree:         10 kB\nMemAvailable:    500 kB\n"


def system(tmp_path, **group):
    (tmp_path / "meminfo").write_text(MEMINFO)
    (tmp_path / "own").write_text("0::/site/agent\n")
    folder = tmp_path / "cgroup" / "site" / "agent"
    folder.mkdir(parents=True)
    for name, text in group.items():
        (folder / f"memory.{name}").write_text(text)
    return tmp_path / "meminfo", tmp_path / "cgroup", tmp_path / "own"


def test_the_machine_counts_where_no_group_limits(tmp_path):
    files = system(tmp_path, max="max\n", current="1000\n")
    assert available_memory_bytes(*files) == 500 * 1024
    assert total_memory_bytes(*files) == 2000 * 1024


def test_a_tighter_group_counts_with_its_page_cache_as_free(tmp_path):
    files = system(
        tmp_path, max="100000\n", current="90000\n", stat="anon 1\ninactive_file 20000\n"
    )
    assert available_memory_bytes(*files) == 30_000
    assert total_memory_bytes(*files) == 100_000


def test_a_silent_system_says_nothing(tmp_path):
    nowhere = tmp_path / "nowhere"
    assert available_memory_bytes(nowhere, nowhere, nowhere) is None
    assert total_memory_bytes(nowhere, nowhere, nowhere) is None


def test_the_memory_of_a_process():
    own = resident_bytes(os.getpid())
    assert own is not None
    assert own > 1_000_000
    assert resident_bytes(0) is None
