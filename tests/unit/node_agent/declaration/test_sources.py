"""Digests and stamps of the files behind a declaration."""

import sys

import pytest

from node_agent.declaration.sources import SourceFiles, file_digest, module_file, stamp_of


def test_a_file_alone_has_its_own_digest(tmp_path):
    path = tmp_path / "a.py"
    path.write_text("x = 1\n")
    files = SourceFiles()
    assert files.code_digest([path]) == file_digest(path)
    assert files.stamps == {path: stamp_of(path)}


def test_neighbours_count_however_they_are_imported(tmp_path):
    (tmp_path / "gears").mkdir()
    for name in ("a.py", "b.py", "c.py", "gears/__init__.py", "gears/teeth.py", "alone.py"):
        (tmp_path / name).write_text("")
    (tmp_path / "a.py").write_text("import b, json\nfrom gears import teeth\n")
    (tmp_path / "b.py").write_text("def f():\n    from .c import x\n    import a\n")
    files = SourceFiles()
    assert files.code_digest([tmp_path / "a.py"]) is not None
    names = {str(path.relative_to(tmp_path)) for path in files.stamps}
    assert names == {"a.py", "b.py", "c.py", "gears/__init__.py", "gears/teeth.py"}


def test_code_that_does_not_parse_still_has_a_digest(tmp_path):
    path = tmp_path / "a.py"
    path.write_text("def")
    assert SourceFiles().code_digest([path]) == file_digest(path)


def test_a_missing_file_is_noted_for_it_may_come(tmp_path):
    files = SourceFiles()
    assert files.code_digest([tmp_path / "a.py"]) is None
    assert files.stamps == {tmp_path / "a.py": None}


def test_the_stamp_is_the_one_from_before_the_file_was_read(tmp_path):
    path = tmp_path / "a.py"
    path.write_text("x = 1\n")
    files = SourceFiles()
    before = files.stamps[files.note(path)]
    path.write_text("x = 100\n")
    files.note(path)
    assert files.stamps[path] == before != stamp_of(path)


@pytest.mark.parametrize("name", ["no_such_module_at_all", "json.no_such_part", "sys"])
def test_what_has_no_source_has_no_file(name):
    assert module_file(name) is None


def test_a_module_is_found_without_being_imported(tmp_path, monkeypatch):
    package = tmp_path / "plant_of_tests"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError")
    (package / "press.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert module_file("plant_of_tests.press") == package / "press.py"
    assert module_file("plant_of_tests") == package / "__init__.py"
    assert "plant_of_tests" not in sys.modules
