"""Which sources of evidence a node has: the built-in ones, and those of other distributions."""

from collections.abc import Callable, Iterable
from importlib.metadata import EntryPoint, entry_points
from typing import Final

import structlog

from capability_schemas.ids import check_identifier
from node_agent.attestation.base import EvidenceSource
from node_agent.attestation.software import SoftwareSource
from node_agent.attestation.tpm import DEFAULT_REGISTERS, TpmSource

ENTRY_POINTS: Final = "foam.evidence"
RESERVED: Final = frozenset({"code", "function", "model", "tpm2"})
_log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


def evidence_sources(
    *, tpm_key: str | None = None, tpm_registers: str | None = None
) -> list[EvidenceSource]:
    """Make the sources of this installation; one that cannot be made is logged and left out.

    Args:
        tpm_key: Handle or context file of the attestation key; None: no TPM is asked.
        tpm_registers: Bank and registers to be quoted; None: ``DEFAULT_REGISTERS``.
    """
    sources: list[EvidenceSource] = [SoftwareSource()]
    if tpm_key is not None:
        sources.append(TpmSource(tpm_key, registers=tpm_registers or DEFAULT_REGISTERS))
    return sources + list(_plugins(entry_points(group=ENTRY_POINTS)))


def _plugins(points: Iterable[EntryPoint]) -> Iterable[EvidenceSource]:
    for point in points:
        try:
            factory: Callable[[], EvidenceSource] = point.load()
            source = factory()
            name = check_identifier(source.name, "source of evidence")
        except Exception as exc:  # noqa: BLE001 - supervision boundary: code of another distribution
            _log.warning("evidence.source_not_made", source=point.value, error=str(exc))
            continue
        if name in RESERVED:
            _log.warning("evidence.source_not_made", source=point.value, error=f"{name} is ours")
            continue
        yield source
