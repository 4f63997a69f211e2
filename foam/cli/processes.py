"""``foam up``, and each of its processes alone: ``foam broker | registry | router``."""

import contextlib
import os
import sys
from collections.abc import Coroutine
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final, NoReturn

import typer

from capability_schemas.errors import ConfigurationError, FoamError
from foam.cli.app import app, run_async
from foam.cli.codes import CODES_EPILOG, exit_code
from foam.cli.connection import DataOption, SiteOption, connected, process_settings
from foam.listening import DEFAULT_TLS_PORT, Listeners
from foam.settings import Settings, load_settings
from foam.status import ProcessStatus

__all__ = [
    "IdentityOption",
    "SupervisedOption",
    "broker",
    "registry",
    "router",
    "run_reporting",
    "up",
]

_DEFAULT_PORT: Final = 1883

SupervisedOption = Annotated[bool, typer.Option("--supervised", hidden=True)]
HostOption = Annotated[
    str,
    typer.Option(
        "--host",
        help="Address the broker listens on: with TLS, unless it is loopback, and without it on "
        "127.0.0.1.",
    ),
]
TlsPortOption = Annotated[
    int, typer.Option("--tls-port", help="Port with TLS; 0 takes a free one.", min=0, max=65535)
]
MembersPortOption = Annotated[
    int | None,
    typer.Option(
        "--members-port",
        help="Port with TLS for members with a certificate, where they need one of their own "
        "(Mosquitto); 0 takes a free one. Default: the one after --tls-port.",
        min=0,
        max=65535,
    ),
]
AccessOption = Annotated[
    str | None,
    typer.Option(
        "--access",
        help="How Mosquitto learns of rights: dynamic (its plugin) or static (files). "
        "Default: dynamic where the plugin is installed, up to 1,000 members.",
    ),
]
TlsNameOption = Annotated[
    list[str] | None,
    typer.Option(
        "--tls-name",
        help="Further name or address that clients reach the broker by; may be repeated.",
    ),
]
TlsOption = Annotated[bool, typer.Option("--tls", help="Listen with TLS on loopback too.")]
WebSocketPortOption = Annotated[
    int | None,
    typer.Option(
        "--ws-port",
        help="Port for MQTT over WebSocket, at /mqtt: with TLS where the broker listens with TLS, "
        "else on --host; 0 takes a free one. Default: none.",
        min=0,
        max=65535,
    ),
]
WebSocketOriginOption = Annotated[
    list[str] | None,
    typer.Option(
        "--ws-origin",
        help="Origin (https://host:port) whose web pages may connect to --ws-port, beside its own; "
        "may be repeated; * for all. Embedded broker only: others ask no page where it is from.",
    ),
]
PlainOption = Annotated[
    bool,
    typer.Option(
        "--plain", help="No TLS on an address that others reach: only on a network you trust."
    ),
]
PortOption = Annotated[
    int, typer.Option("--port", help="Its port; 0 takes a free one.", min=0, max=65535)
]
IdentityOption = Annotated[
    Path | None,
    typer.Option(
        "--identity",
        help="Identity file, made by `foam device add`; that of the data folder otherwise.",
    ),
]


@app.command(epilog=CODES_EPILOG)
def up(
    *,
    port: PortOption = _DEFAULT_PORT,
    host: HostOption = "127.0.0.1",
    tls: TlsOption = False,
    tls_port: TlsPortOption = DEFAULT_TLS_PORT,
    members_port: MembersPortOption = None,
    tls_name: TlsNameOption = None,
    ws_port: WebSocketPortOption = None,
    ws_origin: WebSocketOriginOption = None,
    plain: PlainOption = False,
    data: DataOption = None,
    broker: Annotated[
        str | None,
        typer.Option(
            "--broker",
            help="embedded, mosquitto, nats, or the URL of a broker that runs elsewhere. "
            "Default: mosquitto where its program is installed, else embedded.",
        ),
    ] = None,
    brokers: Annotated[
        int,
        typer.Option(
            "--brokers",
            help="How many servers the broker is: 3 or 5 of nats, each with everything, one of "
            "which may be lost; their ports follow --port.",
            min=1,
            max=5,
        ),
    ] = 1,
    access: AccessOption = None,
    site: SiteOption = None,
    nodes: Annotated[
        str,
        typer.Option(
            "--nodes", help="Which nodes to run without --node: demo (a small plant) or none."
        ),
    ] = "demo",
    node: Annotated[
        list[Path] | None,
        typer.Option("--node", help="Node file (TOML or Python) to run; may be repeated."),
    ] = None,
    routers: Annotated[
        int, typer.Option("--routers", help="How many routers share the tasks.", min=1, max=16)
    ] = 1,
    registries: Annotated[
        int,
        typer.Option(
            "--registries",
            help="How many registries; one leads, and the next takes over when it is gone.",
            min=1,
            max=8,
        ),
    ] = 1,
    unsigned_admin: Annotated[
        str | None,
        typer.Option(
            "--unsigned-admin",
            help="allow or refuse requests of administrators that are not signed. Default: allow "
            "at a broker on this machine, refuse at any other.",
        ),
    ] = None,
    supervised: SupervisedOption = False,
) -> None:
    """Run a whole mesh on this machine; Ctrl-C stops it.

    Prints one line `FOAM READY {json}` on stdout when tasks can be served.
    """
    from foam.up import UpPlan, run_up

    settings = load_settings(data=data, site=site, unsigned_admin=unsigned_admin)
    plan = UpPlan(
        broker=broker,
        listeners=replace(
            Listeners.of(
                host,
                port,
                tls_port=tls_port,
                members_port=members_port,
                names=tls_name or (),
                plain=plain,
                tls=tls,
            ),
            websocket_port=ws_port,
            websocket_origins=tuple(ws_origin or ()),
        ),
        brokers=brokers,
        access=_access(access),
        site=settings.site or "local",
        nodes=tuple(path.absolute() for path in node) if node else _named_nodes(nodes),
        routers=routers,
        registries=registries,
        unsigned_admin=settings.unsigned_admin,
        supervised=supervised,
    )
    run_async(run_up(settings, plan))


def _access(name: str | None) -> str | None:
    if name not in {None, "static", "dynamic"}:
        raise ConfigurationError(f"access {name!r}: use static or dynamic")
    return name


def _named_nodes(name: str) -> tuple[Path, ...]:
    if name == "none":
        return ()
    if name != "demo":
        raise ConfigurationError(f"nodes {name!r}: use demo or none, or name files with --node")
    from foam.demo import PLANT_NODES

    return PLANT_NODES


@app.command(epilog=CODES_EPILOG)
def broker(
    *,
    engine: Annotated[
        str | None, typer.Option("--engine", help="embedded, mosquitto or nats.")
    ] = None,
    host: Annotated[
        str, typer.Option("--host", help="Address the broker listens on without TLS.")
    ] = "127.0.0.1",
    port: PortOption = _DEFAULT_PORT,
    tls_host: Annotated[
        str | None, typer.Option("--tls-host", help="Address it listens on with TLS.")
    ] = None,
    tls_port: TlsPortOption = DEFAULT_TLS_PORT,
    members_port: MembersPortOption = None,
    tls_name: TlsNameOption = None,
    ws_port: WebSocketPortOption = None,
    ws_origin: WebSocketOriginOption = None,
    access: AccessOption = None,
    seat: Annotated[int | None, typer.Option("--seat", hidden=True)] = None,
    data: DataOption = None,
    site: SiteOption = None,
    supervised: SupervisedOption = False,
) -> None:
    """Run the broker alone, over the identities of the data folder."""
    from foam.up import choose_engine
    from foam.wiring import run_broker

    settings = process_settings("broker", data=data, site=site)
    status = ProcessStatus(title="broker", supervised=supervised)

    async def main() -> int:
        name, _ = choose_engine(engine)
        listeners = Listeners(
            host=host,
            port=port,
            tls_host=tls_host,
            tls_port=tls_port,
            members_port=members_port,
            names=tuple(tls_name or ()),
            websocket_port=ws_port,
            websocket_origins=tuple(ws_origin or ()),
        )
        return await run_broker(
            settings,
            engine=name,
            listeners=listeners,
            status=status,
            access=_access(access),
            seat=seat,
        )

    run_reporting(main(), status)


@app.command(epilog=CODES_EPILOG)
@connected(partial(process_settings, "registry"))
def registry(
    settings: Settings,
    *,
    registry_id: Annotated[
        str | None,
        typer.Option("--id", help="Its id, to run one beside others (default: registry-1)."),
    ] = None,
    identity: IdentityOption = None,
    supervised: SupervisedOption = False,
) -> None:
    """Run a registry alone, or one more beside others: one of them leads, the rest follow it."""
    from foam.wiring import run_registry

    status = ProcessStatus(title="registry", supervised=supervised)
    main = run_registry(settings, registry_id=registry_id, identity_file=identity, status=status)
    run_reporting(main, status)


@app.command(epilog=CODES_EPILOG)
@connected(partial(process_settings, "router"))
def router(
    settings: Settings,
    *,
    router_id: Annotated[
        str | None,
        typer.Option("--id", help="Its id, to run one beside others (default: router-1)."),
    ] = None,
    identity: IdentityOption = None,
    supervised: SupervisedOption = False,
) -> None:
    """Run a router alone, or one more beside others: they share the tasks."""
    from foam.wiring import run_router

    status = ProcessStatus(title="router", supervised=supervised)
    main = run_router(settings, router_id=router_id, identity_file=identity, status=status)
    run_reporting(main, status)


def run_reporting(main: Coroutine[Any, Any, int], status: ProcessStatus) -> None:
    """Run a process of the mesh to its end; what ends it is reported where readiness is.

    Args:
        main: Returns the exit code.
        status: Where to report.
    """
    code = 0
    try:
        run_async(main)
    except typer.Exit as error:
        code = error.exit_code
    except FoamError as error:
        status.failed(error)
        code = exit_code(error)
    if status.supervised:
        _leave(code)
    sys.exit(code)


def _leave(code: int) -> NoReturn:
    """End the process, all parts of which have been left, without taking the interpreter apart.

    That takes up to two seconds of a busy machine, and waits for threads that nobody needs any
    more: what a mesh of ten processes would wait for when it is stopped.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # its reader is gone
            stream.flush()
    os._exit(code)
