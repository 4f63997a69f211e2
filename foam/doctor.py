"""Checks of the surroundings: what a mesh needs here, and what to do where it is missing."""

import asyncio
import importlib.util
import os
import platform
import secrets
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from capability_schemas.errors import AccessDenied, BrokerUnavailable, FoamError, Unavailable
from foam.settings import Settings

if TYPE_CHECKING:
    from broker.session.settings import BrokerUrl
    from foam.sdk.address import MeshAddress

__all__ = ["Check", "run_checks"]

_MIN_PYTHON: Final = (3, 11)
_MIN_FREE_BYTES: Final = 500 * 1024 * 1024
_CONNECT_S: Final = 3.0

Verdict = Literal["ok", "note", "missing", "failed"]


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at.

    Attributes:
        what: What was looked at.
        verdict: ``ok``, ``note`` (works without it), ``missing`` (the mesh does not work) or
            ``failed`` (it was asked, and refused us).
        found: What was found.
        remedy: What to do; empty when nothing.
    """

    what: str
    verdict: Verdict
    found: str
    remedy: str = ""


def _python(_: Settings) -> Iterable[Check]:
    version = platform.python_version()
    if sys.version_info >= _MIN_PYTHON:
        yield Check("python", "ok", f"{version} on {platform.machine()}")
    else:
        yield Check("python", "missing", version, "use Python 3.11 or newer")


def _brokers(_: Settings) -> Iterable[Check]:
    from broker.engine import find_binary

    has_amqtt = importlib.util.find_spec("amqtt") is not None
    mosquitto, nats = find_binary("mosquitto"), find_binary("nats-server")
    verdict: Verdict = "ok" if has_amqtt else "note" if mosquitto else "missing"
    yield Check(
        "embedded broker",
        verdict,
        "amqtt" if has_amqtt else "no amqtt",
        "" if has_amqtt else "in the clone: pip install '.[broker]'",
    )
    yield Check(
        "mosquitto",
        "ok" if mosquitto else "note",
        str(mosquitto or "not installed"),
        ""
        if mosquitto
        else "install the package mosquitto: it keeps sessions over a restart, and speaks MQTT 5",
    )
    yield Check(
        "nats-server",
        "ok" if nats else "note",
        str(nats or "not installed"),
        "" if nats else "only needed for --broker nats",
    )


def _encoder(settings: Settings) -> Iterable[Check]:
    remedy = (
        "python3 deploy/bootstrap.py demo sets it up; "
        "or: python -m registry.encoders.export --out DIR"
    )
    try:
        from registry.encoders.manifest import default_folder, read_manifest

        folder = settings.encoder or default_folder()
        manifest = read_manifest(folder, verify=True)
    except ImportError as exc:
        yield Check(
            "encoder", "missing", f"no {exc.name}", "in the clone: pip install '.[registry]'"
        )
    except FoamError as error:
        yield Check("encoder", "missing", error.message, remedy)
    else:
        yield Check(
            "encoder",
            "ok",
            f"{manifest.space.model} ({manifest.space.dimension} dimensions), {folder}",
        )


def _runtimes(_: Settings) -> Iterable[Check]:
    from node_agent.runtimes.catalogue import runtime_states

    for state in runtime_states():
        # The shipped functions need a model engine and nothing else.
        needed = state.name == "llama_cpp"
        yield Check(
            f"runtime {state.name}",
            "ok" if not state.problem else "missing" if needed else "note",
            state.problem or state.origin,
            state.remedy,
        )


def _isolation(_: Settings) -> Iterable[Check]:
    from node_agent.isolation.system import find_isolation

    found = find_isolation()
    yield Check(
        "network filter",
        "note" if found.no_network_filter else "ok",
        found.no_network_filter or "functions have no network unless it is granted",
        "functions can open connections here" if found.no_network_filter else "",
    )
    tree = found.cgroups
    yield Check(
        "control groups",
        "note" if tree is None else "ok",
        found.no_cgroups if tree is None else f"{', '.join(sorted(tree.controllers))}, {tree.path}",
        "only limits.cpus and limits.processes need them: run the node as a systemd service with "
        "Delegate=yes"
        if tree is None
        else "",
    )


def _model(settings: Settings) -> Iterable[Check]:
    shipped = Path(__file__).resolve().parent / "models" / "foam-tiny-2.6m-q8_0.gguf"
    path = settings.model or shipped
    try:
        with path.open("rb") as file:
            sound = file.read(4) == b"GGUF"
    except OSError as exc:
        yield Check("model", "missing", f"{path}: {exc.strerror}", "set FOAM_MODEL to a GGUF file")
        return
    if sound:
        yield Check("model", "ok", f"{path} ({path.stat().st_size / 1e6:.1f} MB)")
    else:
        yield Check("model", "missing", f"{path} is no GGUF file", "set FOAM_MODEL to a GGUF file")


def _disk(settings: Settings) -> Iterable[Check]:
    place = settings.data
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        yield Check(
            "data folder",
            "missing",
            f"{settings.data}: {place} cannot be written",
            "name another folder with --data or FOAM_DATA",
        )
        return
    free = shutil.disk_usage(place).free
    found = f"{settings.data}: {free / 1e9:.1f} GB free"
    if free < _MIN_FREE_BYTES:
        yield Check(
            "data folder", "missing", found, "free some space, or name another folder with --data"
        )
    else:
        yield Check("data folder", "ok", found)


async def _reach(settings: Settings) -> list[Check]:
    """Look at the mesh, and at each broker where it has several."""
    from foam.sdk.address import find_mesh

    try:
        address = find_mesh(settings, admin=True)
    except FoamError:
        return [await _broker_reach(settings)]
    brokers = [] if len(address.urls) == 1 else [_one_broker(address, url) for url in address.urls]
    async with asyncio.TaskGroup() as group:
        looks = [
            group.create_task(look, name=f"foam.doctor.{number}")
            for number, look in enumerate((*brokers, _broker_reach(settings)))
        ]
    return [look.result() for look in looks]


async def _one_broker(address: "MeshAddress", url: "BrokerUrl") -> Check:
    """Log on to one broker of several."""
    from broker.session.mqtt import MqttSession
    from broker.session.settings import SessionSettings

    settings = SessionSettings(
        urls=(url,),
        client_id=f"{address.client}-doctor-{secrets.token_hex(4)}",
        username=address.username,
        password=address.password,
        tls=address.tls,
    )
    what = f"broker {url}"
    try:
        async with MqttSession(settings=settings) as session:
            await session.wait_connected(_CONNECT_S)
    except BrokerUnavailable as error:
        reason = str(error.detail.get("reason") or error.message)
        return Check(
            what,
            "failed",
            reason,
            "start it again; the others serve if they let us in",
        )
    except FoamError as error:
        return Check(what, "failed", error.message, "it does not know us: do its access rules lag?")
    return Check(what, "ok", "lets us in")


async def _broker_reach(settings: Settings) -> Check:
    from foam.sdk.address import find_mesh
    from foam.sdk.client import MeshClient

    try:
        address = find_mesh(settings, admin=True)
        connect_s = _CONNECT_S * len(address.urls)  # they are tried one after the other
        async with MeshClient.at(address, connect_timeout_s=connect_s) as mesh:
            stats = await mesh.admin("stats", timeout_s=_CONNECT_S)
            used = mesh.broker
    except AccessDenied as error:
        if settings.identity_file is not None:
            remedy = "its papers are not good (any more): enroll anew, or give another --identity"
        elif settings.url is not None or settings.username is not None:
            remedy = "check name and password, or give the --identity of an administrator"
        else:
            remedy = (
                "start the mesh again (`foam up` makes its administrator anew), "
                "or give the --identity of another one"
            )
        return Check("mesh", "failed", error.message, remedy)
    except FoamError as error:
        if type(error) is Unavailable:  # a broker let us in, and no router has answered
            remedy = "see who is there with: foam routers; only administrators and operators may"
        elif settings.url is None:
            remedy = "start a mesh with: foam up"
        else:
            remedy = "check --url, name and password"
        return Check("mesh", "note", error.message, remedy)
    asleep = f", {stats['asleep']} asleep" if stats.get("asleep") else ""
    return Check(
        "mesh",
        "ok",
        f"{used}: {stats.get('nodes')} nodes live{asleep}, {stats.get('functions')} functions",
    )


_CHECKS: Final[tuple[Callable[[Settings], Iterable[Check]], ...]] = (
    _python,
    _brokers,
    _encoder,
    _runtimes,
    _isolation,
    _model,
    _disk,
)


def run_checks(settings: Settings) -> list[Check]:
    """Look at everything; blocks for some seconds at most.

    Args:
        settings: Which folder, encoder, model and mesh.
    """
    checks = [check for look in _CHECKS for check in look(settings)]
    checks.extend(asyncio.run(_reach(settings)))
    return checks
