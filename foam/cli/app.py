"""The ``foam`` command: the application and the error boundary."""

import asyncio
import os
import sys
from collections.abc import Coroutine
from typing import Any, Final

import typer

from capability_schemas.errors import ConfigurationError, FoamError, Overloaded
from foam.cli.codes import CODES_EPILOG, EXIT_CANCELLED, exit_code

__all__ = ["app", "complain", "drop_output", "main", "run_async"]

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
    if isinstance(error, Overloaded) and error.remote:
        line += f"; try again in {max(0, error.retry_after_ms) / 1000:.3g} s"
    sys.stderr.write(f"foam: {line}\n")
    return exit_code(error)


def drop_output() -> None:
    """Let standard output lead nowhere: what is still buffered would fail again at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def main() -> None:
    """Run the ``foam`` command; every error of the mesh becomes one line and an exit code."""
    try:
        app()
    except FoamError as error:
        sys.exit(complain(error))
    except KeyboardInterrupt:
        sys.exit(EXIT_CANCELLED)
    except BrokenPipeError:  # its reader went away (`foam nodes | head`): nothing is left to say
        drop_output()
        sys.exit(1)
    except OSError as error:
        drop_output()
        sys.exit(complain(ConfigurationError(_words(error))))


def _words(error: OSError) -> str:
    where = error.filename if error.filename is not None else "the output cannot be written"
    return f"{where}: {error.strerror or error}"
