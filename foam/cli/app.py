"""The ``foam`` command: the application, shared options, and the error boundary."""

import asyncio
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from capability_schemas.errors import FoamError
from foam.cli.codes import CODES_EPILOG, EXIT_CANCELLED, exit_code
from foam.logging import configure_logging
from foam.settings import Settings, load_settings

__all__ = [
    "DataOption",
    "PasswordOption",
    "SiteOption",
    "UrlOption",
    "UsernameOption",
    "app",
    "client_settings",
    "complain",
    "main",
    "run_async",
]

_HELP: Final = """Run and use a mesh of edge machines that answer tasks over MQTT.

Start with `foam up`, then in another terminal `foam ask "what can you do about a hot bearing?"`."""

app = typer.Typer(
    name="foam",
    help=_HELP,
    epilog=CODES_EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
)

DataOption = Annotated[
    Path | None,
    typer.Option(
        "--data", help="Folder of the mesh (FOAM_DATA; default: the user's state folder)."
    ),
]
UrlOption = Annotated[
    str | None, typer.Option("--url", help="Broker, mqtt://[user:password@]host:port (FOAM_URL).")
]
UsernameOption = Annotated[
    str | None, typer.Option("--username", help="Name to log on with (FOAM_USERNAME).")
]
PasswordOption = Annotated[
    str | None,
    typer.Option(
        "--password", help="Its password; FOAM_PASSWORD keeps it out of the process list."
    ),
]
SiteOption = Annotated[
    str | None, typer.Option("--site", help="Site level of the topics (FOAM_SITE).")
]


def client_settings(
    *,
    data: Path | None = None,
    url: str | None = None,
    username: str | None = None,
    password: str | None = None,
    site: str | None = None,
) -> Settings:
    """Join the options of a client command with the environment; a client logs errors only.

    Raises:
        ConfigurationError: A value does not fit.
    """
    settings = load_settings(data=data, url=url, username=username, password=password, site=site)
    configure_logging("error" if settings.log_level == "info" else settings.log_level)
    return settings


def run_async(main_coroutine: Coroutine[Any, Any, int | None]) -> None:
    """Run a command's coroutine to its end.

    Args:
        main_coroutine: Returns the exit code; None means 0.

    Raises:
        typer.Exit: With that code.
    """
    code = asyncio.run(main_coroutine)
    if code:
        raise typer.Exit(code)


def complain(error: FoamError) -> int:
    """Say in one line on stderr what was wrong; return the exit code for it."""
    line = " ".join(error.message.split())
    sys.stderr.write(f"foam: {line}\n")
    return exit_code(error)


def main() -> None:
    """Run the ``foam`` command; every error of the mesh becomes one line and an exit code."""
    try:
        app()
    except FoamError as error:
        sys.exit(complain(error))
    except KeyboardInterrupt:
        sys.exit(EXIT_CANCELLED)
    except BrokenPipeError:
        # The reader of our output went away (`foam nodes | head`): nothing is left to say, not even
        # at exit.
        sys.stderr.close()
        sys.exit(1)
