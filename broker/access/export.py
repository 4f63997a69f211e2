"""The access table for a broker that FOAM does not run: files to carry there.

Nothing here holds a password. Where a broker cannot check the verifiers of the store, the export
says for whom, and what to do; no identity is ever left open.
"""

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Protocol

from broker.access.compilers import mosquitto_acl, mosquitto_passwords, nats_user
from broker.access.credentials import PBKDF2_ITERATIONS, Credential, Pbkdf2
from broker.access.policy import AccessPolicy, Role

_SHOWN: Final = 5
_USERNAME: Final = "${username}"
_MOSQUITTO: Final = """\
# Into the configuration of Mosquitto 2.0, beside your listeners:
per_listener_settings false
allow_anonymous false
password_file /etc/mosquitto/foam.passwords
acl_file /etc/mosquitto/foam.acl
"""
_EMQX: Final = f"""\
# Into etc/emqx.conf of EMQX 5; then import users.csv into the authenticator (dashboard, or POST to
# /api/v5/authentication/password_based%3Abuilt_in_database/import_users).
authentication = [{{
  mechanism = password_based
  backend = built_in_database
  user_id_type = username
  password_hash_algorithm {{
    name = pbkdf2
    mac_fun = sha512
    iterations = {PBKDF2_ITERATIONS}
    dk_length = 64
  }}
}}]
authorization {{
  no_match = deny
  deny_action = ignore
  cache.enable = false
  sources = [{{ type = file, enable = true, path = "etc/acl.conf" }}]
}}
"""
_NATS: Final = """\
# Into the configuration of nats-server 2.9 or later, beside jetstream {} and mqtt {}:
authorization { include ./nats-users.conf }
"""


@dataclass(frozen=True, slots=True)
class Export:
    """Files for a broker.

    Attributes:
        files: Their text by name.
        notes: What is missing, and what to do, in sentences.
    """

    files: Mapping[str, str]
    notes: tuple[str, ...] = ()


class Exporter(Protocol):
    """Makes the files for one kind of broker."""

    def __call__(self, identities: Mapping[str, Credential], policy: AccessPolicy) -> Export:
        """Export the identities that are enabled."""
        ...


def for_mosquitto(identities: Mapping[str, Credential], policy: AccessPolicy) -> Export:
    """Export a password file and an access file for Mosquitto 2.0."""
    return Export(
        {
            "mosquitto.conf": _MOSQUITTO,
            "foam.passwords": mosquitto_passwords(identities),
            "foam.acl": mosquitto_acl(identities, policy),
        },
        _without_password(identities),
    )


def for_emqx(identities: Mapping[str, Credential], policy: AccessPolicy) -> Export:
    """Export rules and users for EMQX 5, after its documentation.

    Rules are one pair for each role, with ``${username}`` where the identity stands. Users are what
    its built-in database imports: PBKDF2 with a salt that is text.
    """
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(("user_id", "password_hash", "salt", "is_superuser"))
    unfit = []
    for identity, credential in sorted(identities.items()):
        verifier = Pbkdf2.parse(credential.mosquitto)
        if credential.disabled or verifier is None:
            continue
        if verifier.iterations != PBKDF2_ITERATIONS or not verifier.salt.isascii():
            unfit.append(identity)
            continue
        rows.writerow((identity, verifier.digest.hex(), verifier.salt.decode(), "false"))
    notes = list(_without_password(identities))
    if unfit:
        notes.append(
            f"EMQX cannot check the verifier of {_listed(unfit)} (its salt is no text): "
            "make the identity anew"
        )
    files = {"emqx.conf": _EMQX, "acl.conf": _emqx_rules(identities, policy)}
    return Export({**files, "users.csv": table.getvalue()}, tuple(notes))


def for_nats(identities: Mapping[str, Credential], policy: AccessPolicy) -> Export:
    """Export users with permissions for nats-server, their passwords as variables to be set.

    nats-server checks bcrypt and nothing else, and refuses to start while a variable is not set.
    """
    users: list[str] = []
    variables: dict[str, str] = {}
    for identity, credential in sorted(identities.items()):
        if credential.disabled or not credential.mosquitto:
            continue
        name = f"FOAM_PASSWORD_{identity.upper().replace('-', '_')}"
        while name in variables:  # "a-b" beside "a_b"
            name += "_"
        variables[name] = identity
        user = nats_user(identity, credential, policy, password=f"${name}")
        # A variable is one only without quotes.
        users.append(json.dumps(user, indent=1).replace(f'"${name}"', f"${name}"))
    notes = list(_without_password(identities))
    if variables:
        notes.append(
            "nats-server checks bcrypt only, which cannot be made from what the store holds "
            "(argon2id and PBKDF2): set these in its environment, each to what `nats server "
            f"passwd` makes of the password: {', '.join(variables)}"
        )
    text = "users: [\n" + ",\n".join(users) + "\n]\n"
    return Export({"nats.conf": _NATS, "nats-users.conf": text}, tuple(notes))


EXPORTERS: Final[Mapping[str, Exporter]] = {
    "mosquitto": for_mosquitto,
    "emqx": for_emqx,
    "nats": for_nats,
}


def _emqx_rules(identities: Mapping[str, Credential], policy: AccessPolicy) -> str:
    alike: dict[tuple[Role, bool], list[str]] = {}
    for name, credential in sorted(identities.items()):
        if not credential.disabled:
            alike.setdefault((credential.role, credential.apart), []).append(name)
    lines = []
    for (role, apart), names in alike.items():
        held = policy.template(role, _USERNAME, apart=apart)
        who = f'{{username, {{re, "^({"|".join(names)})$"}}}}'  # identifiers need no escaping
        lines.append(f"%% {role.value}{', of a tenant' if apart else ''}")
        for action, filters in (("publish", held.publish), ("subscribe", held.subscribe)):
            if filters:
                topics = ", ".join(f'"{allowed}"' for allowed in filters)
                lines.append(f"{{allow, {who}, {action}, [{topics}]}}.")
    return "\n".join([*lines, "{deny, all}."]) + "\n"


def _without_password(identities: Mapping[str, Credential]) -> tuple[str, ...]:
    names = [
        name
        for name, credential in sorted(identities.items())
        if not credential.disabled and not credential.mosquitto
    ]
    if not names:
        return ()
    note = (
        f"no password is known of {_listed(names)}, only a certificate: have the broker take the "
        "common name of the certificate as user name, on a listener of its own"
    )
    return (note,)


def _listed(names: list[str]) -> str:
    shown, more = ", ".join(names[:_SHOWN]), len(names) - _SHOWN
    return shown if more <= 0 else f"{shown} and {more} more"
