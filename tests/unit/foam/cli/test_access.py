"""``foam access`` shows what members may do, and writes it for other brokers."""

import json
import stat

import pytest
from typer.testing import CliRunner

from broker.access.policy import Role
from capability_schemas.errors import ConfigurationError, NotFound
from foam.cli import app
from foam.mesh import MeshFolder


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FOAM_DATA", str(tmp_path))
    monkeypatch.delenv("FOAM_SITE", raising=False)
    made = MeshFolder(tmp_path).prepare()
    made.create("pump-7", Role.DEVICE)
    made.create("edge-1", Role.NODE)
    return made


def run(*args):
    done = CliRunner().invoke(app, ["access", *map(str, args)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def test_a_member_is_shown(folder):
    assert run("show", "pump-7").stdout.splitlines() == [
        "publish    foam/v1/local/task/pump-7",
        "publish    foam/v1/local/task/pump-7/cancel",
        "publish    foam/v1/local/task/pump-7/resume",
        "publish    foam/v1/local/direct/+/pump-7",
        "publish    foam/v1/local/direct/+/pump-7/cancel",
        "publish    foam/v1/local/direct/+/pump-7/resume",
        "subscribe  foam/v1/local/reply/pump-7/#",
        "subscribe  foam/v1/local/catalog/+/+",
        "subscribe  foam/v1/local/node/+/state",
        "subscribe  foam/v1/local/node/+/load",
        "subscribe  foam/v1/local/router/+/state",
    ]
    folder.credentials().update("pump-7", disabled=True)
    assert "disabled" in run("show", "pump-7").stderr
    facts = json.loads(run("show", "edge-1", "--json", "--site", "hall").stdout)
    assert (facts["role"], facts["password"], facts["certificates"]) == ("node", True, [])
    assert "foam/v1/hall/invoke/edge-1" in facts["subscribe"]


def test_a_role_is_shown_for_whoever_holds_it(folder):
    assert run("show", "--role", "enrollee").stdout.splitlines() == [
        "publish    foam/v1/local/enroll/{self}",
        "subscribe  foam/v1/local/enroll/{self}/reply",
    ]


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        (("show",), ConfigurationError, "name a member, or a role"),
        (("show", "pump-7", "--role", "node"), ConfigurationError, "name a member, or a role"),
        (("show", "pump-8"), NotFound, "pump-8 is no member"),
        (("show", "--role", "king"), ConfigurationError, "use one of device"),
        (("export", "--for", "rabbit"), ConfigurationError, "use emqx, mosquitto, nats"),
        (("export", "--for", "emqx", "--identity", "pump-8"), NotFound, "pump-8"),
    ],
)
def test_what_is_wrong_is_said(folder, arguments, error, said):
    with pytest.raises(error, match=said):
        run(*arguments)


@pytest.mark.parametrize("broker", ["mosquitto", "emqx", "nats"])
def test_files_are_written_privately_and_hold_no_password(folder, tmp_path, broker):
    out = tmp_path / "out"
    named = run("export", "--for", broker, "-o", out).stdout.split()
    assert sorted(named) == sorted(str(path) for path in out.iterdir())
    assert {stat.S_IMODE(path.stat().st_mode) for path in out.iterdir()} == {0o600}
    text = "".join(path.read_text() for path in out.iterdir())
    assert not any(secret in text for secret in folder.passwords().values())
    assert {"pump-7", "edge-1"} <= {name for name in ("pump-7", "edge-1") if name in text}
    shown = run("export", "--for", broker).stdout
    assert all(f"==> {path.name} <==" in shown for path in out.iterdir())


def test_one_member_can_be_exported_alone(folder):
    shown = run("export", "--for", "mosquitto", "--identity", "pump-7").stdout
    assert "pump-7" in shown
    assert "edge-1" not in shown


def test_a_folder_that_cannot_be_written_is_named(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match=r"file.* cannot be written"):
        run("export", "--for", "nats", "-o", tmp_path / "file")
