"""The access table for brokers that run elsewhere: the same rights, and nobody left open."""

import csv
import hashlib
import io
import json
import re
import subprocess

import pytest

from broker.access.credentials import PBKDF2_ITERATIONS, CredentialStore, Pbkdf2
from broker.access.export import EXPORTERS, for_emqx, for_mosquitto, for_nats
from broker.access.policy import AccessPolicy, Role
from broker.engine import find_binary
from capability_schemas.capability import CapabilityPolicy
from capability_schemas.topics import Topics

POLICY = AccessPolicy(Topics())


@pytest.fixture
def store(tmp_path):
    return CredentialStore(tmp_path / "credentials.json")


def users(export):
    return {row["user_id"]: row for row in csv.DictReader(io.StringIO(export.files["users.csv"]))}


def test_emqx_can_check_the_passwords_with_what_its_configuration_says(store):
    password = store.add("pump-7", Role.DEVICE)
    made = for_emqx(store.identities(), POLICY)
    row = users(made)["pump-7"]
    derived = hashlib.pbkdf2_hmac("sha512", password.encode(), row["salt"].encode(), 101, 64)
    assert (row["password_hash"], row["is_superuser"]) == (derived.hex(), "false")
    assert f"iterations = {PBKDF2_ITERATIONS}\n" in made.files["emqx.conf"]
    assert "no_match = deny" in made.files["emqx.conf"]
    assert made.notes == ()


def test_emqx_rules_are_those_of_the_table(store):
    """Every rule, with a name in the place of the placeholder, is what the table grants it."""
    for role in Role:
        store.add(f"one-{role}", role)
        store.add(f"two-{role}", role, attested=CapabilityPolicy(tenant="acme"))
    *rules, last = [
        line
        for line in for_emqx(store.identities(), POLICY).files["acl.conf"].splitlines()
        if not line.startswith("%%")
    ]
    assert last == "{deny, all}."
    found = {}
    for rule in rules:
        read = re.fullmatch(r'\{allow, \{username, \{re, "(.*)"\}\}, (\w+), \[(.*)\]\}\.', rule)
        assert read is not None, rule
        who, action, topics = read.groups()
        for name in store.identities():
            if re.search(who, name):
                found[name, action] = re.findall(r'"(.*?)"', topics.replace("${username}", name))
    wanted: dict[tuple[str, str], list[str]] = {}
    for name, credential in store.identities().items():
        held = POLICY.filters(credential.role, name, apart=credential.apart)
        wanted |= {(name, "publish"): list(held.publish), (name, "subscribe"): [*held.subscribe]}
    assert found == {key: filters for key, filters in wanted.items() if filters}


def test_a_name_within_a_name_is_nobody(store):
    store.add("pump", Role.DEVICE)
    rules = for_emqx(store.identities(), POLICY).files["acl.conf"]
    found = re.search(r'\{re, "(.*?)"\}', rules)
    assert found is not None
    assert not any(re.search(found[1], name) for name in ("pump-7", "my-pump", "PUMP"))


def test_a_verifier_with_a_binary_salt_is_named_not_written(store, monkeypatch):
    store.add("pump-7", Role.DEVICE)
    old = Pbkdf2(PBKDF2_ITERATIONS, b"\xff" * 12, bytes(64))
    credential = store.identities()["pump-7"].model_copy(update={"mosquitto": str(old)})
    made = for_emqx({"pump-7": credential}, POLICY)
    assert users(made) == {}
    assert any("pump-7" in note for note in made.notes)


def test_disabled_members_are_nowhere_and_passwords_neither(store):
    secrets = [store.add("pump-7", Role.DEVICE), store.add("pump-8", Role.DEVICE)]
    store.update("pump-8", disabled=True)
    for export in EXPORTERS.values():
        text = "".join(export(store.identities(), POLICY).files.values())
        assert "pump-7" in text
        assert "pump-8" not in text
        assert not any(secret in text for secret in secrets)


@pytest.mark.parametrize("export", EXPORTERS.values(), ids=EXPORTERS)
def test_who_has_only_a_certificate_is_named(store, export):
    store.add("edge-1", Role.NODE, serial="ab12")
    assert "edge-1" in " ".join(export(store.identities(), POLICY).notes)


def test_mosquitto_gets_the_files_its_configuration_names(store):
    store.add("pump-7", Role.DEVICE)
    files = for_mosquitto(store.identities(), POLICY).files
    for name in ("foam.passwords", "foam.acl"):
        assert f"/etc/mosquitto/{name}" in files["mosquitto.conf"]
        assert "pump-7" in files[name]


def test_nats_users_wait_for_their_passwords(store):
    for name in ("pump-7", "pump_7"):
        store.add(name, Role.DEVICE)
    made = for_nats(store.identities(), POLICY)
    variables = re.findall(r'"password": \$(\w+),', made.files["nats-users.conf"])
    assert variables == ["FOAM_PASSWORD_PUMP_7", "FOAM_PASSWORD_PUMP_7_"]
    assert all(name in made.notes[0] for name in ("bcrypt", *variables))


@pytest.mark.skipif(find_binary("nats-server") is None, reason="there is no nats-server here")
def test_nats_server_takes_it_once_the_passwords_are_set_and_not_before(store, tmp_path):
    store.add("pump-7", Role.DEVICE)
    store.add("watcher", Role.OBSERVER)
    for name, text in for_nats(store.identities(), POLICY).files.items():
        (tmp_path / name).write_text(text)
    config = tmp_path / "server.conf"
    config.write_text(
        f"server_name: x\njetstream {{ store_dir: {json.dumps(str(tmp_path))} }}\n"
        'mqtt { listen: "127.0.0.1:0" }\ninclude ./nats.conf\n'
    )
    bcrypt = "$2a$11$PWIFAL8RsWyGI3jVZtO9Nu8.6jOxzxfZo7c/W0eLk017hjgUKWrhy"
    given = {"FOAM_PASSWORD_PUMP_7": bcrypt, "FOAM_PASSWORD_WATCHER": bcrypt}
    for environment, code in (({}, 1), (given, 0)):
        done = subprocess.run(
            [str(find_binary("nats-server")), "-t", "-c", str(config)],
            env=environment,
            capture_output=True,
            timeout=30,
            check=False,
        )
        assert done.returncode == code, done.stderr
