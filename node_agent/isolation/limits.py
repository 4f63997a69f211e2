"""Limits of an instance on their way to its process."""

from typing import Any

from capability_schemas.functions import FunctionLimits


def limits_frame(limits: FunctionLimits, *, network: bool | None = None) -> dict[str, Any]:
    """Return the resource limits of a specification, as ``load`` frames carry them.

    Args:
        limits: Those of the function.
        network: Whether the instance may open network connections; as the function says when
            None. For runtimes that need a connection themselves.
    """
    return {
        "memory_bytes": limits.memory_bytes,
        "cpu_s": limits.cpu_s,
        "open_files": limits.open_files,
        "file_bytes": limits.file_bytes,
        "processes": limits.processes,
        "cpus": limits.cpus,
        "network": limits.network if network is None else network,
    }
