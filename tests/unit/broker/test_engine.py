"""What the engines do before and around a broker."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from broker import guard, mosquitto, nats
from broker.access import CredentialStore, Role
from broker.engine import EngineSettings, check_port, find_binary, guarded
from broker.mosquitto import MosquittoBroker
from broker.nats import NatsBroker
from capability_schemas.errors import BrokerUnavailable, ConfigurationError
from capability_schemas.topics import Topics
from support.ports import free_port


@pytest.fixture
def parts(tmp_path):
    store = CredentialStore(tmp_path / "credentials.json")
    return {
        "settings": EngineSettings(data_dir=tmp_path / "broker"),
        "credentials": store,
        "topics": Topics(),
    }


@pytest.mark.parametrize(
    ("module", "engine", "more"),
    [(mosquitto, MosquittoBroker, {}), (nats, NatsBroker, {"passwords": {}})],
)
async def test_a_missing_binary_is_said_clearly(parts, monkeypatch, module, engine, more):
    monkeypatch.setattr(module, "find_binary", lambda _: None)
    assert not engine.available()
    with pytest.raises(ConfigurationError, match=r"no .* binary on this machine"):
        async with engine(**parts, **more):
            pass


async def test_a_broker_that_refuses_its_configuration_is_quoted(parts, monkeypatch):
    monkeypatch.setattr(mosquitto, "find_binary", lambda _: Path(sys.executable))
    with pytest.raises(ConfigurationError, match=r"(?s)ended with status [^0].*mosquitto\.conf"):
        async with MosquittoBroker(**parts):
            pass


def test_an_engine_that_does_not_run_has_no_url(parts):
    engine = MosquittoBroker(**parts)
    with pytest.raises(BrokerUnavailable):
        _ = engine.url


async def test_mosquitto_is_told_what_matters(parts):
    """The settings without which it is slow, forgetful or open."""
    engine = MosquittoBroker(**parts)
    text = engine._configuration(1883).splitlines()
    assert {
        "listener 1883 127.0.0.1",
        "allow_anonymous false",
        "set_tcp_nodelay true",
        "max_inflight_messages 200",
        "max_queued_messages 20000",
        "persistence true",
        "autosave_interval 2",
        "max_packet_size 16777216",
    } <= set(text)
    assert ("user root" in text) is (os.geteuid() == 0)


@pytest.mark.parametrize(
    ("members", "access", "plugin", "chosen"),
    [
        (1, None, True, "dynamic"),
        (1, None, False, "static"),
        (2, None, True, "static"),  # too many for the plugin
        (2, "dynamic", True, "dynamic"),
        (1, "static", True, "static"),
    ],
)
def test_mosquitto_is_told_of_rights_as_it_can(parts, monkeypatch, members, access, plugin, chosen):
    monkeypatch.setattr(mosquitto, "find_plugin", lambda: Path("/plugin.so") if plugin else None)
    monkeypatch.setattr(mosquitto, "_DYNAMIC_MOST", 1)
    for number in range(members):
        parts["credentials"].add(f"pump-{number}", Role.DEVICE)
    settings = parts["settings"].model_copy(update={"access": access})
    engine = MosquittoBroker(**parts | {"settings": settings})
    text = engine._configuration(1883)
    assert engine.access == chosen
    assert engine.traits.refuses_forbidden_filter is (chosen == "dynamic")
    assert ("plugin /plugin.so" in text, "acl_file" in text) == (
        chosen == "dynamic",
        chosen == "static",
    )


def test_dynamic_access_without_the_plugin_is_refused(parts, monkeypatch):
    monkeypatch.setattr(mosquitto, "find_plugin", lambda: None)
    settings = parts["settings"].model_copy(update={"access": "dynamic"})
    with pytest.raises(ConfigurationError, match=r"dynamic_security\.so is not on this machine"):
        MosquittoBroker(**parts | {"settings": settings})


def test_files_with_secrets_are_private(parts):
    password = parts["credentials"].add("pump-7", Role.DEVICE)
    folder = parts["settings"].data_dir
    folder.mkdir()
    static = parts["settings"].model_copy(update={"access": "static"})
    MosquittoBroker(**parts | {"settings": static})._write_access()
    NatsBroker(**parts, passwords={"pump-7": password})._write_access()
    assert {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()} == {
        "mosquitto.passwords": 0o600,
        "mosquitto.acl": 0o600,
        "nats-users.conf": 0o600,
    }


async def test_a_taken_port_is_named_and_a_free_one_passes():
    server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    with pytest.raises(ConfigurationError) as error:
        check_port("127.0.0.1", port)
    assert error.value.detail == {"port": port}
    server.close()
    await server.wait_closed()
    check_port("127.0.0.1", free_port())


def test_binaries_are_found_beside_the_path(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert find_binary("surely-no-such-broker") is None
    if Path("/usr/sbin/mosquitto").exists():
        assert find_binary("mosquitto") == Path("/usr/sbin/mosquitto")


def test_the_guard_becomes_the_program():
    command = guarded(Path(sys.executable), "-c", "import os; print(os.getpid())")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        out, _ = child.communicate(timeout=20)
    assert int(out) == child.pid


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux")
def test_the_guard_does_not_start_an_orphan():
    command = [sys.executable, str(Path(guard.__file__)), "1", sys.executable, "-c", "print('ran')"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    assert done.stdout == ""
