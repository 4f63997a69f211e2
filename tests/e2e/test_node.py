"""``foam node check``, and edits of a node that runs."""

import json
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent

import pytest

from support.foam_process import FoamUp, foam_up, run_foam

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(180),  # the first test waits for the mesh of all
]

_SHOP = '''
from foam import function

@function(examples=["add two and three", "what is one plus one?", "sum up 4 and 5"])
def add(a: float, b: float) -> float:
    """Add two numbers and return their sum."""
    return a + b

@function
def speed(text: str) -> str:
    """Say how fast a machine runs, as of this version."""
    return "slow"
'''


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    (tmp_path / "shop.py").write_text(_SHOP)
    path = tmp_path / "shop.toml"
    path.write_text('[[function]]\nsource = "shop.py"\n')
    return path


def test_a_check_says_what_would_run_and_what_could_be_better(shop: Path) -> None:
    done = run_foam("node", "check", str(shop))
    assert done.returncode == 0, done.stderr
    *problems, counts = done.stdout.decode().splitlines()
    assert counts == f"{shop}: 2 functions, 0 errors, 1 warning"
    (problem,) = problems
    assert problem.startswith(f'warning {shop}:1: function "speed": examples: 0 given; fewer than')


def test_a_check_finds_everything_that_is_wrong(shop: Path) -> None:
    shop.write_text(
        dedent(
            """
            [node]
            zone = ["hall"]

            [[function]]
            source = "shop.py"
            name = "add"
            limits = { memory_bytes = 1000 }
            policy = { zones = ["yard"] }

            [[function]]
            name = "count"
            description = "Count beads with an abacus, one by one."
            runtime = "abacus"
            """
        )
    )
    done = run_foam("node", "check", str(shop), "--json")
    assert done.returncode == 20
    facts = json.loads(done.stdout)
    assert (facts["ok"], facts["functions"]) == (False, ["count"])
    told = [
        (one["line"], one["what"], one["field"]) for one in facts["problems"] if not one["warning"]
    ]
    assert told == [
        (5, 'function "add"', "limits.memory_bytes"),
        (None, "[node]", "zone"),
        (11, 'function "count"', "runtime"),
    ]


@pytest.mark.parametrize("name", ["missing.toml", "missing.py"])
def test_a_check_of_nothing_is_an_error(tmp_path: Path, name: str) -> None:
    done = run_foam("node", "check", str(tmp_path / name))
    assert done.returncode == 20
    assert b"does not exist" in done.stdout
    assert b"Traceback" not in done.stderr


def _wait(check: Callable[[], bool], *, within_s: float = 60.0) -> None:
    """Wait until a running mesh has got to something."""
    until = time.monotonic() + within_s
    while not check():
        assert time.monotonic() < until, "did not happen in time"
        time.sleep(0.2)


def _functions(mesh: FoamUp) -> dict[str, str]:
    """Return the versions of the functions that the mesh has live."""
    done = run_foam("functions", "--json", "--data", str(mesh.data))
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["functions"]
    return {row["function"]: row["version"] for row in rows if row["live"]}


@pytest.fixture
def mesh(shop: Path, tmp_path: Path) -> Iterator[FoamUp]:
    with foam_up(tmp_path / "mesh", "--broker", "embedded", "--node", str(shop)) as up:
        yield up


@pytest.mark.broker
@pytest.mark.encoder
def test_edits_of_a_running_node_show_in_the_mesh(mesh: FoamUp, shop: Path) -> None:
    code = shop.with_name("shop.py")
    log = mesh.data / "logs" / "node-shop.log"
    assert mesh.ask("--function", "speed", "how fast?").stdout.decode().strip() == "slow"

    code.write_text(_SHOP.replace('"slow"', '"fast"'))
    _wait(lambda: mesh.ask("--function", "speed", "how fast?").stdout.decode().strip() == "fast")

    shop.write_text('[defaults]\nversion = "2.0.0"\n[[function]]\nentry = "shop.py:add"\n')
    _wait(lambda: _functions(mesh) == {"add": "2.0.0"})

    shop.write_text("[[function]\n")
    _wait(lambda: "node.edit_refused" in log.read_text())
    assert "shop.toml:1: no TOML" in log.read_text()
    assert _functions(mesh) == {"add": "2.0.0"}

    shop.write_text('[[function]]\nsource = "shop.py"\n')
    _wait(lambda: _functions(mesh) == {"add": "1.0.0", "speed": "1.0.0"})


@pytest.mark.broker
@pytest.mark.encoder
def test_a_node_that_does_not_watch_is_told_by_signal(shop: Path, tmp_path: Path) -> None:
    data = tmp_path / "mesh"
    with foam_up(data, "--broker", "embedded", "--node", str(shop), FOAM_WATCH="0") as up:
        shop.write_text('[[function]]\nentry = "shop.py:add"\n')
        up.child("node").send_signal(signal.SIGHUP)
        _wait(lambda: list(_functions(up)) == ["add"])
