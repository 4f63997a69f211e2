"""The README's examples, run as they stand there."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.foam_process import ROOT, FoamUp, foam_environment, foam_up, run_foam

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.broker,
    pytest.mark.encoder,
    pytest.mark.llm,
    pytest.mark.timeout(180),  # the first test waits for the mesh of all
]

README = (ROOT / "README.md").read_text(encoding="utf-8")
PLANT = ROOT / "foam" / "demo" / "plant"


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def _commands() -> list[list[str]]:
    """Return the ``foam`` commands of the README's shell blocks as argument lists."""
    found: list[list[str]] = []
    for block in _blocks("sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = list(shlex.shlex(line, posix=True, punctuation_chars=";&"))
            command: list[str] = []
            for word in [*words, ";"]:
                if set(word) <= {";", "&"}:
                    found += [command[1:]] if command[:1] == ["foam"] else []
                    command = []
                else:
                    command.append(word)
    return found


@pytest.fixture(scope="module")
def readme_mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FoamUp]:
    """The mesh that the README describes: its own function, and the nodes of the plant."""
    folder = tmp_path_factory.mktemp("readme")
    (function, _) = _blocks("python")
    (folder / "plant.py").write_text(function)
    (placed,) = _blocks("toml")
    (folder / "placed.toml").write_text(f'{placed}\n[[function]]\nsource = "plant.py"\n')
    nodes = (folder / "placed.toml", *sorted(PLANT.glob("*.toml")))
    arguments = [word for node in nodes for word in ("--node", str(node))]
    with foam_up(folder / "data", "--broker", "embedded", *arguments) as up:
        yield up


def test_every_foam_command_does_what_is_said(readme_mesh: FoamUp) -> None:
    commands = [words for words in _commands() if words[0] != "up"]
    assert {words[0] for words in commands} == {"ask", "nodes", "functions", "explain"}
    for words in commands:
        done = run_foam(*words, "--data", str(readme_mesh.data))
        assert done.returncode == 0, (words, done.stderr)
        assert done.stdout.strip(), words
        if words[0] == "explain":
            assert b"chosen: " in done.stdout
        if "--input" in words:
            assert json.loads(done.stdout) == {"litres": 2600.0}


def test_the_program_prints_the_answer_and_nothing_else(
    readme_mesh: FoamUp, tmp_path: Path
) -> None:
    (_, program) = _blocks("python")
    script = tmp_path / "ask.py"
    script.write_text(program)
    done = subprocess.run(
        [sys.executable, str(script)],
        env=foam_environment(FOAM_DATA=str(readme_mesh.data)),
        capture_output=True,
        timeout=25,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode().endswith("edge-llm\n")
    assert done.stdout.count(b"\n") == 1
    assert done.stderr == b""


def test_zones_and_grants_of_the_node_file_bind(readme_mesh: FoamUp) -> None:
    def ask(policy: str) -> int:
        return run_foam(
            *("ask", "how much water is in the tank?", "--input", '{"level_cm": 130}'),
            *("--policy", policy, "--data", str(readme_mesh.data)),
        ).returncode

    (said,) = re.findall(r"--policy '(\{.*?\})'", README)
    assert ask(said) == 0
    assert ask('{"zones": ["hall-4"]}') == 12
    assert ask('{"grants": ["controls", "keys"]}') == 12
