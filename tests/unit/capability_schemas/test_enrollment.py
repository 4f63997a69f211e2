"""Join tokens, proofs and seals: what a newcomer and the registry can show each other."""

import base64
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capability_schemas.enrollment import (
    EnrollReply,
    EnrollRequest,
    JoinToken,
    SealKey,
    check_proof,
    prove,
    seal,
)
from capability_schemas.errors import BadSignature, ConfigurationError, ProtocolError
from capability_schemas.signing import SigningKey, sign, verify
from capability_schemas.wire import decode, encode

TOKEN = JoinToken.make(authority=b"\x30\x82" + bytes(300))


def request(**changes):
    fields: dict[str, Any] = {
        "nonce": "n-1",
        "id": "edge-1",
        "role": "node",
        "site": "hall-3",
        "at": 1_790_000_000_000,
        "facts": {"host": "edge-1.local"},
    }
    return EnrollRequest(**fields | changes)


def test_a_token_is_one_word_that_reads_back():
    text = TOKEN.reveal()
    assert len(text.split()) == 1
    again = JoinToken.parse(f"  {text[:40]}\n{text[40:]} ")  # as terminals break it
    assert again == TOKEN
    assert again.password == TOKEN.password
    assert again.proof_key == TOKEN.proof_key


def test_a_token_shows_its_secret_to_nobody_who_does_not_ask():
    secret = TOKEN.secret.get_secret_value()
    assert secret not in repr(TOKEN)
    assert secret not in str(TOKEN)
    assert secret in TOKEN.reveal()


def test_login_and_proof_do_not_tell_of_each_other():
    password = TOKEN.password.get_secret_value()
    assert base64.urlsafe_b64decode(password + "=") != TOKEN.proof_key
    assert password != TOKEN.secret.get_secret_value()
    assert JoinToken.make().proof_key != TOKEN.proof_key


@pytest.mark.parametrize(
    "text",
    [
        "",
        "foam1",
        "foam1.join-1",
        "foam2" + TOKEN.reveal()[5:],
        TOKEN.reveal()[:40],
        TOKEN.reveal().replace(TOKEN.id, "join/1"),
        f"foam1.{TOKEN.id}.###",
        TOKEN.reveal() + ".x.y",
    ],
    ids=lambda text: f"{len(text)}-characters",  # a token in a name would differ by process
)
def test_what_is_no_token_is_named_without_being_repeated(text):
    with pytest.raises(ConfigurationError) as caught:
        JoinToken.parse(text)
    assert "foam token create" in caught.value.message
    assert len(text) < 8 or text not in caught.value.message


def test_a_proof_covers_every_field():
    proven = prove(request(), TOKEN.proof_key)
    payload = encode(proven)
    check_proof(payload, TOKEN.proof_key)
    with pytest.raises(BadSignature):
        check_proof(payload, JoinToken.make().proof_key)
    changes: list[dict[str, Any]] = [
        {"id": "edge-2"},
        {"role": "router"},
        {"at": 1},
        {"facts": {}},
        {"proof": None},
    ]
    for change in changes:
        with pytest.raises(BadSignature):
            check_proof(proven.model_copy(update=change), TOKEN.proof_key)


def test_the_proof_and_the_signature_stand_side_by_side():
    key = SigningKey.generate()
    signed = sign(prove(request(public_key=key.public), TOKEN.proof_key), key)
    payload = encode(signed)
    check_proof(payload, TOKEN.proof_key)
    verify(payload, key.public)
    assert decode(EnrollRequest, payload) == signed


def test_fields_of_a_newer_version_are_covered_too():
    payload = encode(prove(request(), TOKEN.proof_key))
    with pytest.raises(BadSignature):
        check_proof(payload[:-1] + b',"extra":1}', TOKEN.proof_key)


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_no_altered_byte_passes(at, mask):
    payload = bytearray(encode(prove(request(), TOKEN.proof_key)))
    payload[at % len(payload)] ^= mask
    try:
        check_proof(bytes(payload), TOKEN.proof_key)
    except ProtocolError:
        return
    # What still passes has to say the very same: white space, or an escape of the same letter.
    assert decode(EnrollRequest, bytes(payload)) == prove(request(), TOKEN.proof_key)


def test_only_the_newcomer_opens_the_seal():
    key, other = SealKey(), SealKey()
    sealed = seal({"password": "s3cret"}, key.public, nonce="n-1")
    assert key.open(sealed, nonce="n-1") == {"password": "s3cret"}
    assert "s3cret" not in sealed
    for opener, nonce, text in (
        (other, "n-1", sealed),
        (key, "n-2", sealed),
        (key, "n-1", sealed[:-8] + "AAAAAAA="),
        (key, "n-1", "???"),
        (key, "n-1", ""),
    ):
        with pytest.raises(BadSignature):
            opener.open(text, nonce=nonce)


@pytest.mark.parametrize("key", ["", "AAAA", "x" * 44])
def test_a_bad_seal_key_is_named(key):
    with pytest.raises(ProtocolError, match="seal_key"):
        seal({}, key, nonce="n-1")


def test_a_reply_is_proven_like_a_request():
    reply = prove(EnrollReply(nonce="n-1", status="granted", at=1, id="edge-1"), TOKEN.proof_key)
    check_proof(encode(reply), TOKEN.proof_key)
    with pytest.raises(BadSignature):
        check_proof(encode(reply.model_copy(update={"status": "refused"})), TOKEN.proof_key)
