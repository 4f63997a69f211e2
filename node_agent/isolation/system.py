"""What this machine offers to keep instances apart, found out once."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import structlog

from node_agent.isolation.cgroup import CgroupTree, NoCgroup, find_tree
from node_agent.isolation.folders import sweep_folders
from node_agent.worker import seccomp

_NEEDED: Final = {"processes": "pids", "cpus": "cpu"}
"""Limits that only a control group can hold, and the controller they need."""

_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Isolation:
    """Means of isolation beyond resource limits, which are always there.

    Attributes:
        cgroups: Control group to split among instances, or None.
        no_cgroups: Why there is none; empty when there is.
        no_network_filter: Why instances cannot be kept off the network; empty when they can.
    """

    cgroups: CgroupTree | None
    no_cgroups: str
    no_network_filter: str

    def missing(self, limits: Mapping[str, Any]) -> dict[str, str]:
        """Return which limits that are set cannot be held here, and why.

        Args:
            limits: As made by `limits_frame`.
        """
        missing = {}
        for name, controller in _NEEDED.items():
            if limits.get(name) is None:
                continue
            if self.cgroups is None:
                missing[name] = self.no_cgroups
            elif controller not in self.cgroups.controllers:
                missing[name] = f"{self.cgroups.path} lacks the controller {controller}"
        if self.no_network_filter and not limits.get("network"):
            missing["network"] = self.no_network_filter
        return missing


def find_isolation() -> Isolation:
    """Look at what this machine offers; changes nothing."""
    tree, reason = None, ""
    try:
        tree = find_tree()
    except NoCgroup as exc:
        reason = str(exc)
    return Isolation(cgroups=tree, no_cgroups=reason, no_network_filter=seccomp.why_not())


@functools.lru_cache(maxsize=1)
def system_isolation() -> Isolation:
    """Find out what there is and make it ready for instances, once in this process; logs it.

    Also clears away what agents that were killed have left.
    """
    found = find_isolation()
    if found.cgroups is not None:
        try:
            found.cgroups.adopt()
        except OSError as exc:
            found = Isolation(
                cgroups=None, no_cgroups=str(exc), no_network_filter=found.no_network_filter
            )
    log = _log.warning if found.no_network_filter else _log.info
    log(
        "isolation.found",
        cgroup=None if found.cgroups is None else str(found.cgroups.path),
        controllers=[] if found.cgroups is None else sorted(found.cgroups.controllers),
        no_cgroups=found.no_cgroups,
        no_network_filter=found.no_network_filter,
        folders_swept=sweep_folders(),
    )
    return found
