"""Folders of instances: a dead agent's are swept up, nobody else's."""

import contextlib
import fcntl
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from node_agent.isolation import folders
from node_agent.isolation.folders import LockedFolder, sweep_folders

AGENT = """
import sys, time
from node_agent.isolation.folders import LockedFolder
folder = LockedFolder()
(folder.path / "half.bin").write_text("x")
print(folder.path, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@contextlib.contextmanager
def agent(temporary):
    with subprocess.Popen(
        [sys.executable, "-c", AGENT],
        env={**os.environ, "TMPDIR": str(temporary)},
        cwd=Path(__file__).parents[4],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            yield process, Path(process.stdout.readline().strip())
        finally:
            process.kill()


def test_what_a_killed_agent_has_left_is_swept_up(temporary):
    with agent(temporary) as (process, left):
        assert sweep_folders() == 0
        assert (left / "half.bin").exists()
        process.kill()
        process.wait()
        assert left.exists()
        assert sweep_folders() == 1
    assert list(temporary.iterdir()) == []


def test_folders_in_use_of_others_and_of_other_things_stay(temporary, monkeypatch):
    ours = LockedFolder()
    (temporary / "foam-demo-1").mkdir()
    elsewhere = temporary / "elsewhere"
    elsewhere.mkdir()
    (temporary / "foam-instance-link").symlink_to(elsewhere)
    (temporary / "foam-instance-file").write_text("x")
    kept = {path.name for path in temporary.iterdir()}
    assert sweep_folders() == 0
    assert {path.name for path in temporary.iterdir()} == kept
    assert ours.path.stat().st_mode & 0o777 == 0o700
    (temporary / "foam-instance-theirs").mkdir()
    monkeypatch.setattr(os, "getuid", lambda: os.geteuid() + 1)
    assert sweep_folders() == 0
    ours.remove()
    ours.remove()
    assert not ours.path.exists()


def test_a_sweep_at_the_moment_of_making_does_no_harm(temporary, monkeypatch):
    """The first folder is swept before it is opened, the second between opening and locking."""
    opened = folders._open
    swept: list[Path] = []

    def meddling(path):
        if not swept:
            swept.append(path)
            sweep(path)
        descriptor = opened(path)
        if len(swept) == 1:
            swept.append(path)
            sweep(path)
        return descriptor

    def sweep(path):
        with monkeypatch.context() as plain:
            plain.setattr(folders, "_open", opened)
            assert sweep_folders() == 1
        assert not path.exists()

    monkeypatch.setattr(folders, "_open", meddling)
    made = LockedFolder()
    assert len({*swept, made.path}) == 3
    assert list(temporary.iterdir()) == [made.path]
    made.remove()


def test_where_folders_cannot_be_locked_they_are_made_and_never_swept(temporary, monkeypatch):
    def refuse(descriptor, operation):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    made = LockedFolder()
    assert sweep_folders() == 0
    assert made.path.is_dir()
    made.remove()
    assert list(temporary.iterdir()) == []


def test_no_folder_is_left_when_no_descriptor_is_to_be_had(temporary, monkeypatch):
    def full(path):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(folders, "_open", full)
    with pytest.raises(OSError, match="Too many open files"):
        LockedFolder()
    assert list(temporary.iterdir()) == []
