"""Which mesh a command talks to: its options, in one place for every command that has them."""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Concatenate, Final, ParamSpec

import typer

from foam.logging import configure_logging
from foam.settings import Settings, load_settings

__all__ = [
    "DataClassOption",
    "DataOption",
    "GrantOption",
    "SiteOption",
    "TenantOption",
    "ZoneOption",
    "client_settings",
    "connected",
    "process_settings",
]

DataOption = Annotated[
    Path | None,
    typer.Option(
        "--data", help="Folder of the mesh (FOAM_DATA; default: the user's state folder)."
    ),
]
TenantOption = Annotated[
    str | None,
    typer.Option(
        "--tenant",
        help="Whose the device or node is, apart from all others; * for a node that serves all.",
    ),
]
ZoneOption = Annotated[
    list[str] | None, typer.Option("--zone", help="Zone a node stands in; may be repeated.")
]
GrantOption = Annotated[
    list[str] | None, typer.Option("--grant", help="Right a node holds; may be repeated.")
]
DataClassOption = Annotated[
    list[str] | None,
    typer.Option(
        "--data-class",
        help="Class of data a node may see: public, internal, private; all when not given.",
    ),
]
SiteOption = Annotated[
    str | None, typer.Option("--site", help="Site level of the topics (FOAM_SITE).")
]
_OPTIONS: Final[dict[str, Any]] = {
    "data": DataOption,
    "url": Annotated[
        str | None,
        typer.Option(
            "--url",
            help="Broker, mqtt://[user:password@]host:port, or mqtts, ws, wss; several of one "
            "cluster, separated by commas (FOAM_URL).",
        ),
    ],
    "username": Annotated[
        str | None, typer.Option("--username", help="Name to log on with (FOAM_USERNAME).")
    ],
    "password": Annotated[
        str | None,
        typer.Option(
            "--password", help="Its password; FOAM_PASSWORD keeps it out of the process list."
        ),
    ],
    "site": SiteOption,
    "identity_file": Annotated[
        Path | None,
        typer.Option(
            "--identity",
            help="Act as the member of this file, made by `foam enroll` (FOAM_IDENTITY_FILE).",
        ),
    ],
}
_CLIENT_ONLY: Final = "identity_file"
"""Processes of the mesh have an option of that name of their own."""

_P = ParamSpec("_P")


def client_settings(**given: Any) -> Settings:
    """Join the options of a client command with the environment.

    A client says itself, in one line, what ended it; its log is silent unless FOAM_LOG_LEVEL asks
    for more.

    Raises:
        ConfigurationError: A value does not fit.
    """
    settings = load_settings(**given)
    configure_logging("critical" if settings.log_level == "info" else settings.log_level)
    return settings


def process_settings(process: str, **given: Any) -> Settings:
    """Join the options of a process of the mesh with the environment; it logs under its name.

    Raises:
        ConfigurationError: A value does not fit.
    """
    settings = load_settings(**given)
    configure_logging(settings.log_level, process=process)
    return settings


def connected(
    join: Callable[..., Settings] = client_settings,
) -> Callable[[Callable[Concatenate[Settings, _P], None]], Callable[..., None]]:
    """Give a command the options that name a mesh; it gets them joined, as its first argument.

    Args:
        join: Makes the settings of the options.
    """
    options = {
        name: option
        for name, option in _OPTIONS.items()
        if name != _CLIENT_ONLY or join is client_settings
    }

    def decorate(command: Callable[Concatenate[Settings, _P], None]) -> Callable[..., None]:
        def run(**given: Any) -> None:
            settings = join(**{name: given.pop(name) for name in options})
            command(settings, **given)  # type: ignore[call-arg]

        _, *own = inspect.signature(command).parameters.values()
        shared = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=option)
            for name, option in options.items()
        ]
        functools.update_wrapper(run, command)
        run.__dict__["__signature__"] = inspect.Signature([*own, *shared])
        run.__annotations__ = {one.name: one.annotation for one in (*own, *shared)}
        return run

    return decorate
