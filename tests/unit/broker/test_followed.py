"""What holds for every file that is followed; its edits are tried in the tests of the rules."""

from pathlib import Path

import pytest

from broker.followed import FollowedFile
from capability_schemas.errors import ConfigurationError


def followed(path: Path, **options) -> FollowedFile[str]:
    return FollowedFile(path, what="words", parse=lambda text, _: text.upper(), **options)


def test_a_file_over_its_limit_is_refused_and_the_one_before_stays(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("four")
    file = followed(path, most_bytes=4)
    file.load()
    assert file.value == "FOUR"
    path.write_text("fives")
    assert [file.refresh(), file.refresh()] == [False, False]
    assert file.value == "FOUR"
    assert file.problem == f"{path}: words file has over 4 bytes"


def test_a_file_that_has_to_be_there_is_missed(tmp_path):
    path = tmp_path / "words.txt"
    with pytest.raises(ConfigurationError, match=r"words\.txt: words file does not exist"):
        followed(path, required=True).load()
    file = followed(path)
    file.load()
    assert (file.value, file.problem) == ("", None)
