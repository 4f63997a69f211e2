"""Log files are emptied under their writers, and what they held is kept once."""

import asyncio
from contextlib import suppress

import pytest
from structlog.testing import capture_logs

from foam.log_files import keep_small, set_aside


def test_a_writer_goes_on_in_the_emptied_file(tmp_path):
    log = tmp_path / "broker.log"
    with log.open("ab", buffering=0) as writer:
        for line, kept in (("one\n", None), ("two\n", "one\n"), ("three\n", "two\n")):
            if kept is not None:
                assert set_aside(log, most_bytes=3)
                assert (tmp_path / "broker.log.1").read_text() == kept
            writer.write(line.encode())
            assert log.read_text() == line, "and not after a hole of zeros"


def test_a_small_or_missing_file_is_left_alone(tmp_path):
    log = tmp_path / "up.log"
    assert not set_aside(log, most_bytes=3)
    log.write_text("one")
    assert not set_aside(log, most_bytes=3)
    assert [path.name for path in tmp_path.iterdir()] == ["up.log"]


def test_what_cannot_be_kept_is_dropped_and_told(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("foam.log_files.shutil.copyfileobj", full)
    log = tmp_path / "up.log"
    log.write_text("four")
    (tmp_path / "up.log.1").write_text("old")
    with capture_logs() as logs:
        assert set_aside(log, most_bytes=3)
    assert [entry["event"] for entry in logs] == ["logs.dropped"]
    assert [path.name for path in tmp_path.iterdir()] == ["up.log"]
    assert log.read_text() == ""


async def test_every_log_of_a_folder_is_looked_after(tmp_path, eventually):
    (tmp_path / "other.txt").write_text("left alone")
    looking = asyncio.create_task(keep_small(tmp_path, most_bytes=3, every_s=0.01))
    for name in ("up", "broker"):  # the second one after the first look
        (tmp_path / f"{name}.log").write_text("four")
        await eventually(lambda name=name: (tmp_path / f"{name}.log.1").exists())
    await eventually(lambda: not (tmp_path / "broker.log").read_text())
    looking.cancel()
    with suppress(asyncio.CancelledError):
        await looking
    assert (tmp_path / "other.txt").read_text() == "left alone"


async def test_a_folder_that_cannot_be_looked_at_is_told_and_looked_at_again(
    tmp_path, monkeypatch, eventually
):
    looks = []

    def refuse(path, **_):
        looks.append(path)
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("foam.log_files.set_aside", refuse)
    (tmp_path / "up.log").touch()
    with capture_logs() as logs:
        async with asyncio.timeout(20):
            looking = asyncio.create_task(keep_small(tmp_path, every_s=0.01))
            await eventually(lambda: len(looks) > 1)
            looking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await looking
    assert {entry["event"] for entry in logs} == {"logs.not_kept_small"}
