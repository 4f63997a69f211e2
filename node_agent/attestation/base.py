"""The seam of evidence: what a source is asked, and what it finds."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Findings:
    """What a source found.

    Attributes:
        measurements: ``sha256:`` and hex digests by what they are of; the name of the source is
            put in front.
        platform: Facts of the machine, short texts by identifiers.
        statement: What the source says in its own form, JSON; None: nothing.
    """

    measurements: Mapping[str, str] = field(default_factory=dict)
    platform: Mapping[str, str] = field(default_factory=dict)
    statement: Mapping[str, Any] | None = None


class EvidenceSource(Protocol):
    """Finds something out about this machine."""

    @property
    def name(self) -> str:
        """Its name, an identifier, the same at every start."""
        ...

    def collect(self, challenge: str | None) -> Findings:
        """Look now; blocks, and runs in a thread, one call of a source at a time.

        Args:
            challenge: Of the registry, hexadecimal; a source that can, proves that it looked after
                it was put.

        Raises:
            ConfigurationError: It cannot look here; said in the log, and left out.
            OSError: Likewise.
        """
        ...
