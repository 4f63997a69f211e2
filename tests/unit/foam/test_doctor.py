"""What ``foam doctor`` says of runtimes and isolation."""

import importlib.util
from pathlib import Path

import pytest
from pydantic import SecretStr

from capability_schemas.errors import AccessDenied, Unavailable
from foam.doctor import run_checks
from foam.mesh import MeshFolder, MeshRecord, Person
from foam.sdk.client import MeshClient
from foam.settings import Settings
from node_agent.isolation import system
from node_agent.isolation.cgroup import CgroupTree
from node_agent.isolation.system import Isolation
from support.plugin import installed_plugin
from support.ports import free_port


def checks(folder):
    found = run_checks(Settings(data=folder))
    return {check.what: check for check in found if check.what.startswith("runtime ")}


@pytest.fixture
def without(monkeypatch):
    """Make libraries look as if they were not installed."""
    real = importlib.util.find_spec

    def hide(*names):
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: None if name in names else real(name)
        )

    return hide


def test_a_runtime_that_cannot_run_says_why_and_what_to_do(tmp_path, without):
    without("wasmtime", "llama_cpp", "xllamacpp")
    found = checks(tmp_path)
    assert found["runtime python"].verdict == "ok"
    assert found["runtime wasm"].verdict == "note"
    assert "wasmtime is not installed" in found["runtime wasm"].found
    assert "foam-mesh[wasm]" in found["runtime wasm"].remedy
    assert found["runtime llama_cpp"].verdict == "missing"  # what is shipped needs it


def test_runtimes_of_other_distributions_are_listed(tmp_path):
    with installed_plugin(tmp_path):
        assert checks(tmp_path)["runtime echo"].found == "foam-echo 1.0.0"


def test_a_mesh_that_refuses_us_is_a_failure_with_the_right_advice(tmp_path, monkeypatch):
    def refuse(_self):
        raise AccessDenied("the broker refuses the connection of admin-1")

    monkeypatch.setattr(MeshClient, "__aenter__", refuse)

    def mesh(**given):
        found = run_checks(Settings(data=tmp_path, **given))
        return next(check for check in found if check.what == "mesh")

    url = {"url": "mqtt://127.0.0.1:1", "site": "local"}
    assert (mesh().verdict, mesh(**url).verdict) == ("note", "failed")
    assert "password" in mesh(**url).remedy
    person = Person(id="admin-1", username="admin-1", password=SecretStr("old"))
    record = MeshRecord(broker=url["url"], site="local", device=person, admin=person)
    MeshFolder(tmp_path).prepare().write_record(record)
    assert (mesh().verdict, "foam up" in mesh().remedy) == ("failed", True)


def test_a_mesh_is_told_with_its_sleepers_and_a_silent_one_with_the_way_on(tmp_path, monkeypatch):
    answers = [
        {"nodes": 2, "asleep": 1, "functions": 5},
        Unavailable("no router lives: router-1 is offline"),
    ]

    async def enter(self):
        return self

    async def leave(*_):
        pass

    async def admin(*_, **__):
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(MeshClient, "__aenter__", enter)
    monkeypatch.setattr(MeshClient, "__aexit__", leave)
    monkeypatch.setattr(MeshClient, "admin", admin)
    settings = Settings(data=tmp_path, url="mqtt://127.0.0.1:1", site="local")

    def mesh():
        return next(check for check in run_checks(settings) if check.what == "mesh")

    assert mesh().found.endswith("2 nodes live, 1 asleep, 5 functions")
    silent = mesh()
    assert (silent.verdict, silent.found) == ("note", "no router lives: router-1 is offline")
    assert "foam routers" in silent.remedy


def test_a_broken_one_is_named(tmp_path):
    with installed_plugin(tmp_path):
        (tmp_path / "foam_echo.py").write_text("import not_there")
        broken = checks(tmp_path)["runtime echo"]
    assert broken.verdict == "note"
    assert "not_there" in broken.found


@pytest.mark.parametrize(
    ("isolation", "verdicts"),
    [
        (Isolation(cgroups=None, no_cgroups="v1 only", no_network_filter="too old"), "note note"),
        (
            Isolation(
                cgroups=CgroupTree(Path("/sys/fs/cgroup/unit"), frozenset({"pids", "cpu"})),
                no_cgroups="",
                no_network_filter="",
            ),
            "ok ok",
        ),
    ],
)
def test_what_keeps_instances_apart_is_said(tmp_path, monkeypatch, isolation, verdicts):
    monkeypatch.setattr(system, "find_isolation", lambda: isolation)
    found = {check.what: check for check in run_checks(Settings(data=tmp_path))}
    network, groups = found["network filter"], found["control groups"]
    assert f"{network.verdict} {groups.verdict}" == verdicts
    if isolation.cgroups is None:
        assert (network.found, groups.found) == ("too old", "v1 only")
        assert "Delegate=yes" in groups.remedy
    else:
        assert groups.found == "cpu, pids, /sys/fs/cgroup/unit"


def test_each_broker_of_a_list_is_looked_at(tmp_path):
    urls = [f"mqtt://127.0.0.1:{free_port()}" for _ in range(2)]
    found = {check.what: check for check in run_checks(Settings(data=tmp_path, url=",".join(urls)))}
    for url in urls:
        check = found[f"broker {url}"]
        assert check.verdict == "failed"
        assert "refused" in check.found
        assert "others serve" in check.remedy
    one = run_checks(Settings(data=tmp_path, url=urls[0]))
    assert not [check for check in one if check.what.startswith("broker ")]
