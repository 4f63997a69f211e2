"""``foam node``: which command is meant."""

import pytest
from typer.testing import CliRunner

from foam.cli import app


@pytest.fixture
def said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.toml").write_text("[[function]]\n")

    def run(*words):
        result = CliRunner().invoke(app, ["node", *words])
        return result.exit_code, " ".join(result.output.split()), result.exception

    return run


def test_a_misspelt_command_is_no_node(said):
    code, output, _ = said("chek", "a.toml")
    assert code == 2
    assert "No such command 'chek'. Did you mean 'check'?" in output


@pytest.mark.parametrize("words", [("a.toml",), ("a.toml", "--no-watch"), ("chek",)])
def test_without_a_command_a_node_is_run(said, words, monkeypatch):
    ran = []
    monkeypatch.setattr("foam.wiring.run_node", lambda _settings, source, **_: ran.append(source))
    monkeypatch.setattr("foam.cli.node.run_reporting", lambda *_: None)
    said(*words)
    assert ran == [words[0]]


def test_a_check_names_what_is_no_declaration(said):
    code, output, _ = said("check", ".")
    assert (code, output.partition(":")[2].partition(":")[0]) == (20, " is a folder")
