"""What a node shows of itself, so that others may decide how far to trust it.

``Attester`` collects measurements from its sources, signs them with the node's key and publishes
them as ``Evidence``: when it starts, when functions or models change, and whenever the registry
puts another challenge. A source is anything with ``name`` and ``collect`` (``EvidenceSource``); the
built-in ones measure the code of the agent, the functions and models it offers, and ask a TPM for
a quote; another distribution adds one under the entry point ``foam.evidence``::

    [project.entry-points."foam.evidence"]
    scanner = "my_package:Scanner"          # called without arguments; makes an EvidenceSource
"""

from node_agent.attestation.base import EvidenceSource, Findings
from node_agent.attestation.catalogue import evidence_sources
from node_agent.attestation.service import Attester, Offer
from node_agent.attestation.tpm import TpmSource

__all__ = ["Attester", "EvidenceSource", "Findings", "Offer", "TpmSource", "evidence_sources"]
