"""Throws damaged frames at everything that reads what others send.

    PYTHONPATH=.:tests python -m security.fuzz_decoders --cases 1000000 --seed 7

Every case is a sound message that was bent: bits flipped, cut off, repeated, spliced with another
one, numbers and strings replaced by hostile ones. A reader may refuse with an error of the mesh;
anything else that is raised, and a signature or proof that passes over changed content, ends the
run with the seed that shows it again.
"""

import argparse
import base64
import json
import random
import sys
import time
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from broker.access.authority import make_key_and_request, read_request
from broker.embedded.stream import take_frames
from capability_schemas.admin import AdminRequest, CloudEvent, decode_admin_request
from capability_schemas.capability import CapabilityClaim, CatalogRecord
from capability_schemas.enrollment import (
    EnrollReply,
    EnrollRequest,
    JoinToken,
    check_proof,
    prove,
)
from capability_schemas.errors import FoamError
from capability_schemas.invocation import Control, Invocation, Report
from capability_schemas.node import NodeLoad, NodeState, RouterState
from capability_schemas.passport import Passport, PassportBook, issue
from capability_schemas.provenance import (
    ORDER_ROLES,
    AdminCheck,
    Provenance,
    Signer,
    check_result,
    result_claims,
    sign_result,
)
from capability_schemas.reply import Result, decode_reply
from capability_schemas.signing import SigningKey, canonical_bytes, digest, sign, verify
from capability_schemas.task import CancelRequest, ResumeRequest, decode_task
from capability_schemas.topics import Topics
from capability_schemas.trust import Evidence, Statement, TrustState, read_trust
from capability_schemas.wire import decode, encode, parse_json
from registry.admission import Admitted, Identity, judge
from registry.attestation.judgement import read_evidence
from registry.attestation.tpm import check_quote, read_quote
from registry.vectors import pack_vector, unpack_vector
from router.observation import ReplyReader
from support.tpm import SoftTpm

NOW: Final = 1_790_000_000_000
_KEY: Final = SigningKey.generate()
_TOKEN: Final = JoinToken.make()
_HOSTILE: Final = (
    b"null", b"true", b"-1", b"1e999", b"NaN", b"18446744073709551616", b'""', b"[]", b"{}",
    b'"\\ud800"', b'"\\u0000"', b"[" * 200, b'{"a":' * 150, b'"' + b"x" * 5000 + b'"', b"1.5", b"0",
    b'"2026-13-45"', b"-0.0", b'"../../etc"', b'"#"', b'"+"', b'"$SYS"',
)  # fmt: skip

Target = tuple[str, bytes, Callable[[bytes], None]]


def _claim() -> CapabilityClaim:
    return CapabilityClaim(
        node="edge-1",
        function="convert",
        version="1.2.0",
        epoch=NOW,
        revision=3,
        description="Convert units",
        examples=("how many feet are 3 m?",),
        skills=("units",),
        input_schema={"type": "object", "properties": {"value": {"type": "number"}}},
    )


def _decoder(model: Any) -> Callable[[bytes], None]:
    def run(payload: bytes) -> None:
        decode(model, payload)

    return run


def _same(payload: bytes, original: bytes) -> bool:
    """Whether two payloads say the same: white space and escapes may differ."""
    return canonical_bytes(parse_json(payload)) == canonical_bytes(parse_json(original))


def _signed(original: bytes, check: Callable[[bytes], None]) -> Callable[[bytes], None]:
    def run(payload: bytes) -> None:
        check(payload)
        if not _same(payload, original):
            raise AssertionError("a changed message passed its check")

    return run


def targets() -> list[Target]:
    """Return every reader with a sound message for it, and how it is called."""
    models = {
        CancelRequest: CancelRequest(task="t1"),
        ResumeRequest: ResumeRequest(task="t1", from_seq=3),
        NodeState: NodeState(node="n", state="birth", epoch=1, at=NOW),
        RouterState: RouterState(router="r", state="birth", epoch=1, at=NOW),
        NodeLoad: NodeLoad(node="n", epoch=1, at=NOW, functions={"f": {"running": 1}}),  # type: ignore[dict-item]
        Invocation: Invocation(
            task="t1", client="c", router="r", function="f", version="1.0.0", text="x",
            deadline=NOW, reply="foam/v1/local/reply/c/t1", sent_at=NOW,
        ),
        Report: Report(task="t1", client="c", attempt=1, node="n", status="admitted"),
        Control: Control(verb="cancel", task="t1", client="c", attempt=1),
        AdminRequest: AdminRequest(id="a1", verb="explain", args={"text": "x"}),
        CloudEvent: CloudEvent(
            id="1", source="/foam/x", type="io.foam.x.v1", time="2026-01-01T00:00:00Z"
        ),
        CapabilityClaim: _claim(),
        EnrollReply: EnrollReply(nonce="n", status="granted", at=NOW, id="edge-1"),
    }  # fmt: skip
    found: list[Target] = [
        (model.__name__, encode(message), _decoder(model)) for model, message in models.items()
    ]
    record = CatalogRecord(
        **_claim().model_dump(), registry="registry-1", admitted_at=NOW, claim_digest="sha256:0"
    )
    task = b'{"text":"convert 3 m","input":{"value":3},"timeout_ms":5000,"policy":{"zones":["a"]}}'
    chunk = b'{"v":1,"task":"t1","event":"chunk","at":1,"seq":0,"attempt":1,"data":"x"}'
    reader = ReplyReader(root="foam/v1/local", router_id="router-1", limit_bytes=1 << 20)
    topics = Topics(site="local")
    topic = b"foam/v1/local/reply/c/t1/edge-1"
    vector = pack_vector(np.eye(1, 8, dtype=np.float32)[0]).encode()
    token = _TOKEN.reveal().encode()
    found += [
        ("CatalogRecord", encode(record), _decoder(CatalogRecord)),
        ("Task", task, lambda payload: _ignore(decode_task(payload))),
        ("admin", encode(models[AdminRequest]), lambda p: _ignore(decode_admin_request(p))),
        ("ReplyEvent", chunk, lambda payload: _ignore(decode_reply(payload))),
        ("ReplyReader", chunk, lambda p: _ignore(reader.read(topic.decode(), p))),
        ("topic", topic, lambda p: _ignore(topics.parse(p.decode("utf-8", "replace")))),
        ("vector", vector, lambda p: _value_error(lambda: unpack_vector(p.decode("latin-1"), 8))),
        ("frames", b"\x30\x0a\x00\x01a1234567\xc0\x00", _frames),
        ("JoinToken", token, lambda p: _ignore(JoinToken.parse(p.decode("latin-1")))),
    ]  # fmt: skip
    return found + _proven()


def _proven() -> list[Target]:
    """Return the readers that have to notice every change of content."""
    claim = encode(sign(_claim(), _KEY))

    def admit(payload: bytes) -> None:
        verdict = judge(
            payload,
            key=("edge-1", "convert"),
            standing=None,
            identity=Identity(_KEY.public),
            now=NOW,
            limit_bytes=1 << 20,
        )
        if isinstance(verdict, Admitted) and not _same(payload, claim):
            raise AssertionError("a changed claim was admitted")

    passport = issue(
        Passport(
            identity="router-1", role="router", site="local", public_key=_KEY.public,
            issued_at=NOW, expires_at=NOW + 1000, registry="registry-1",
        ),
        _KEY,
    )  # fmt: skip

    def show(payload: bytes) -> None:
        book = PassportBook(site="local", registries={"registry-1": _KEY.public}, clock=lambda: NOW)
        found: Passport = decode(Passport, payload)
        book.admit(found)
        if canonical_bytes(found) != canonical_bytes(passport):
            raise AssertionError("a changed passport was believed")

    request = prove(
        EnrollRequest(nonce="n1", id="edge-1", role="node", site="local", at=NOW),
        _TOKEN.proof_key,
    )
    _, asked = make_key_and_request("edge-1")
    proven, signed = encode(request), encode(sign(request, _KEY))
    invocation, asked_for, answer = _signed_messages(passport)
    return [
        *_attested(),
        ("claim, signed", claim, admit),
        ("passport", encode(passport), show),
        ("proof", proven, _signed(proven, lambda p: check_proof(p, _TOKEN.proof_key))),
        ("signature", signed, _signed(signed, lambda p: verify(p, _KEY.public))),
        ("invocation, signed", encode(invocation), _signed(encode(invocation), _take_order)),
        ("admin request, signed", encode(asked_for), _signed(encode(asked_for), _take_request)),
        ("result, signed", encode(answer), _take_result(answer)),
        ("state with passport", encode(_state(passport)), _decoder(RouterState)),
        ("csr", asked.encode(), lambda p: _ignore(read_request(p.decode("latin-1"), "edge-1"))),
    ]


def _attested() -> list[Target]:
    """Return the readers of trust states and evidence, and of the quote of a TPM."""
    state = TrustState(
        member="edge-1", state="lapsed", at=NOW, challenge="ab" * 32, void_before=NOW,
        reason="its evidence ran out", registry="registry-1",
    )  # fmt: skip
    evidence = Evidence(
        node="edge-1", epoch=1, at=NOW, challenge="ab" * 32, platform={"system": "Linux"},
        measurements={"code/foam": "sha256:" + "a" * 64},
        statements=(Statement(source="tpm2", data={"quoted": "AAAA", "signature": "AAAA"}),),
    )  # fmt: skip
    said, shown = encode(sign(state, _KEY)), encode(sign(evidence, _KEY))
    tpm = SoftTpm("ec")
    quoted = tpm.attest("ab" * 32)

    def hear(payload: bytes) -> None:
        read_trust(payload, member="edge-1", registries={"registry-1": _KEY.public})

    def take(payload: bytes) -> None:
        read_evidence(payload, node="edge-1", key=_KEY.public, now=NOW)

    def check(payload: bytes) -> None:
        data = tpm.quote("ab" * 32) | {"signature": base64.b64encode(payload).decode()}
        check_quote(data, key=tpm.public, challenge="ab" * 32)

    return [
        ("trust state", said, _signed(said, hear)),
        ("evidence", shown, _signed(shown, take)),
        ("quote", quoted, lambda payload: _ignore(read_quote(payload))),
        ("signature of a quote", tpm.signature(quoted), check),
    ]


def _book() -> PassportBook:
    return PassportBook(site="local", registries={"registry-1": _KEY.public}, clock=lambda: NOW)


def _state(passport: Passport) -> RouterState:
    return RouterState(router="router-1", state="birth", epoch=1, at=NOW, passport=passport)


def _passport(identity: str, role: str) -> Passport:
    made = Passport(
        identity=identity, role=role, site="local", public_key=_KEY.public,
        issued_at=NOW, expires_at=NOW + 1000, registry="registry-1",
    )  # fmt: skip
    return issue(made, _KEY)


def _signed_messages(passport: Passport) -> tuple[Invocation, AdminRequest, Result]:
    router = Signer(identity="router-1", key=_KEY, passport=passport)
    invocation = Invocation(
        task="t1", client="c", router="router-1", node="edge-1", epoch=1, function="f",
        version="1.0.0", text="x", input={"a": [1.5, None]}, deadline=NOW,
        reply="foam/v1/local/reply/c/t1", sent_at=NOW,
    )  # fmt: skip
    admin = Signer(identity="admin-1", key=_KEY, passport=_passport("admin-1", "admin"))
    request = AdminRequest(
        id="a1", verb="drain", args={"node": "edge-1"}, sender="admin-1", target="router-1",
        sent_at=NOW, passport=admin.passport,
    )  # fmt: skip
    node = Signer(identity="edge-1", key=_KEY, passport=_passport("edge-1", "node"))
    result = Result(
        task="t1", at=NOW, seq=1, output={"a": 1}, node="edge-1", function="f", version="1.0.0",
        digest=digest({"a": 1}),
    )  # fmt: skip
    return (
        router.sign(invocation),
        admin.sign(request),
        sign_result(result, client="c", signer=node, show_passport=True),
    )


def _take_order(payload: bytes) -> None:
    book = _book()
    book.admit(_passport("router-1", "router"))
    order: Invocation = decode(Invocation, payload)
    Provenance(own="edge-1", book=book, clock=lambda: NOW).check(
        payload,
        sender=order.router,
        roles=ORDER_ROLES,
        target=order.node,
        sent_at=order.sent_at,
        nonce=order.task,
    )


def _take_request(payload: bytes) -> None:
    provenance = Provenance(own="router-1", book=_book(), clock=lambda: NOW)
    check = AdminCheck(target="router-1", provenance=provenance, unsigned=False)
    check.verify("admin-1", payload, decode_admin_request(payload))


def _take_result(original: Result) -> Callable[[bytes], None]:
    def run(payload: bytes) -> None:
        found = decode_reply(payload)
        if not isinstance(found, Result):
            return
        check_result(found, client="c", book=_book())
        if result_claims(found, client="c") != result_claims(original, client="c"):
            raise AssertionError("a result of something else passed its check")
        if digest(found.output) != original.digest:
            raise AssertionError("another output passed as the one that was signed")

    return run


def _ignore(_value: object) -> None:
    """What a reader returns is not of interest here."""


def _value_error(call: Callable[[], object]) -> None:
    try:
        call()
    except ValueError:
        return


def _frames(payload: bytes) -> None:
    buffer = bytearray(payload)
    for _first, _body in take_frames(buffer, 1 << 16):
        pass


def bend(payload: bytes, other: bytes, dice: random.Random) -> bytes:
    """Return a payload damaged in one to four ways."""
    bent = bytearray(payload)
    for _ in range(dice.choice((1, 1, 1, 2, 4))):
        at = dice.randrange(len(bent) + 1)
        match dice.randrange(7):
            case 0 if bent:
                bent[at % len(bent)] ^= 1 << dice.randrange(8)
            case 1:
                del bent[at:]
            case 2:
                end = min(len(bent), at + dice.randrange(1, 40))
                bent[at:at] = bent[at:end] * dice.randrange(1, 4)
            case 3:
                bent[at:] = other[dice.randrange(len(other) + 1) :]
            case 4:
                bent[at:at] = bytes(dice.randrange(256) for _ in range(dice.randrange(1, 8)))
            case 5:
                _replace_value(bent, dice)
            case _:
                del bent[at : at + dice.randrange(1, 20)]
    return bytes(bent)


def _replace_value(bent: bytearray, dice: random.Random) -> None:
    """Put something hostile in the place of a value."""
    colon = bent.find(b":", dice.randrange(len(bent) + 1))
    if colon < 0:
        return
    ends = [end for end in (bent.find(b",", colon), bent.find(b"}", colon)) if end > 0]
    bent[colon + 1 : min(ends, default=len(bent))] = dice.choice(_HOSTILE)


def fuzz(*, seed: int, cases: int) -> dict[str, tuple[int, int]]:
    """Run cases over all readers in turn.

    Args:
        seed: Makes the run repeatable (but for keys, which are new each time).
        cases: How many in all.

    Returns:
        For each reader, how many cases it took and how many it refused.

    Raises:
        AssertionError: A reader raised something else, or let a change pass.
    """
    everything = targets()
    counts = {name: (0, 0) for name, _, _ in everything}
    for number in range(cases):
        name, payload, read = everything[number % len(everything)]
        dice = random.Random(f"{seed}/{number}")
        bent = bend(payload, dice.choice(everything)[1], dice)
        taken, refused = counts[name]
        try:
            read(bent)
        except FoamError:
            refused += 1
        except Exception as error:
            raise AssertionError(
                f"{name} raised {error!r} for case {number} of seed {seed}: {bent[:400]!r}"
            ) from error
        counts[name] = (taken + 1, refused)
    return counts


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args()
    started = time.perf_counter()
    counts = fuzz(seed=options.seed, cases=options.cases)
    took_s = time.perf_counter() - started
    print(
        json.dumps({name: {"cases": c, "refused": r} for name, (c, r) in counts.items()}, indent=1)
    )
    print(f"{options.cases} cases in {took_s:.0f} s: nothing crashed, nothing passed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
