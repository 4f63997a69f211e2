"""Which limit is behind an error."""

import errno
import resource
import socket
import time

import pytest

from node_agent.worker.confinement import Confinement

LIMITS = {"memory_bytes": 1000, "open_files": 20, "file_bytes": 30, "processes": 4}


@pytest.mark.parametrize(
    ("error", "limit", "hint"),
    [
        (MemoryError(), "memory_bytes", "limits.memory_bytes is 1000"),
        (OSError(errno.ENOMEM, "m"), "memory_bytes", "limits.memory_bytes is 1000"),
        (OSError(errno.EMFILE, "m", "f"), "open_files", "limits.open_files is 20"),
        (OSError(errno.EFBIG, "m"), "file_bytes", "limits.file_bytes is 30"),
        (BlockingIOError(errno.EAGAIN, "m"), "processes", "limits.processes is 4"),
        (PermissionError(errno.EACCES, "m"), "network", "it has no network"),
        (socket.gaierror(socket.EAI_AGAIN, "m"), "network", "it has no network"),
    ],
)
def test_the_limit_is_named(error, limit, hint):
    explained = Confinement(LIMITS).explain(error)
    assert explained["limit"] == limit
    assert explained["hint"].startswith(hint)


def test_what_a_library_wraps_is_found():
    wrapped = RuntimeError("library")
    wrapped.__context__ = ValueError("in between")
    wrapped.__context__.__cause__ = OSError(errno.EMFILE, "m")
    assert Confinement(LIMITS).explain(wrapped)["limit"] == "open_files"


@pytest.mark.parametrize(
    "error", [ValueError("m"), OSError(errno.EACCES, "m", "/etc/shadow"), OSError("no number")]
)
def test_other_errors_have_no_limit(error):
    assert Confinement(LIMITS).explain(error) == {}


def test_a_limit_that_is_not_set_explains_nothing():
    free = Confinement({"network": True, "memory_bytes": None})
    for error in (MemoryError(), OSError(errno.EMFILE, "m"), PermissionError(errno.EACCES, "m")):
        assert free.explain(error) == {}


def test_a_circle_of_causes_ends():
    error = RuntimeError("one")
    error.__context__ = RuntimeError("two")
    error.__context__.__context__ = error
    assert Confinement(LIMITS).explain(error) == {}


def test_a_call_without_a_limit_of_processor_time_changes_none():
    before = resource.getrlimit(resource.RLIMIT_CPU)
    Confinement({"cpu_s": None}).begin_call()
    assert resource.getrlimit(resource.RLIMIT_CPU) == before


def test_every_call_gets_its_processor_time_anew(monkeypatch):
    set_to = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (7, resource.RLIM_INFINITY))
    monkeypatch.setattr(resource, "setrlimit", lambda _, pair: set_to.append(pair[0]))
    used = iter([0.2, 9.5])
    monkeypatch.setattr(time, "process_time", lambda: next(used))
    confinement = Confinement({"cpu_s": 3})
    confinement.begin_call()
    confinement.begin_call()
    assert set_to == [1 + 3, 10 + 3]
