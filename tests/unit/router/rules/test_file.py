"""A router follows its rules file: good edits count, bad ones do not, and both are told."""

import os
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from capability_schemas.errors import ConfigurationError
from router.rules import RuleFile

GOOD = '[[rule]]\nname = "one"\nroute = "best"\n'
OTHER = '[[rule]]\nname = "two"\nroute = "cheapest"\n'
BAD = '[[rule]]\nname = "two"\nstop = "yes"\n'


def names(file: RuleFile) -> list[str]:
    return [rule["name"] for rule in file.describe()["rules"]]


def refreshed(file: RuleFile) -> bool:
    """Look twice: an edit counts when it has lasted from one look to the next."""
    return file.refresh() or file.refresh()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "rules.toml"
    path.write_text(GOOD)
    return path


@pytest.fixture
def file(path: Path) -> RuleFile:
    file = RuleFile(path)
    file.load()
    return file


def test_edits_are_taken_up_once_they_have_lasted(file: RuleFile, path: Path) -> None:
    assert names(file) == ["one"]
    assert not refreshed(file)
    path.write_text(OTHER)
    assert not file.refresh()
    assert names(file) == ["one"]
    assert file.refresh()
    assert names(file) == ["two"]
    assert not refreshed(file)


def test_a_file_that_is_still_being_written_is_left_alone(file: RuleFile, path: Path) -> None:
    for end in range(10, len(OTHER) + 1, 20):
        path.write_text(OTHER[:end])
        assert not file.refresh()
        assert file.problem is None
    path.write_text(OTHER)
    assert refreshed(file)


def test_a_bad_edit_leaves_the_rules_in_force_and_is_told_once(file: RuleFile, path: Path) -> None:
    book = file.book
    path.write_text(BAD)
    with capture_logs() as logs:
        assert not refreshed(file)
        assert not refreshed(file)
    said = f'{path}:3: rule "two": stop: write true or false'
    assert [(entry["event"], entry["error"]) for entry in logs] == [("rules.refused", said)]
    assert file.book is book
    assert file.describe()["problem"] == said
    path.write_text(OTHER)
    assert refreshed(file)
    assert file.problem is None
    assert names(file) == ["two"]


def test_undoing_a_bad_edit_clears_the_problem(file: RuleFile, path: Path) -> None:
    book = file.book
    path.write_text(BAD)
    refreshed(file)
    path.write_text(GOOD)
    assert not refreshed(file)
    assert file.problem is None
    assert file.book is book


def test_a_touch_without_an_edit_changes_nothing(file: RuleFile, path: Path) -> None:
    book = file.book
    os.utime(path, ns=(1, 1))
    assert not refreshed(file)
    assert file.book is book


def test_replacing_the_file_by_one_of_the_same_size_and_time_is_seen(
    file: RuleFile, path: Path
) -> None:
    stamp = path.stat()
    new = path.with_suffix(".new")
    new.write_text(GOOD.replace("one", "two"))
    os.utime(new, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    new.replace(path)
    assert refreshed(file)
    assert names(file) == ["two"]


def test_a_file_may_come_and_go(tmp_path: Path) -> None:
    path = tmp_path / "rules.toml"
    file = RuleFile(path)
    file.load()
    assert names(file) == []
    path.write_text(GOOD)
    assert refreshed(file)
    assert names(file) == ["one"]
    path.unlink()
    assert not file.refresh()
    assert names(file) == ["one"], "an editor may only be replacing it"
    assert file.refresh()
    assert names(file) == []
    assert file.problem is None


def test_a_file_that_somebody_named_must_be_there(path: Path) -> None:
    file = RuleFile(path, required=True)
    file.load()
    path.unlink()
    assert not refreshed(file)
    assert file.problem == f"{path}: rules file does not exist"
    assert names(file) == ["one"]
    with pytest.raises(ConfigurationError, match="rules file does not exist"):
        RuleFile(path, required=True).load()


def test_a_router_does_not_start_with_bad_rules(path: Path) -> None:
    path.write_text(BAD)
    with pytest.raises(ConfigurationError, match='rule "two": stop: write'):
        RuleFile(path).load()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"a = '\xff'", "rules file is no UTF-8 text: byte 5 is 255"),
        (b"#" * (1024 * 1024 + 1), "rules file has over 1048576 bytes"),
    ],
)
def test_what_is_no_text_is_refused(path: Path, content: bytes, expected: str) -> None:
    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=expected):
        RuleFile(path).load()


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be read: Is a directory"):
        RuleFile(tmp_path).load()


def test_a_byte_order_mark_does_no_harm(path: Path) -> None:
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    file = RuleFile(path)
    file.load()
    assert names(file) == ["one"]
