"""``foam rules`` looks a file over and tries it, without a mesh."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from capability_schemas.errors import ConfigurationError, InvalidTask
from foam.cli import app

GOOD = """
[[rule]]
name = "leaks"
when.keywords = "leak*"
require = { zone = "hall-3", external = false }
min_confidence = 0.8

[[rule]]
name = "bench"
when = { client = "bench-*", data = "private" }
prefer = { node = "lab-*" }
policy = { zones = "lab" }
"""
BAD = '[[rule]]\nname = "r"\nstop = 1\nwhen = { client = [] }\n'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FOAM_DATA", str(tmp_path))
    monkeypatch.delenv("FOAM_RULES", raising=False)
    (tmp_path / "rules.toml").write_text(GOOD)
    (tmp_path / "bad.toml").write_text(BAD)
    return tmp_path


def run(*args: str | Path) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["rules", *map(str, args)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout


def test_check_counts_the_rules_of_a_good_file(folder: Path) -> None:
    path = folder / "rules.toml"
    assert run("check", path) == (0, f"{path}: 2 rules, 0 errors\n")
    assert run("check") == (0, f"{path}: 2 rules, 0 errors\n")


def test_check_takes_the_file_that_the_environment_names(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOAM_RULES", str(folder / "bad.toml"))
    assert run("check")[0] == 20


def test_check_tells_every_mistake_and_fails(folder: Path) -> None:
    path = folder / "bad.toml"
    code, out = run("check", path)
    assert code == 20
    assert out.splitlines() == [
        f'error   {path}:3: rule "r": stop: write true or false',
        f'error   {path}:4: rule "r": when.client: is empty: remove it, or fill it',
        f"{path}: 0 rules, 2 errors",
    ]


def test_check_as_json(folder: Path) -> None:
    code, out = run("check", folder / "bad.toml", "--json")
    told = json.loads(out)
    assert (code, told["ok"], told["rules"]) == (20, False, [])
    assert [(one["line"], one["field"]) for one in told["problems"]] == [
        (3, "stop"),
        (4, "when.client"),
    ]
    code, out = run("check", folder / "rules.toml", "--json")
    assert (code, json.loads(out)["rules"]) == (0, ["leaks", "bench"])


def test_a_file_that_is_not_there_is_said(folder: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"none\.toml: rules file does not exist"):
        run("check", folder / "none.toml")


def test_try_shows_what_applies_and_what_it_demands(folder: Path) -> None:
    task = json.dumps({"policy": {"data": "private"}})
    assert run("try", folder / "rules.toml", "it leaks", "--client", "bench-1", "--task", task) == (
        0,
        (
            "apply           leaks, bench\n"
            'require         zone "hall-3", external false  (rule leaks)\n'
            'prefer          node "lab-*" +0.05  (rule bench)\n'
            "min_confidence  0.8\n"
            'policy.zones    ["lab"]\n'
        ),
    )
    assert run("try", folder / "rules.toml", "hello") == (0, "no rule applies\n")


def test_try_as_json_and_for_a_named_function(folder: Path) -> None:
    code, out = run("try", folder / "rules.toml", "--task", '{"function": "echo"}', "--json")
    assert (code, json.loads(out)) == (0, {"matched": []})


@pytest.mark.parametrize(
    ("task", "expected"),
    [("{", "--task is not JSON"), ("[]", "text is missing"), ("5", "--task is no JSON object"),
     ('{"txt": 1}', "txt: unknown field"), ("{}", "text is missing")],
)  # fmt: skip
def test_try_refuses_what_is_no_task(folder: Path, task: str, expected: str) -> None:
    with pytest.raises(InvalidTask, match=expected):
        run("try", folder / "rules.toml", "--task", task)


def test_try_refuses_a_bad_file(folder: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"bad\.toml:3"):
        run("try", folder / "bad.toml", "hello")
