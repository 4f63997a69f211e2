"""The access table as Mosquitto's dynamic security plugin holds it: clients and their roles.

The plugin (2.0) has no placeholder for the name of a client, so each identity has a role of its
own. The role's name carries a digest of everything that counts for the identity: who compares names
compares rights, and an identity that was replaced by another one of the same name is noticed too.

Passwords are not kept here. A client without one is handed on to the password file
(``compilers.mosquitto_passwords``), whose verifiers can be written without knowing the password;
the commands of the plugin want it in clear.

Everything is denied by default, delivery included: what was subscribed to before a right was lost
is not delivered either.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from broker.access.credentials import Credential, Pbkdf2
from broker.access.policy import AccessPolicy, Filters

CONTROL_TOPIC: Final = "$CONTROL/dynamic-security/v1"
CONTROL_USER: Final = "$foam"
"""Login of the only client that may give commands; ``$`` keeps it apart from every identity."""

_DEFAULTS: Final = {
    "publishClientSend": False,
    "publishClientReceive": False,
    "subscribe": False,
    "unsubscribe": True,
}


@dataclass(frozen=True, slots=True)
class DynamicClient:
    """One client of the plugin.

    Attributes:
        role: Name of its role.
        client_id: The only MQTT client id it may come with; None: any. Checked with passwords, not
            on a listener that takes identities from certificates.
    """

    role: str
    client_id: str | None = None


@dataclass(frozen=True, slots=True)
class DynamicAccess:
    """All clients and roles of a site.

    Attributes:
        clients: By identity.
        rights: What each role may, by its name.
    """

    clients: Mapping[str, DynamicClient]
    rights: Mapping[str, Filters]

    @classmethod
    def of(cls, identities: Mapping[str, Credential], policy: AccessPolicy) -> "DynamicAccess":
        """Compile the table for the identities that are enabled."""
        clients: dict[str, DynamicClient] = {}
        rights: dict[str, Filters] = {}
        for identity, credential in sorted(identities.items()):
            if credential.disabled:
                continue
            held = policy.filters(credential.role, identity, apart=credential.apart)
            facts = json.dumps([credential.created_at, held.publish, held.subscribe])
            role = f"{identity}.{hashlib.sha256(facts.encode()).hexdigest()[:16]}"
            bound = identity if credential.role.binds_client_id else None
            clients[identity] = DynamicClient(role, bound)
            rights[role] = held
        return cls(clients, rights)

    def document(self, control: Pbkdf2) -> str:
        """Write the plugin's configuration file.

        Args:
            control: Verifier of the password of ``CONTROL_USER``.
        """
        return json.dumps(
            {
                "defaultACLAccess": _DEFAULTS,
                "clients": [
                    {
                        "username": CONTROL_USER,
                        **_verifier(control),
                        "roles": [{"rolename": CONTROL_USER}],
                    },
                    *(_client(name, client) for name, client in self.clients.items()),
                ],
                "groups": [],
                "roles": [
                    _role(CONTROL_USER, Filters((CONTROL_TOPIC,), (f"{CONTROL_TOPIC}/#",))),
                    *(_role(name, held) for name, held in self.rights.items()),
                ],
            },
            indent=1,
        )

    def changes(
        self, clients: Mapping[str, DynamicClient | None], roles: Iterable[str]
    ) -> list[dict[str, Any]]:
        """Return the commands that make the broker hold exactly this.

        Removal comes first, and cuts the connections of the client; one whose rights changed is
        removed and made anew, so that no subscription of before outlives them.

        Args:
            clients: What the broker holds, by name; None where it is nothing of ours.
            roles: Names of the roles it holds.
        """
        wrong = {
            name
            for name, client in clients.items()
            if name != CONTROL_USER and client != self.clients.get(name)
        }
        there = set(roles)
        return [
            *({"command": "deleteClient", "username": name} for name in sorted(wrong)),
            *(
                {"command": "createRole", **_role(name, held)}
                for name, held in self.rights.items()
                if name not in there
            ),
            *(
                {"command": "createClient", **_client(name, client)}
                for name, client in self.clients.items()
                if name not in clients or name in wrong
            ),
            *(
                {"command": "deleteRole", "rolename": name}
                for name in sorted(there - {*self.rights, CONTROL_USER})
            ),
        ]


def read_client(listed: Mapping[str, Any]) -> DynamicClient | None:
    """Read one client as ``listClients`` describes it; None when it is nothing that we make."""
    roles = [role.get("rolename") for role in listed.get("roles", ())]
    if len(roles) != 1 or listed.get("groups") or listed.get("disabled"):
        return None
    return DynamicClient(str(roles[0]), listed.get("clientid"))


def _verifier(control: Pbkdf2) -> dict[str, Any]:
    _, _, iterations, salt, digest = str(control).split("$")
    return {"password": digest, "salt": salt, "iterations": int(iterations)}


def _client(name: str, client: DynamicClient) -> dict[str, Any]:
    bound = {} if client.client_id is None else {"clientid": client.client_id}
    return {"username": name, **bound, "roles": [{"rolename": client.role}]}


def _role(name: str, held: Filters) -> dict[str, Any]:
    rules = [("publishClientSend", allowed) for allowed in held.publish]
    for allowed in held.subscribe:
        rules += [("subscribePattern", allowed), ("publishClientReceive", allowed)]
    return {
        "rolename": name,
        "acls": [
            {"acltype": kind, "topic": topic, "priority": 0, "allow": True} for kind, topic in rules
        ],
    }
