"""The options that name a mesh, shared by the commands."""

from pathlib import Path
from typing import Annotated

import typer
from typer.testing import CliRunner

from foam.cli.connection import connected
from foam.settings import Settings, load_settings


def test_a_command_gets_its_own_options_and_the_joined_settings(tmp_path: Path) -> None:
    app, got = typer.Typer(), []

    @app.command()
    @connected(load_settings)
    def look(
        settings: Settings, what: str, *, deep: Annotated[bool, typer.Option("--deep")] = False
    ) -> None:
        """Look."""
        got.append((settings, what, deep))

    arguments = ["pump", "--deep", "--data", str(tmp_path), "--site", "hall"]
    done = CliRunner().invoke(app, arguments, env={"FOAM_USERNAME": "press"})
    assert done.exit_code == 0, done.output
    ((settings, what, deep),) = got
    assert (settings.data, settings.site, settings.username) == (tmp_path, "hall", "press")
    assert (what, deep) == ("pump", True)
    shown = CliRunner().invoke(app, ["--help"]).output
    assert all(option in shown for option in ("--deep", "--data", "--url", "--password", "--site"))
    assert "settings" not in shown.lower().replace("settings:", "")
