"""Compiles the access table into the files that other brokers read.

Mosquitto gets a password file and an access file with one section per identity; both are read
again on SIGHUP. nats-server gets users with permissions; MQTT topics become NATS subjects there
(``/`` is ``.``, ``+`` is ``*``, ``#`` is ``>``), after the mapping in its MQTT documentation.
"""

import json
from collections.abc import Mapping
from typing import Any, Final

from broker.access.credentials import Credential
from broker.access.policy import AccessPolicy

# Subjects that the MQTT side of nats-server 2.9 lets a client's own permissions decide: the
# delivery subjects of its QoS 1 subscriptions. Without it, QoS 1 subscriptions are refused.
_NATS_DELIVERY: Final = "$MQTT.sub.>"


def mosquitto_passwords(identities: Mapping[str, Credential]) -> str:
    """Write a Mosquitto ``password_file``: the enabled identities with their PBKDF2 verifiers."""
    return "".join(
        f"{identity}:{credential.mosquitto}\n"
        for identity, credential in sorted(identities.items())
        if not credential.disabled and credential.mosquitto
    )


def mosquitto_acl(identities: Mapping[str, Credential], policy: AccessPolicy) -> str:
    """Write a Mosquitto ``acl_file``: a section for each enabled identity, nothing for others.

    ``read`` covers subscribing and receiving there; Mosquitto answers a SUBSCRIBE outside it with
    success and then delivers nothing, unless the filter can be judged by itself.
    """
    lines: list[str] = []
    for identity, credential in sorted(identities.items()):
        if credential.disabled:
            continue
        held = policy.filters(credential.role, identity, apart=credential.apart)
        lines.append(f"user {identity}")
        lines.extend(f"topic write {allowed}" for allowed in held.publish)
        lines.extend(f"topic read {allowed}" for allowed in held.subscribe)
        lines.append("")
    return "\n".join(lines) + "\n"


def nats_subject(topic_filter: str) -> str:
    """Translate an MQTT filter of the mesh into a NATS subject.

    Only for levels of the mesh's own alphabet: the general mapping escapes dots and empty levels,
    which identifiers exclude.
    """
    return topic_filter.replace("/", ".").replace("+", "*").replace("#", ">")


def nats_users(
    identities: Mapping[str, Credential], policy: AccessPolicy, passwords: Mapping[str, str]
) -> str:
    """Write the ``users`` list of a nats-server configuration.

    Args:
        identities: The identities of the mesh.
        policy: The access table.
        passwords: Plain passwords by identity. Those without one are left out, since nats-server
            cannot check the verifiers of the store.

    Returns:
        A JSON list, which its configuration language includes.
    """
    users = [
        nats_user(identity, credential, policy, password=passwords[identity])
        for identity, credential in sorted(identities.items())
        if not credential.disabled and identity in passwords
    ]
    return json.dumps(users, indent=1)


def nats_user(
    identity: str, credential: Credential, policy: AccessPolicy, *, password: str
) -> dict[str, Any]:
    """Return one user of a nats-server configuration.

    Args:
        identity: Whose.
        credential: Its credential.
        policy: The access table.
        password: What stands for its password there.
    """
    held = policy.filters(credential.role, identity, apart=credential.apart)
    subscribe = [nats_subject(allowed) for allowed in held.subscribe]
    # "a.>" does not match "a" in NATS, but "a/#" does in MQTT, which subscribes both.
    parents = [subject[:-2] for subject in subscribe if subject.endswith(".>")]
    return {
        "user": identity,
        "password": password,
        "allowed_connection_types": ["MQTT", "MQTT_WS"],
        "permissions": {
            # An empty list of what is allowed forbids nothing there.
            "publish": (
                {"allow": [nats_subject(allowed) for allowed in held.publish]}
                if held.publish
                else {"deny": [">"]}
            ),
            "subscribe": {"allow": [*subscribe, *parents, _NATS_DELIVERY]},
        },
    }
