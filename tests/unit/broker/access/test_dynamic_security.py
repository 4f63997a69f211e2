"""What Mosquitto's plugin is told follows from the one table, and so does what is taken away."""

import base64
import hashlib
import json

import pytest

from broker.access.credentials import CredentialStore, Pbkdf2
from broker.access.dynamic_security import (
    CONTROL_USER,
    DynamicAccess,
    DynamicClient,
    read_client,
)
from broker.access.policy import AccessPolicy, Role
from capability_schemas.topics import Topics

POLICY = AccessPolicy(Topics())


@pytest.fixture
def store(tmp_path):
    made = CredentialStore(tmp_path / "credentials.json")
    made.add("pump-7", Role.DEVICE)
    made.add("edge-1", Role.NODE)
    return made


def access(store):
    return DynamicAccess.of(store.identities(), POLICY)


def holding(access):
    """What a broker lists that was told exactly this."""
    return dict(access.clients), list(access.rights)


def test_the_document_holds_each_enabled_identity_and_denies_the_rest(store):
    store.add("pump-8", Role.DEVICE)
    store.update("pump-8", disabled=True)
    document = json.loads(access(store).document(Pbkdf2.of("secret")))
    assert not any(
        document["defaultACLAccess"][kind]
        for kind in ("publishClientSend", "publishClientReceive", "subscribe")
    )
    clients = {client["username"]: client for client in document["clients"]}
    assert set(clients) == {CONTROL_USER, "pump-7", "edge-1"}
    roles = {role["rolename"]: role["acls"] for role in document["roles"]}
    (role,) = clients["pump-7"]["roles"]
    rules = [(rule["acltype"], rule["topic"]) for rule in roles[role["rolename"]]]
    assert rules == [
        ("publishClientSend", "foam/v1/local/task/pump-7"),
        ("publishClientSend", "foam/v1/local/task/pump-7/cancel"),
        ("publishClientSend", "foam/v1/local/task/pump-7/resume"),
        ("publishClientSend", "foam/v1/local/direct/+/pump-7"),
        ("publishClientSend", "foam/v1/local/direct/+/pump-7/cancel"),
        ("publishClientSend", "foam/v1/local/direct/+/pump-7/resume"),
        *(
            (kind, f"foam/v1/local/{topic}")
            for topic in (
                "reply/pump-7/#",
                "catalog/+/+",
                "node/+/state",
                "node/+/load",
                "router/+/state",
            )
            for kind in ("subscribePattern", "publishClientReceive")
        ),
    ]
    assert all(rule["allow"] for rules in roles.values() for rule in rules)


def test_passwords_stay_in_the_password_file(store):
    document = json.loads(access(store).document(Pbkdf2.of("secret")))
    control, *others = document["clients"]
    assert not any("password" in client for client in others)
    derived = hashlib.pbkdf2_hmac(
        "sha512", b"secret", base64.b64decode(control["salt"]), control["iterations"]
    )
    assert base64.b64decode(control["password"]) == derived


def test_one_client_id_for_nodes_and_any_for_devices(store):
    clients = access(store).clients
    assert (clients["edge-1"].client_id, clients["pump-7"].client_id) == ("edge-1", None)


def test_nothing_changes_where_the_broker_holds_the_table(store):
    assert access(store).changes(*holding(access(store))) == []


def test_only_what_differs_is_said_and_removal_comes_first(store):
    clients, roles = holding(access(store))
    store.remove("edge-1")
    store.add("pump-9", Role.DEVICE)
    commands = [
        (one["command"], one.get("username") or one["rolename"].partition(".")[0])
        for one in access(store).changes(clients, roles)
    ]
    assert commands == [
        ("deleteClient", "edge-1"),
        ("createRole", "pump-9"),
        ("createClient", "pump-9"),
        ("deleteRole", "edge-1"),
    ]


def test_a_successor_of_the_same_name_does_not_inherit_connections(tmp_path):
    now = iter(range(1000, 2000))
    store = CredentialStore(tmp_path / "credentials.json", clock=lambda: next(now))
    store.add("pump-7", Role.DEVICE)
    clients, roles = holding(access(store))
    store.remove("pump-7")
    store.add("pump-7", Role.DEVICE)
    commands = [one["command"] for one in access(store).changes(clients, roles)]
    assert commands == ["deleteClient", "createRole", "createClient", "deleteRole"]


@pytest.mark.parametrize(
    "found",
    [
        None,
        DynamicClient("admin"),
        DynamicClient("edge-1.0000000000000000", "edge-1"),
    ],
)
def test_what_others_changed_in_the_broker_is_undone(store, found):
    clients, roles = holding(access(store))
    clients |= {"edge-1": found, "intruder": DynamicClient("admin"), CONTROL_USER: None}
    commands = access(store).changes(clients, [*roles, "admin", CONTROL_USER])
    assert [(one["command"], one.get("username", one.get("rolename"))) for one in commands] == [
        ("deleteClient", "edge-1"),
        ("deleteClient", "intruder"),
        ("createClient", "edge-1"),
        ("deleteRole", "admin"),
    ]


@pytest.mark.parametrize(
    ("listed", "client"),
    [
        ({"roles": [{"rolename": "a"}], "groups": []}, DynamicClient("a")),
        ({"roles": [{"rolename": "a"}], "clientid": "c"}, DynamicClient("a", "c")),
        ({"roles": [{"rolename": "a"}], "disabled": True}, None),
        ({"roles": [{"rolename": "a"}], "groups": [{"groupname": "g"}]}, None),
        ({"roles": [{"rolename": "a"}, {"rolename": "b"}]}, None),
        ({}, None),
    ],
)
def test_what_the_broker_lists_is_read(listed, client):
    assert read_client({"username": "x", **listed}) == client
