"""The ``foam`` command line.

Modules: `app` (the application and its error boundary), `codes` (exit codes), `ask`, `processes`
(up, broker, registry, router), `node` (run, check), `look` (nodes, functions), `status`, `routing`
(explain, whatif, weights, calibrate), `rules`, `admin`, `device`, `access`, `enrollment` (token,
enroll, audit), `attest`, `authority`, `model`, `doctor`, `demo`, `evaluate`, `chaos`. Commands
import what they need when they run, so that ``foam node`` stays as light as a node should be.
"""

from foam.cli import (
    access,
    admin,
    ask,
    attest,
    authority,
    chaos,
    demo,
    device,
    doctor,
    enrollment,
    evaluate,
    look,
    model,
    node,
    processes,
    routing,
    rules,
    status,
)
from foam.cli.app import app, main

__all__ = [
    "access",
    "admin",
    "app",
    "ask",
    "attest",
    "authority",
    "chaos",
    "demo",
    "device",
    "doctor",
    "enrollment",
    "evaluate",
    "look",
    "main",
    "model",
    "node",
    "processes",
    "routing",
    "rules",
    "status",
]
