"""``foam doctor``: what is there, what is missing, what to do."""

import json
import sys
from dataclasses import asdict

import typer

from foam.cli.app import app
from foam.cli.codes import CODES_EPILOG
from foam.cli.connection import connected
from foam.cli.look import JsonOption
from foam.settings import Settings

__all__ = ["doctor"]

_SIGNS = {"ok": "ok     ", "note": "note   ", "missing": "MISSING", "failed": "FAILED "}


@app.command(epilog=CODES_EPILOG)
@connected()
def doctor(
    settings: Settings,
    *,
    as_json: JsonOption = False,
) -> None:
    """Check this machine and the mesh; exits with 1 when something is missing or refuses us."""
    from foam.doctor import run_checks

    checks = run_checks(settings)
    if as_json:
        sys.stdout.write(json.dumps([asdict(check) for check in checks], indent=2) + "\n")
    else:
        for check in checks:
            remedy = f"\n        do: {check.remedy}" if check.remedy else ""
            sys.stdout.write(f"{_SIGNS[check.verdict]} {check.what}: {check.found}{remedy}\n")
    if any(check.verdict in {"missing", "failed"} for check in checks):
        raise typer.Exit(1)
