"""Whether evidence is sound, whether it is what was asked for, and which rights go. Pure."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final

from capability_schemas.capability import CapabilityPolicy
from capability_schemas.errors import AccessDenied, FoamError, MalformedPayload
from capability_schemas.passport import CLOCK_SKEW_MS
from capability_schemas.signing import SigningKey, verify
from capability_schemas.trust import EVIDENCE_LIMIT_BYTES, Evidence
from capability_schemas.wire import decode
from registry.attestation.policy import ANY, NO_GATES, AttestationPolicy, Gates, Reference, Rule
from registry.attestation.tpm import check_quote

TPM_SOURCE: Final = "tpm2"
_SHOWN: Final = 3
_DIGEST_SHOWN: Final = len("sha256:") + 12


def challenge_of(key: SigningKey, *, site: str, node: str, window: int, window_ms: int) -> str:
    """Return what a node is asked in a window of time, 64 hexadecimal digits.

    It is a function of the registry's key, so that it needs no memory and nobody else can tell it
    beforehand: an Ed25519 signature is deterministic (RFC 8032 section 5.1.6), and these bytes are
    no JSON, so that it is the signature of no message.

    Args:
        key: Key of the registry.
        site: The site.
        node: Whom it is for.
        window: Number of the window.
        window_ms: How long windows are.
    """
    asked = f"foam challenge\n{site}\n{node}\n{window_ms}\n{window}"
    return hashlib.sha256(key.sign_bytes(asked.encode()).encode()).hexdigest()


def read_evidence(payload: bytes, *, node: str, key: str, now: int) -> Evidence:
    """Decode and check a piece of evidence as received.

    Args:
        payload: As received, not empty.
        node: The level of its topic.
        key: The node's public key.
        now: UTC milliseconds.

    Raises:
        TooLarge: It is longer than ``EVIDENCE_LIMIT_BYTES``.
        MalformedPayload: It is none, has too many measurements, or is of another node.
        BadSignature: The node did not sign it.
        AccessDenied: It is from the future: clocks are apart.
    """
    evidence: Evidence = decode(Evidence, payload, limit_bytes=EVIDENCE_LIMIT_BYTES)
    if evidence.node != node:
        raise MalformedPayload(
            f"node: the evidence is of {evidence.node}, its topic of {node}", field="node"
        )
    verify(payload, key)
    ahead_ms = evidence.at - now
    if ahead_ms > CLOCK_SKEW_MS:
        raise AccessDenied(
            f"the evidence was made {ahead_ms // 1000} s from now: set the clock of {node}"
        )
    return evidence


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a node's evidence comes to.

    Attributes:
        asked: Whether anything was asked of it.
        problems: What is wrong, one sentence for each rule that is not kept; empty: nothing.
        withheld: Rights that are taken from it for that.
    """

    asked: bool
    problems: tuple[str, ...] = ()
    withheld: Gates = NO_GATES


def judge_evidence(
    policy: AttestationPolicy,
    *,
    node: str,
    attested: CapabilityPolicy,
    evidence: Evidence | None,
    missing: str,
) -> Judgement:
    """Hold what a node has shown against what is asked of it.

    Args:
        policy: What is asked.
        node: The node.
        attested: What the operator vouches for.
        evidence: Its evidence that counts at the moment; None when it has none.
        missing: Why there is none, for people.
    """
    rules = policy.rules_of(node, attested)
    problems, withheld = [], NO_GATES
    for rule in rules:
        problem = missing if evidence is None else _problem(policy, rule, node, evidence)
        if problem is not None:
            problems.append(problem)
            withheld |= rule.gates
    return Judgement(bool(rules), tuple(dict.fromkeys(problems)), withheld)


def misfits(reference: Reference, measurements: Mapping[str, str]) -> list[str]:
    """Say what of the measurements a reference does not accept; empty when all fits."""
    found = []
    for what, digest in sorted(measurements.items()):
        accepted = _accepted(reference, what)
        if accepted is None:
            found.append(f"{what} is not named there")
        elif accepted != ANY and digest not in accepted:
            found.append(f"{what} is {digest[:_DIGEST_SHOWN]}…")
    found += [
        f"{what} was not measured"
        for what in sorted(reference)
        if "*" not in what and what not in measurements
    ]
    return found


def _accepted(reference: Reference, what: str) -> str | Sequence[str] | None:
    if what in reference:
        return reference[what]
    fitting = [pattern for pattern in reference if fnmatchcase(what, pattern)]
    return reference[max(fitting, key=len)] if fitting else None


def _problem(policy: AttestationPolicy, rule: Rule, node: str, evidence: Evidence) -> str | None:
    """Say why a rule is not kept; None when it is."""
    closest: list[str] | None = None
    for name in rule.references:
        found = misfits(policy.references[name], evidence.measurements)
        if not found:
            closest = None
            break
        said = [f"reference {name}: {one}" for one in found]
        closest = said if closest is None or len(said) < len(closest) else closest
    if closest is not None:
        more = f" and {len(closest) - _SHOWN} more" if len(closest) > _SHOWN else ""
        return "; ".join(closest[:_SHOWN]) + more
    return _platform_problem(policy, rule, node, evidence) if rule.pcrs else None


def _platform_problem(
    policy: AttestationPolicy, rule: Rule, node: str, evidence: Evidence
) -> str | None:
    key = policy.tpm2.get(node)
    if key is None:
        return f"no key of its TPM is on record: add it to [tpm2] as {node}"
    said = [one for one in evidence.statements if one.source == TPM_SOURCE]
    if not said or evidence.challenge is None:
        return "it shows no quote of a TPM"
    try:
        quote = check_quote(said[0].data, key=key, challenge=evidence.challenge)
    except FoamError as error:
        return f"its TPM: {error.message}"
    if quote.registers != rule.registers:
        return f"its TPM quotes the registers {quote.registers}, {rule.registers} are asked for"
    if quote.digest not in rule.pcrs:
        return f"its TPM's registers come to {quote.digest}, which no rule accepts"
    return None
