"""``foam demo``: the plant, played once and judged."""

from pathlib import Path
from typing import Annotated

import typer

from foam.cli.app import app, run_async
from foam.cli.codes import CODES_EPILOG
from foam.logging import configure_logging
from foam.settings import load_settings

__all__ = ["demo"]


@app.command(epilog=CODES_EPILOG)
def demo(
    *,
    broker: Annotated[
        str | None,
        typer.Option("--broker", help="embedded, mosquitto, nats or a URL, as for `foam up`."),
    ] = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Leave the mesh running afterwards, until Ctrl-C.")
    ] = False,
    speed: Annotated[
        float | None,
        typer.Option("--speed", help="Seconds of the recorded shift that pass in one.", min=1.0),
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="Folder of the mesh; a temporary one otherwise.")
    ] = None,
) -> None:
    """Play a shift of a small plant: devices ask, nodes answer, every answer is judged."""
    from foam.demo.run import DemoOptions, run_demo

    settings = load_settings()
    configure_logging("error")
    options = DemoOptions(broker=broker, keep=keep, data=data)
    if speed is not None:
        options = DemoOptions(broker=broker, keep=keep, data=data, speed=speed)
    run_async(run_demo(settings, options))
