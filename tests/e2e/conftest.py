"""Meshes that the tests of one module share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import require_broker
from support.foam_process import FoamUp, foam_up

NODE = Path(__file__).resolve().parents[1] / "data" / "functions" / "trial.py"


@pytest.fixture(scope="session")
def trial_node() -> Path:
    """Declaration of the node the tests run."""
    return NODE


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FoamUp]:
    """A mesh on the embedded broker."""
    with foam_up(
        tmp_path_factory.mktemp("mesh"), "--broker", "embedded", "--node", str(NODE)
    ) as up:
        yield up


@pytest.fixture(scope="module", params=["embedded", "mosquitto", "nats"])
def any_mesh(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[FoamUp]:
    """A mesh on each kind of broker in turn."""
    if request.param != "embedded":
        require_broker(request.param)
    folder = tmp_path_factory.mktemp(f"mesh-{request.param}")
    with foam_up(folder, "--broker", request.param, "--node", str(NODE)) as up:
        yield up
