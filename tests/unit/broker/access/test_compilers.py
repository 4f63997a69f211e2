"""What other brokers are told follows from the one table."""

import base64
import hashlib
import json

import pytest

from broker.access.compilers import mosquitto_acl, mosquitto_passwords, nats_subject, nats_users
from broker.access.credentials import CredentialStore
from broker.access.policy import AccessPolicy, Role
from capability_schemas.topics import Topics

POLICY = AccessPolicy(Topics())


@pytest.fixture
def store(tmp_path):
    return CredentialStore(tmp_path / "credentials.json")


def test_the_mosquitto_verifier_is_its_own_format(store):
    password = store.add("pump-7", Role.DEVICE)
    name, _, verifier = mosquitto_passwords(store.identities()).strip().partition(":")
    _, scheme, iterations, salt, digest = verifier.split("$")
    assert (name, scheme) == ("pump-7", "7")
    derived = hashlib.pbkdf2_hmac(
        "sha512", password.encode(), base64.b64decode(salt), int(iterations)
    )
    assert base64.b64decode(digest) == derived


def test_the_acl_has_a_section_for_each_enabled_identity(store):
    store.add("pump-7", Role.DEVICE)
    store.add("pump-8", Role.DEVICE)
    store.update("pump-8", disabled=True)
    assert mosquitto_acl(store.identities(), POLICY).split("\n") == [
        "user pump-7",
        "topic write foam/v1/local/task/pump-7",
        "topic write foam/v1/local/task/pump-7/cancel",
        "topic write foam/v1/local/task/pump-7/resume",
        "topic write foam/v1/local/direct/+/pump-7",
        "topic write foam/v1/local/direct/+/pump-7/cancel",
        "topic write foam/v1/local/direct/+/pump-7/resume",
        "topic read foam/v1/local/reply/pump-7/#",
        "topic read foam/v1/local/catalog/+/+",
        "topic read foam/v1/local/node/+/state",
        "topic read foam/v1/local/node/+/load",
        "topic read foam/v1/local/router/+/state",
        "",
        "",
    ]
    assert "pump-8" not in mosquitto_passwords(store.identities())


@pytest.mark.parametrize(
    ("topic_filter", "subject"),
    [("a/b", "a.b"), ("a/+/c", "a.*.c"), ("a/#", "a.>"), ("foam/v1/x-1_Y", "foam.v1.x-1_Y")],
)
def test_filters_become_subjects(topic_filter, subject):
    assert nats_subject(topic_filter) == subject


def test_nats_users_are_those_whose_password_is_known(store):
    password = store.add("pump-7", Role.DEVICE)
    store.add("pump-8", Role.DEVICE)
    (user,) = json.loads(nats_users(store.identities(), POLICY, {"pump-7": password, "x": "y"}))
    assert (user["user"], user["password"]) == ("pump-7", password)
    assert user["permissions"]["publish"]["allow"][0] == "foam.v1.local.task.pump-7"
    allowed = user["permissions"]["subscribe"]["allow"]
    assert {"foam.v1.local.reply.pump-7.>", "foam.v1.local.reply.pump-7"} <= set(allowed)
