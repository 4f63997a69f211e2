"""Verbs, the search for an interpreter, and the real seam to programs."""

import os
import sys
from pathlib import Path

import pytest

from deploy import bootstrap
from deploy.locking import lock_blocks
from deploy.machine import Shell


def program(folder: Path, name: str, status: int) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\nexit {status}\n")
    path.chmod(0o755)
    return path


def test_newer_interpreter_is_found_and_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tmp_path / "bin", "python3.13", 1)  # there, but it does not run
    good = program(tmp_path / "bin", "python3.12", 0)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert bootstrap.find_interpreter() == str(good)


def test_old_interpreter_without_a_newer_one_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 9, 2))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert bootstrap.main(["test"]) == 2
    said = capsys.readouterr().err
    assert "needs Python 3.11" in said
    assert "apt install python3" in said


def test_old_interpreter_hands_over_to_a_newer_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class ProcessReplacedError(Exception):
        pass

    def execv(path: str, argv: list[str]) -> None:
        raise ProcessReplacedError(path, argv)

    newer = program(tmp_path / "bin", "python3.11", 0)
    monkeypatch.setattr(sys, "version_info", (3, 9, 2))
    monkeypatch.setenv("PATH", str(newer.parent))
    monkeypatch.setattr(os, "execv", execv)
    with pytest.raises(ProcessReplacedError) as caught:
        bootstrap.main(["demo", "--fast"])
    path, argv = caught.value.args
    assert path == str(newer)
    assert argv[2:] == ["demo", "--fast"]


def test_unknown_verb_is_refused_before_anything_is_set_up(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as caught:
        bootstrap.main(["deploy"])
    assert caught.value.code == 2
    assert "invalid choice" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("verb", "arguments", "expected"),
    [
        ("demo", ["--fast"], ["bin/foam", "demo", "--fast"]),
        ("up", ["--port", "0"], ["bin/foam", "up", "--port", "0"]),
        ("test", ["-k", "topic"], ["bin/python", "-m", "pytest", "-k", "topic"]),
    ],
)
def test_arguments_are_passed_on(verb: str, arguments: list[str], expected: list[str]) -> None:
    [command] = bootstrap.commands(verb, arguments, Path("venv"))
    assert command == [f"venv/{expected[0]}", *expected[1:]]


def test_check_runs_all_its_tools_and_keeps_the_first_failure(tmp_path: Path) -> None:
    tools = [program(tmp_path, f"tool{i}", status) for i, status in enumerate((0, 3, 4))]
    assert bootstrap.run_all([[str(tool)] for tool in tools], dict(os.environ)) == 3
    assert [Path(c[0]).name for c in bootstrap.commands("check", [], tmp_path)] == [
        "ruff",
        "ruff",
        "mypy",
        "lint-imports",
    ]


def test_environment_of_a_command_prefers_the_virtual_environment() -> None:
    env = bootstrap.command_environment({"PATH": "/bin", "PYTHONPATH": "x"}, Path("/venv"))
    assert env == {"PATH": f"/venv/bin{os.pathsep}/bin", "VIRTUAL_ENV": "/venv"}


@pytest.mark.parametrize(
    ("environ", "user", "required"),
    [({"CI": "true"}, 1000, True), ({}, 1000, False), ({"CI": "false"}, 1000, False)],
)
def test_brokers_are_required_in_ci(
    monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], user: int, required: bool
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: user)
    assert bootstrap.must_have_brokers(environ) is required


def test_brokers_are_required_where_root_could_install_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert not bootstrap.must_have_brokers({})
    program(tmp_path / "bin", "apt-get", 0)
    assert bootstrap.must_have_brokers({})


def test_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    assert bootstrap.cache_folder({"XDG_CACHE_HOME": "/c"}) == Path("/c/foam")
    assert bootstrap.cache_folder({}) == Path.home() / ".cache" / "foam"


def test_lock_blocks_keep_requirement_and_hashes_together() -> None:
    text = "# header\na-b==1 ; x == 'y' \\\n    --hash=1 \\\n    --hash=2\nc==2 \\\n    --hash=3\n"
    blocks = dict(lock_blocks(text))
    assert list(blocks) == ["a-b", "c"]
    assert blocks["a-b"].count("--hash") == 2
    assert "header" not in "".join(blocks.values())


def test_shell_logs_a_program_and_returns_its_status(tmp_path: Path) -> None:
    shell = Shell(root=tmp_path, log=tmp_path / "new" / "log", say=print)
    assert shell.run([sys.executable, "-c", "print('first')"]) == 0
    code = "import os; print(os.getcwd()); raise SystemExit(7)"
    assert shell.run([sys.executable, "-c", code]) == 7
    assert shell.tail(5)[-1] == str(tmp_path)
    assert "first" not in shell.tail(5)
    assert "first" in (tmp_path / "new" / "log").read_text()


def test_shell_says_what_a_slow_program_is_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program ends when it is told that its output was shown."""
    monkeypatch.setattr("deploy.machine.HEARTBEAT_S", 0.05)
    done = tmp_path / "done"
    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        if "linking" in line:
            done.touch()

    code = (
        "import pathlib, threading; print('linking', flush=True)\n"
        f"while not pathlib.Path({str(done)!r}).exists(): threading.Event().wait(0.01)"
    )
    assert (
        Shell(root=tmp_path, log=tmp_path / "log", say=say).run([sys.executable, "-c", code]) == 0
    )
    assert any("linking" in line for line in lines)


def test_shell_answers_nothing_for_a_program_that_fails_or_is_missing(tmp_path: Path) -> None:
    shell = Shell(root=tmp_path, log=tmp_path / "log", say=print)
    assert shell.answer([sys.executable, "-c", "print(41 + 1)"]) == "42"
    assert shell.answer([sys.executable, "-c", "raise SystemExit(1)"]) == ""
    assert shell.answer([str(tmp_path / "nothing")]) == ""
