"""``foam doctor``: what is there, what is missing, what to do."""

import json
import sys
from dataclasses import asdict

import typer

from foam.cli.app import (
    DataOption,
    PasswordOption,
    SiteOption,
    UrlOption,
    UsernameOption,
    app,
    client_settings,
)
from foam.cli.codes import CODES_EPILOG
from foam.cli.look import JsonOption

__all__ = ["doctor"]

_SIGNS = {"ok": "ok     ", "note": "note   ", "missing": "MISSING"}


@app.command(epilog=CODES_EPILOG)
def doctor(
    *,
    as_json: JsonOption = False,
    data: DataOption = None,
    url: UrlOption = None,
    username: UsernameOption = None,
    password: PasswordOption = None,
    site: SiteOption = None,
) -> None:
    """Check this machine and the mesh; exits with 1 when something needed is missing."""
    from foam.doctor import run_checks

    settings = client_settings(data=data, url=url, username=username, password=password, site=site)
    checks = run_checks(settings)
    if as_json:
        sys.stdout.write(json.dumps([asdict(check) for check in checks], indent=2) + "\n")
    else:
        for check in checks:
            remedy = f"\n        do: {check.remedy}" if check.remedy else ""
            sys.stdout.write(f"{_SIGNS[check.verdict]} {check.what}: {check.found}{remedy}\n")
    if any(check.verdict == "missing" for check in checks):
        raise typer.Exit(1)
