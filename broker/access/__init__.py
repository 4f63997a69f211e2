"""Who may do what, written once and compiled for every broker.

``policy`` holds the one table of roles and topics (PROTOCOL section 6) and answers questions about
it. ``credentials`` keeps the identities of a mesh and the verifiers of their passwords. The
embedded broker asks both at run time; ``compilers`` turns them into the files that Mosquitto and
nats-server read, so that no broker has rules of its own.

Example:
    >>> from broker.access import AccessPolicy, Action, Role
    >>> from capability_schemas.topics import Topics
    >>> policy = AccessPolicy(Topics(site="local"))
    >>> policy.allows(Role.DEVICE, "pump-7", Action.PUBLISH, "foam/v1/local/task/pump-7")
    True
    >>> policy.allows(Role.DEVICE, "pump-7", Action.PUBLISH, "foam/v1/local/task/pump-8")
    False
"""

from broker.access.credentials import Credential, CredentialStore
from broker.access.policy import AccessPolicy, Action, Grant, Role, covers, grants

__all__ = [
    "AccessPolicy",
    "Action",
    "Credential",
    "CredentialStore",
    "Grant",
    "Role",
    "covers",
    "grants",
]
