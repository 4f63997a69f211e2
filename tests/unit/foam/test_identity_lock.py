"""One process for each identity on a machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from capability_schemas.errors import Conflict
from foam.identity_lock import IdentityLock

HOLD = """
import sys
from pathlib import Path
from foam.identity_lock import IdentityLock

with IdentityLock(Path(sys.argv[1]), "edge-1"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_the_second_process_is_told_who_has_it(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == b"held\n"
        with pytest.raises(Conflict, match=rf"edge-1 .* already \(process {first.pid}, since 20"):
            IdentityLock(tmp_path, "edge-1").take()
        with IdentityLock(tmp_path, "edge-2"):  # another one is free
            pass
        first.kill()  # the lock goes with the process, however that ends
        first.wait(30)
        with IdentityLock(tmp_path, "edge-1") as lock:
            assert lock.tenant.identity == "edge-1"


def test_it_is_free_again_when_it_was_left(tmp_path: Path) -> None:
    for _ in range(2):
        with IdentityLock(tmp_path, "edge-1") as lock:
            assert lock.take() is lock


def test_the_epoch_is_a_later_one_though_the_clock_was_set_back(tmp_path: Path) -> None:
    epochs = []
    for now in (5_000, 1_000, 1_001, 9_000):
        with IdentityLock(tmp_path, "edge-1", clock=iter([now, now]).__next__) as lock:
            epochs.append(lock.tenant.epoch)
    assert epochs == [5_000, 5_001, 5_002, 9_000]


@pytest.mark.parametrize("rubbish", ["", "{", "[1]", '{"epoch": "x"}'])
def test_a_damaged_file_is_written_anew(tmp_path: Path, rubbish: str) -> None:
    (tmp_path / "edge-1.lock").write_text(rubbish)
    with IdentityLock(tmp_path, "edge-1", clock=lambda: 7) as lock:
        assert lock.tenant.epoch == 7
    assert json.loads((tmp_path / "edge-1.lock").read_text())["pid"] == os.getpid()


def test_the_words_of_those_who_share_a_lock_begin_alike(tmp_path: Path) -> None:
    with IdentityLock(tmp_path, "edge-1") as one:
        mark = one.tenant.alone_at
        assert mark is not None
        assert (one.tenant.place or "").startswith(mark)
        assert f"process {os.getpid()}" in (one.tenant.place or "")
    with IdentityLock(tmp_path, "edge-1") as again:
        assert again.tenant.alone_at == mark
    elsewhere = tmp_path / "copy"
    elsewhere.mkdir()
    (elsewhere / "edge-1.lock").write_bytes((tmp_path / "edge-1.lock").read_bytes())
    with IdentityLock(elsewhere, "edge-1") as copy:
        assert copy.tenant.alone_at != mark


def test_a_folder_that_cannot_be_written_costs_the_lock_and_not_the_start(tmp_path: Path) -> None:
    with IdentityLock(tmp_path / "nowhere", "edge-1") as lock:
        assert lock.tenant.alone_at is None
        assert lock.tenant.place is not None
