"""Control groups of instances, version 2 only: memory, processors, number of processes, sure end.

A control group may only be split by whoever it was delegated to (kernel documentation,
admin-guide/cgroup-v2.rst, "Delegation"; systemd, docs/CGROUP_DELEGATION.md). It is ours

* when systemd says so: the unit has ``Delegate=yes``, which it writes onto the group as the
  attribute ``user.delegate`` (from version 251) or ``trusted.delegate``; or
* when it is the root of a control group namespace, a container, that runs no systemd.

Processes live in leaves only, so that those of our group move into one, ``foam-agents``, before its
controllers are handed to the groups of instances, which are its neighbours. Groups above and beside
ours are never touched.
"""

import contextlib
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

_LEAF: Final = "foam-agents"
_PREFIX: Final = "foam-instance"
_CONTROLLERS: Final = ("cpu", "memory", "pids")
_DELEGATED: Final = ("user.delegate", "trusted.delegate")
_PERIOD_US: Final = 100_000
_MOVES: Final = 5
_REMOVE_LIMIT_S: Final = 3.0
_REMOVE_PASS_S: Final = 0.005


class NoCgroup(Exception):  # noqa: N818 - a finding, not an error
    """There is no control group for us, and why."""


@dataclass(frozen=True, slots=True)
class Cgroup:
    """The control group of one instance.

    Attributes:
        path: Its folder.
    """

    path: Path

    @property
    def door(self) -> Path:
        """The file to which a process writes ``0`` to move in."""
        return self.path / "cgroup.procs"

    def kill(self) -> bool:
        """Kill everything in it; tells whether this kernel can (Linux 5.14)."""
        try:
            (self.path / "cgroup.kill").write_text("1")
        except OSError:
            return False
        return True

    def ran_out_of_memory(self) -> bool:
        """Tell whether the kernel killed something in it for want of memory."""
        with contextlib.suppress(OSError):
            for line in (self.path / "memory.events").read_text().splitlines():
                name, _, count = line.partition(" ")
                if name == "oom_kill":
                    return int(count) > 0
        return False

    def remove(self) -> bool:
        """Remove it once it is empty, and what was made within; blocks for 3 seconds at most."""
        until = time.monotonic() + _REMOVE_LIMIT_S
        while True:
            for folder, _, _ in os.walk(self.path, topdown=False):
                with contextlib.suppress(OSError):  # a process in it has not quite gone
                    Path(folder).rmdir()
            if not self.path.exists():
                return True
            if time.monotonic() > until:
                return False
            time.sleep(_REMOVE_PASS_S)


@dataclass(frozen=True, slots=True)
class CgroupTree:
    """The control group that is ours to split.

    Attributes:
        path: Its folder.
        controllers: Those of ``cpu``, ``memory``, ``pids`` that it has for its groups.
    """

    path: Path
    controllers: frozenset[str]

    def adopt(self) -> None:
        """Move our processes into a leaf, hand the controllers on, and clear what is left over.

        Raises:
            OSError: It is not ours after all.
        """
        leaf = self.path / _LEAF
        leaf.mkdir(exist_ok=True)
        for _ in range(_MOVES):  # some may fork meanwhile
            pids = (self.path / "cgroup.procs").read_text().split()
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    (leaf / "cgroup.procs").write_text(pid)
            if not pids:
                break
        for controller in sorted(self.controllers):
            (self.path / "cgroup.subtree_control").write_text(f"+{controller}")
        self._clear()

    def create(self, name: str, limits: Mapping[str, Any]) -> Cgroup:
        """Make the control group of an instance.

        Args:
            name: Unique among the instances of this process.
            limits: As made by `limits_frame`.

        Raises:
            OSError: It cannot be made.
        """
        made = Cgroup(self.path / f"{_PREFIX}-{os.getpid()}-{name}")
        made.path.mkdir()
        try:
            for file, value in _settings(limits).items():
                if file.partition(".")[0] in self.controllers:
                    with contextlib.suppress(FileNotFoundError):  # no swap in this kernel
                        (made.path / file).write_text(value)
        except OSError:
            with contextlib.suppress(OSError):
                made.path.rmdir()  # nobody else will: it has no instance
            raise
        return made

    def _clear(self) -> None:
        """End what agents that were killed have left here."""
        for folder in self.path.glob(f"{_PREFIX}-*"):
            pid = folder.name.removeprefix(f"{_PREFIX}-").partition("-")[0]
            if not Path("/proc", pid).exists():
                Cgroup(folder).kill()
                Cgroup(folder).remove()


def find_tree(*, proc: Path = Path("/proc"), run: Path = Path("/run")) -> CgroupTree:
    """Find the control group that was delegated to this process; changes nothing.

    Args:
        proc: Where ``procfs`` is mounted.
        run: Where a running systemd shows itself (``sd_booted(3)``).

    Raises:
        NoCgroup: There is none; the message says why and what to do.
    """
    try:
        folder = own_folder(
            (proc / "self" / "mountinfo").read_text(), (proc / "self" / "cgroup").read_text()
        )
    except OSError as exc:
        raise NoCgroup(f"no control groups: {exc}") from exc
    if not (folder / "cgroup.type").exists():
        raise NoCgroup("the node runs in the root control group, which is the system's")
    booted = (run / "systemd" / "system").is_dir()
    for found in (folder, folder.parent):  # systemd's DelegateSubgroup= and we go one level down
        is_root = found == folder and not (found.parent / "cgroup.procs").exists()
        if _is_delegated(found) or (is_root and not booted):
            break
    else:
        raise NoCgroup("control groups are not delegated: start the node with Delegate=yes")
    if not os.access(found, os.W_OK) or not os.access(found / "cgroup.subtree_control", os.W_OK):
        raise NoCgroup(f"{found} cannot be written")
    has = (found / "cgroup.controllers").read_text().split()
    return CgroupTree(found, frozenset(has).intersection(_CONTROLLERS))


def own_folder(mountinfo: str, cgroup: str) -> Path:
    """Return the folder of this process's control group.

    Args:
        mountinfo: Text of ``/proc/self/mountinfo``, ``proc_pid_mountinfo(5)``.
        cgroup: Text of ``/proc/self/cgroup``, ``cgroups(7)``.

    Raises:
        NoCgroup: No control groups of version 2 are mounted, or not the part this process is in.
    """
    own = next((line[3:] for line in cgroup.splitlines() if line.startswith("0::")), None)
    if own is None:
        raise NoCgroup("no control groups of version 2")
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        if right.split(" ", 1)[0] == "cgroup2":
            root, mounted = (_unescaped(part) for part in left.split(" ")[3:5])
            if not PurePosixPath(own).is_relative_to(root):
                raise NoCgroup("the control group of this process is mounted nowhere")
            return Path(mounted, PurePosixPath(own).relative_to(root))
    raise NoCgroup("control groups of version 2 are mounted nowhere")


def _unescaped(path: str) -> str:
    return path.encode().decode("unicode_escape") if "\\" in path else path


def _is_delegated(folder: Path) -> bool:
    for name in _DELEGATED:
        with contextlib.suppress(OSError):
            if os.getxattr(folder, name) == b"1":
                return True
    return False


def _settings(limits: Mapping[str, Any]) -> dict[str, str]:
    """Return what to write into which file of a control group."""
    files: dict[str, str] = {}
    if limits.get("memory_bytes") is not None:
        files |= {"memory.max": str(limits["memory_bytes"]), "memory.swap.max": "0"}
        files["memory.oom.group"] = "1"
    if limits.get("cpus") is not None:
        files["cpu.max"] = f"{max(1000, round(limits['cpus'] * _PERIOD_US))} {_PERIOD_US}"
    if limits.get("processes") is not None:
        files["pids.max"] = str(limits["processes"])
    return files
