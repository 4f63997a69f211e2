"""What a node's evidence is worth, and what it may do because of it.

A node measures itself and publishes signed ``Evidence``; the operator writes down what it should
find (``attestation.toml``) and which rights need that: a zone, a grant, a class of data. While the
evidence is missing, too old or other than expected, exactly those rights are taken from the node's
catalogue records; it goes on serving what needs none of them. Without the file nothing is asked.

``policy`` reads the file, ``judgement`` and ``tpm`` are pure, ``service`` joins them to MQTT. What
such evidence proves and what not stands in ADR 23.
"""

from registry.attestation.policy import AttestationFile
from registry.attestation.service import AttestationService

__all__ = ["AttestationFile", "AttestationService"]
