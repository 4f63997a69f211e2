"""Control groups: whose they are, what is written, and a real one where this machine lets us."""

import contextlib
import errno
import os
import secrets
from pathlib import Path

import pytest

from capability_schemas.functions import FunctionLimits
from node_agent.isolation import cgroup
from node_agent.isolation.cgroup import CgroupTree, NoCgroup, find_tree, own_folder
from node_agent.isolation.limits import limits_frame
from node_agent.isolation.system import Isolation
from node_agent.runtimes.base import Request
from node_agent.runtimes.child import ChildInstance

HOSTILE = Path(__file__).parents[3] / "data" / "functions" / "hostile.py"
MOUNT = "31 23 0:27 {root} {at} rw,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
OLD = "30 23 0:26 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"


def test_the_folder_comes_from_the_mounts():
    mounts = OLD + MOUNT.format(root="/", at="/sys/fs/cgroup")
    assert own_folder(mounts, "9:cpu:/\n0::/a.slice/b.service\n") == Path(
        "/sys/fs/cgroup/a.slice/b.service"
    )


def test_a_container_sees_a_part_of_the_tree():
    mounts = MOUNT.format(root="/docker/abc", at="/sys/fs/my\\040groups")
    assert own_folder(mounts, "0::/docker/abc/x\n") == Path("/sys/fs/my groups/x")
    with pytest.raises(NoCgroup, match="mounted nowhere"):
        own_folder(mounts, "0::/docker/other\n")


@pytest.mark.parametrize(("mounts", "own"), [(OLD, "9:cpu:/\n"), (OLD, "0::/\n"), ("", "0::/\n")])
def test_version_1_alone_is_none(mounts, own):
    with pytest.raises(NoCgroup, match="of version 2"):
        own_folder(mounts, own)


class System:
    """A system as `find_tree` sees it: a unit in a slice, below the root."""

    def __init__(self, folder):
        self.root = folder / "cgroup"
        self.unit = self.root / "a.slice" / "node.service"
        self.proc, self.run = folder / "proc", folder / "run"
        self.run.mkdir()
        self.delegated = set()
        for path in (self.root, self.unit.parent, self.unit):
            self.add(path)
        (self.root / "cgroup.type").unlink()  # the root alone has none

    def add(self, path):
        path.mkdir(parents=True, exist_ok=True)
        for name in ("cgroup.type", "cgroup.procs", "cgroup.subtree_control"):
            (path / name).write_text("")
        (path / "cgroup.controllers").write_text("cpuset cpu io memory pids\n")

    def find(self, own):
        (self.proc / "self").mkdir(parents=True, exist_ok=True)
        mounts = MOUNT.format(root="/", at=self.root)
        (self.proc / "self" / "mountinfo").write_text(mounts)
        (self.proc / "self" / "cgroup").write_text(f"0::{own}\n")
        return find_tree(proc=self.proc, run=self.run)

    def getxattr(self, path, name):
        if Path(path) in self.delegated and name == "user.delegate":
            return b"1"
        raise OSError(61, "no data")


@pytest.fixture
def system(tmp_path, monkeypatch):
    made = System(tmp_path)
    monkeypatch.setattr(os, "getxattr", made.getxattr)
    return made


def test_a_delegated_unit_is_ours(system):
    system.delegated.add(system.unit)
    tree = system.find("/a.slice/node.service")
    assert tree == CgroupTree(system.unit, frozenset({"cpu", "memory", "pids"}))


def test_the_leaf_of_a_delegated_unit_leads_to_it(system):
    system.delegated.add(system.unit)
    system.add(system.unit / "foam-agents")
    assert system.find("/a.slice/node.service/foam-agents").path == system.unit


def test_a_unit_that_is_not_delegated_is_systemds(system):
    (system.run / "systemd" / "system").mkdir(parents=True)
    with pytest.raises(NoCgroup, match="Delegate=yes"):
        system.find("/a.slice/node.service")


def test_a_delegation_further_up_is_somebody_elses(system):
    system.delegated.add(system.root / "a.slice")
    system.add(system.unit / "app.scope")
    with pytest.raises(NoCgroup, match="not delegated"):
        system.find("/a.slice/node.service/app.scope")


def test_the_root_of_the_system_is_never_ours(system):
    with pytest.raises(NoCgroup, match="root control group"):
        system.find("/")


def test_the_root_of_a_container_is_ours_unless_systemd_runs_there(system):
    (system.root / "cgroup.type").write_text("domain\n")
    assert system.find("/").path == system.root
    (system.run / "systemd" / "system").mkdir(parents=True)
    with pytest.raises(NoCgroup, match="not delegated"):
        system.find("/")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everything")
def test_a_group_that_cannot_be_written_is_not_ours(system):
    system.delegated.add(system.unit)
    (system.unit / "cgroup.subtree_control").chmod(0o400)
    with pytest.raises(NoCgroup, match="cannot be written"):
        system.find("/a.slice/node.service")


def test_a_tree_takes_its_processes_and_hands_its_controllers_on(system):
    tree = CgroupTree(system.unit, frozenset({"memory"}))
    tree.adopt()
    assert (system.unit / "foam-agents").is_dir()
    assert (system.unit / "cgroup.subtree_control").read_text() == "+memory"


def test_what_a_killed_agent_left_is_cleared(system, monkeypatch):
    monkeypatch.setattr(cgroup, "_REMOVE_LIMIT_S", 0.0)
    gone = system.unit / "foam-instance-999999999-1"
    ours = system.unit / f"foam-instance-{os.getpid()}-1"
    for path in (gone, ours):
        path.mkdir()
    CgroupTree(system.unit, frozenset()).adopt()
    # A real one goes with its files; of this one stays what was ordered.
    assert (gone / "cgroup.kill").read_text() == "1"
    assert list(ours.iterdir()) == []


def test_limits_become_files(tmp_path):
    limits = limits_frame(FunctionLimits(memory_bytes=5_000_000, processes=7, cpus=1.5))
    made = CgroupTree(tmp_path, frozenset({"cpu", "memory", "pids"})).create("x", limits)
    files = {path.name: path.read_text() for path in made.path.iterdir()}
    assert files == {
        "memory.max": "5000000",
        "memory.swap.max": "0",
        "memory.oom.group": "1",
        "cpu.max": "150000 100000",
        "pids.max": "7",
    }


def test_a_limit_that_is_refused_leaves_no_group_behind(tmp_path, monkeypatch):
    def refuse(_path, _text):
        raise OSError(errno.EINVAL, "no")

    monkeypatch.setattr(Path, "write_text", refuse)
    tree = CgroupTree(tmp_path, frozenset({"memory"}))
    with pytest.raises(OSError, match="no"):
        tree.create("x", limits_frame(FunctionLimits(memory_bytes=5_000_000)))
    assert list(tmp_path.iterdir()) == []


def test_a_controller_that_is_not_there_is_not_written_and_reported(tmp_path):
    limits = limits_frame(FunctionLimits(memory_bytes=5_000_000, processes=7, cpus=1.5))
    tree = CgroupTree(tmp_path, frozenset({"pids"}))
    assert [path.name for path in tree.create("x", limits).path.iterdir()] == ["pids.max"]
    isolation = Isolation(cgroups=tree, no_cgroups="", no_network_filter="")
    assert isolation.missing(limits) == {"cpus": f"{tmp_path} lacks the controller cpu"}
    assert isolation.missing(limits_frame(FunctionLimits())) == {}


def test_without_groups_and_filters_it_is_said_what_is_missing():
    isolation = Isolation(cgroups=None, no_cgroups="none here", no_network_filter="too old")
    limits = limits_frame(FunctionLimits(processes=7))
    assert isolation.missing(limits) == {"processes": "none here", "network": "too old"}
    assert isolation.missing(limits_frame(FunctionLimits(network=True))) == {}


@pytest.mark.parametrize(("events", "ran_out"), [("low 0\noom 1\noom_kill 1\n", True), ("", False)])
def test_death_for_want_of_memory_is_read_from_the_events(tmp_path, events, ran_out):
    (tmp_path / "memory.events").write_text(events)
    assert cgroup.Cgroup(tmp_path).ran_out_of_memory() is ran_out


def lives(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.fixture
def real_tree():
    """A control group of the kernel, made for this test."""
    mounts = Path("/proc/self/mountinfo").read_text() if Path("/proc").is_dir() else ""
    at = next((line.split()[4] for line in mounts.splitlines() if " - cgroup2 " in line), None)
    if at is None:
        pytest.skip("no control groups of version 2 are mounted")
    folder = Path(at, f"foam-test-{secrets.token_hex(4)}")
    try:
        folder.mkdir()
    except OSError as exc:
        pytest.skip(f"no control group can be made here: {exc}")
    yield CgroupTree(folder, frozenset())
    for path in (*folder.glob("*/"), folder):
        with contextlib.suppress(FileNotFoundError):
            path.rmdir()


@pytest.mark.parametrize("end", [True, False])
async def test_a_real_group_ends_everything_that_an_instance_started(
    real_tree, tmp_path, monkeypatch, end
):
    monkeypatch.setattr("node_agent.runtimes.process.end_strays", None)  # the kernel does it
    real_tree.adopt()
    instance = ChildInstance(
        name="daemons-1",
        load={"runtime": "python", "entry": f"{HOSTILE}:daemons", "limits": {}},
        start_timeout_s=20,
        cancel_grace_s=1,
        died=lambda _: None,
        isolation=Isolation(cgroups=real_tree, no_cgroups="", no_network_filter=""),
    )
    await instance.start()
    (group,) = real_tree.path.glob("foam-instance-*")
    assert str(instance.pid) in (group / "cgroup.procs").read_text().split()
    folder = tmp_path / "pids"
    folder.mkdir()
    request = Request(id="r", input={"folder": str(folder), "count": 3, "end": end}, text=None)
    with contextlib.suppress(Exception):
        async for _ in instance.invoke(request):
            pass
    pids = [int(path.name) for path in folder.iterdir()]
    assert len(pids) == 3
    await instance.close(1.0)
    assert not group.exists()
    assert not any(map(lives, pids))
