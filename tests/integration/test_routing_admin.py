"""The levers of a router, pulled over a real broker, with a real encoder and a real registry."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from broker.session.base import Message
from broker.session.mqtt import MqttSession
from capability_schemas.capability import EncoderSpace
from capability_schemas.errors import (
    ConfigurationError,
    FoamError,
    InvalidTask,
    NotFound,
    PolicyDenied,
)
from capability_schemas.invocation import Invocation, Report
from capability_schemas.node import NodeState
from capability_schemas.signing import SigningKey
from capability_schemas.topics import TopicKind
from capability_schemas.wire import encode
from foam.sdk import MeshClient
from foam.sdk.address import MeshAddress
from registry.admission import Identity
from registry.encoders import Encoder, EncoderThread, OnnxEncoder, Vectors
from registry.search import CapabilitySearch
from registry.service import RegistryService
from registry.store import SqliteStore
from router import Ledger, RouterService, RouterSettings, router_will
from router.rules import RuleFile
from support.broker_site import BrokerSite, run_site
from support.capabilities import make_claim, signed
from support.encoders import exported_folder

pytestmark = [pytest.mark.broker, pytest.mark.encoder]

SETTINGS = RouterSettings(sweep_s=0.05, settle_ms=300, quiet_ms=50, calibration_delay_s=0.05)
NODE_KEY = SigningKey.generate()
FUNCTIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "summarise": (
        "Summarise a text in a few sentences.",
        ("give me the gist of this report", "sum up the maintenance log", "what does it say?"),
    ),
    "translate": (
        "Translate a text into another language.",
        ("translate this into German", "what is that in French", "put it into Spanish"),
    ),
    "read_meter": (
        "Read the value that a meter shows.",
        ("what does the gas meter show", "read the pressure gauge", "current meter reading"),
    ),
}
ASKED = "please summarise the shift report"


class Turned:
    """The same encoder in a space turned by a fixed rotation: as good, and not comparable."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        known = encoder.space
        self.space = EncoderSpace(
            model=known.model, revision=f"turned-{known.revision}", dimension=known.dimension
        )
        random = np.random.default_rng(7).standard_normal((known.dimension, known.dimension))
        self._turn = np.linalg.qr(random)[0].astype(np.float32)

    def encode(self, texts: Sequence[str]) -> Vectors:
        turned: Vectors = self._encoder.encode(texts) @ self._turn
        return turned


class Node:
    """Claims functions and answers every invocation of them."""

    def __init__(self, mesh: "Mesh", name: str) -> None:
        self.name = name
        self._mesh = mesh
        self.session = MqttSession(settings=mesh.site.settings(name))

    async def start(self, *functions: str, **more: Any) -> None:
        await self._mesh.stack.enter_async_context(self.session)
        await self.session.wait_connected(10)
        topics = self._mesh.topics
        await self.session.subscribe(
            topics.build(TopicKind.INVOKE, node=self.name), self._on_invoke
        )
        state = NodeState(node=self.name, state="birth", epoch=10, at=1, load_interval_s=60)
        self.session.post(
            topics.build(TopicKind.NODE_STATE, node=self.name), encode(state), retain=True
        )
        for function in functions:
            description, examples = FUNCTIONS[function]
            claim = make_claim(
                self.name, function, description=description, examples=examples, **more
            )
            self.session.post(
                topics.build(TopicKind.CAPABILITY, node=self.name, function=function),
                signed(claim, NODE_KEY),
                retain=True,
            )

    async def _on_invoke(self, message: Message) -> None:
        asked = Invocation.model_validate_json(message.payload)
        report = partial(
            Report, task=asked.task, client=asked.client, attempt=asked.attempt, node=self.name
        )
        topic = self._mesh.topics.build(TopicKind.REPORT, router=asked.router, node=self.name)
        self.session.post(topic, encode(report(status="admitted")))
        result = {
            "v": 1,
            "task": asked.task,
            "at": 1,
            "attempt": asked.attempt,
            "event": "result",
            "seq": asked.seq,
            "output": asked.function,
            "node": self.name,
        }
        self.session.post(f"{asked.reply}/{self.name}", json.dumps(result).encode())
        self.session.post(topic, encode(report(status="finished", seq=asked.seq + 1)))


class Mesh:
    """A broker, a registry, a router and an administrator; nodes as asked."""

    def __init__(self, stack: AsyncExitStack, site: BrokerSite, path: Path, onnx: Encoder) -> None:
        self.stack = stack
        self.site = site
        self.topics = site.topics
        self.path = path
        self.onnx = onnx
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.rules = path / "rules.toml"
        self.client: MeshClient
        self.router: RouterService
        self._life: AsyncExitStack | None = None

    async def start(self) -> None:
        watcher = MqttSession(settings=self.site.settings("watcher-1"))
        await self.stack.enter_async_context(watcher)
        await watcher.subscribe(self.topics.filter(TopicKind.EVENT), self._on_event)
        registry = MqttSession(settings=self.site.settings("registry-1"))
        store = await self.stack.enter_async_context(SqliteStore(path=self.path / "reg.sqlite"))
        encoder = await self.stack.enter_async_context(EncoderThread(encoder=self.onnx))
        await self.stack.enter_async_context(registry)
        await registry.wait_connected(10)
        await self.stack.enter_async_context(
            RegistryService(
                session=registry,
                topics=self.topics,
                store=store,
                encoder=encoder,
                key=SigningKey.generate(),
                identities=lambda _node: Identity(NODE_KEY.public),
                registry_id="registry-1",
            )
        )
        self.client = await self.stack.enter_async_context(
            MeshClient.at(
                MeshAddress(
                    url=self.site.url,
                    site=self.topics.site,
                    client="admin-1",
                    username="admin-1",
                    password=self.site.settings("admin-1").password,
                )
            )
        )

    async def start_router(self, encoder: Encoder | None = None) -> None:
        life = self._life = AsyncExitStack()
        ledger = await life.enter_async_context(Ledger(path=self.path / "router.sqlite"))
        thread = await life.enter_async_context(EncoderThread(encoder=encoder or self.onnx))
        rules = RuleFile(self.rules)
        rules.load()
        session = MqttSession(
            settings=self.site.settings("router-1", clean=False),
            will=lambda: router_will(self.topics, "router-1", epoch=1, at=1),
        )
        self.router = RouterService(
            session=session,
            topics=self.topics,
            search=CapabilitySearch(space=thread.space),
            encoder=thread,
            ledger=ledger,
            router_id="router-1",
            settings=SETTINGS,
            rules=rules,
            encoders=self._another,
        )
        await self.router.listen()
        await life.enter_async_context(session)
        await life.enter_async_context(self.router)
        await session.wait_connected(10)

    async def stop_router(self) -> None:
        life, self._life = self._life, None
        if life is not None:
            await life.aclose()

    async def fleet(self) -> None:
        """Two nodes that summarise, the second one dearer; the first one does more."""
        await Node(self, "edge-1").start("summarise", "translate", "read_meter")
        await Node(self, "edge-2").start("summarise", cost={"money": 1.0})
        await self.informed(4)

    async def informed(self, functions: int) -> None:
        """Wait until the router knows of so many functions and has fitted itself to them."""
        async with asyncio.timeout(25):
            while True:
                stats = await self.admin("stats")
                if stats["functions"] == functions and stats["nodes"] and not self.unfitted:
                    return
                await asyncio.sleep(0.02)

    @property
    def unfitted(self) -> bool:
        return not [data for kind, data in self.events if kind == "calibrated"]

    def told(self, kind: str) -> list[dict[str, Any]]:
        return [data for told, data in self.events if told == kind]

    async def admin(self, verb: str, **args: Any) -> dict[str, Any]:
        answer: dict[str, Any] = await self.client.admin(verb, timeout_s=25, **args)
        return answer

    async def chosen(self, **task: Any) -> list[str] | None:
        chosen: list[str] | None = (await self.admin("explain", task={"text": ASKED, **task}))[
            "chosen"
        ]
        return chosen

    def _another(self, backend: str, folder: Path | None) -> EncoderThread:
        def load() -> Encoder:
            if backend != "turned":
                raise ConfigurationError(f"unknown encoder {backend!r}: use turned")
            return Turned(self.onnx)

        return EncoderThread(encoder=load)

    async def _on_event(self, message: Message) -> None:
        levels = self.topics.parse(message.topic).levels
        if levels["source"] == "router-1":
            event = json.loads(message.payload)
            assert event["type"] == f"io.foam.router.{levels['kind']}.v1"
            self.events.append((levels["kind"], event["data"]))


@pytest.fixture(scope="module")
def onnx() -> Encoder:
    return OnnxEncoder(exported_folder())


@pytest.fixture
async def mesh(tmp_path: Path, onnx: Encoder) -> AsyncIterator[Mesh]:
    async with AsyncExitStack() as stack:
        site = await stack.enter_async_context(run_site("embedded", tmp_path))
        mesh = Mesh(stack, site, tmp_path, onnx)
        stack.push_async_callback(mesh.stop_router)
        await mesh.start()
        yield mesh
        await mesh.stop_router()


async def refused(asking: Any, error: type[FoamError]) -> str:
    with pytest.raises(error) as caught:
        await asking
    return caught.value.message


async def test_explain_and_whatif_tell_every_candidate_and_change_nothing(mesh: Mesh) -> None:
    await mesh.start_router()
    await mesh.fleet()
    told = await mesh.admin("explain", text=ASKED)
    assert told["chosen"] == ["edge-1", "summarise"]
    assert 0 < told["probability"] <= 1
    assert told["window"] >= 0
    assert told["rules"] == {"matched": []}
    rows = {(row["node"], row["function"]): row for row in told["candidates"]}
    assert len(rows) == 4
    assert set(rows["edge-1", "summarise"]["gates"].values()) == {"pass"}
    assert rows["edge-2", "summarise"]["weighted"]["cost"] < 0

    gone = await mesh.admin("whatif", text=ASKED, gone=["edge-1"])
    assert (gone["now"], gone["changed"]) == (told, True)
    assert gone["then"]["chosen"] == ["edge-2", "summarise"]
    dear = await mesh.admin("whatif", text=ASKED, cost={"edge-1/summarise": 5, "edge-2": 0})
    assert dear["then"]["chosen"] == ["edge-2", "summarise"]
    loaded = await mesh.admin(
        "whatif", task={"function": "summarise"}, load={"edge-1": 1}, weights={"cost": 0}
    )
    assert loaded["then"]["chosen"] == ["edge-2", "summarise"]
    same = await mesh.admin("whatif", text=ASKED, weights={"cost": 0.2})
    assert not same["changed"]
    assert await mesh.admin("explain", text=ASKED) == told

    one = await mesh.admin("explain", text=ASKED, limit=1)
    assert (len(one["candidates"]), one["looked_at"]) == (1, 4)
    args: dict[str, Any]
    for args, error, named in (
        ({"text": ASKED}, InvalidTask, "nothing is supposed"),
        ({"text": ASKED, "gone": ["edge-9"]}, NotFound, "edge-9"),
        ({"text": ASKED, "load": {"edge-1": 2}}, InvalidTask, "load.edge-1"),
        ({"text": ASKED, "cost": {"edge-1/weld": 2}}, NotFound, "edge-1/weld"),
        ({"text": ASKED, "weights": {"costs": 1}}, InvalidTask, "no weight 'costs'"),
        ({"text": ASKED, "lod": {}}, InvalidTask, "unknown argument 'lod'"),
        ({"text": ""}, InvalidTask, "text"),
    ):
        assert named in await refused(mesh.admin("whatif", **args), error)
    for args, named in (
        ({}, "text"),
        ({"task": {"text": "x", "txt": 1}}, "txt"),
        ({"text": "x", "limit": 0}, "limit"),
        ({"text": "x", "client": "a b"}, "client"),
    ):
        assert named in await refused(mesh.admin("explain", **args), FoamError)


async def test_a_task_keeps_the_record_of_its_decision(mesh: Mesh, eventually: Any) -> None:
    mesh.rules.write_text(
        '[[rule]]\nname = "gist"\nwhen = { keywords = ["shift"] }\nroute = "best"\n'
    )
    await mesh.start_router()
    await mesh.fleet()
    result = await mesh.client.ask(ASKED, task_id="t-1", timeout_s=20)
    assert (result.output, result.node) == ("summarise", "edge-1")
    await eventually(lambda: len(mesh.router.dispatcher) == 0)
    kept = await mesh.admin("explain", task="t-1")
    assert (kept["outcome"], kept["client"]) == ("result", "admin-1")
    told = kept["explanation"]
    assert (told["chosen"], told["rules"]["matched"]) == (["edge-1", "summarise"], ["gist"])
    assert told["prefer"] == "best"
    assert {"reputation", "cost", "load"} <= told["candidates"][0]["weighted"].keys()
    named = await mesh.client.ask(function="read_meter", task_id="t-2", timeout_s=20)
    assert named.node == "edge-1"
    rows = (await mesh.admin("reputation", node="edge-1"))["reputation"]
    scores = {row["function"]: row["score"] for row in rows}
    prior = (await mesh.admin("reputation"))["prior"]
    await eventually(lambda: len(mesh.router.dispatcher) == 0)
    assert scores["summarise"] > prior == scores["translate"]


async def test_weights_hold_at_once_and_over_restarts(mesh: Mesh, eventually: Any) -> None:
    await mesh.start_router()
    await mesh.fleet()
    task = {"function": "summarise", "session": "s"}
    shown = await mesh.admin("weights")
    assert shown["changed"] == []
    assert shown["weights"]["cost"] == {
        "value": shown["weights"]["cost"]["default"],
        "default": SETTINGS.weights.cost,
        "lowest": 0,
        "highest": 1,
    }
    await mesh.admin("weights", cost=0.9, load=0)
    assert mesh.router.routing.weights.cost == 0.9
    told = await mesh.admin("explain", task=task)
    (dear,) = [row for row in told["candidates"] if row["node"] == "edge-2"]
    assert dear["weighted"]["cost"] == -0.9
    await eventually(lambda: mesh.told("weights_changed"))
    assert mesh.told("weights_changed")[0]["changed"] == ["cost", "load"]

    for bad, named in (({"cost": 7}, "cost"), ({"kost": 1}, "kost"), ({"reset": 1}, "reset")):
        assert named in await refused(mesh.admin("weights", **bad), InvalidTask)
    assert mesh.router.routing.weights.cost == 0.9

    await mesh.stop_router()
    await mesh.start_router()
    assert (await mesh.admin("weights"))["changed"] == ["cost", "load"]
    await mesh.admin("weights", reset=True, time=0.2)
    assert (await mesh.admin("weights"))["changed"] == ["time"]
    await mesh.admin("weights", reset=True)
    assert mesh.router.routing.weights == SETTINGS.weights


async def test_an_edit_of_the_rules_changes_decisions_and_a_bad_one_does_not(
    mesh: Mesh, eventually: Any
) -> None:
    await mesh.start_router()
    await mesh.fleet()
    assert (await mesh.admin("rules"))["rules"] == []
    assert await mesh.chosen() == ["edge-1", "summarise"]
    mesh.rules.write_text('[[rule]]\nname = "away"\nforbid = { node = "edge-1" }\n')
    await eventually(lambda: mesh.told("rules_changed"))
    assert await mesh.chosen() == ["edge-2", "summarise"]
    assert await mesh.chosen(function="summarise", text=None) == ["edge-2", "summarise"]
    told = await mesh.admin("explain", text=ASKED)
    (kept_out,) = [
        row
        for row in told["candidates"]
        if (row["node"], row["function"]) == ("edge-1", "summarise")
    ]
    assert "away" in kept_out["gates"]["rules"]
    assert told["rules"]["matched"] == ["away"]
    error = await refused(mesh.client.ask(function="translate", timeout_s=10), PolicyDenied)
    assert "away" in error

    mesh.rules.write_text('[[rule]]\nname = "away"\nforbidd = { node = "edge-1" }\n')
    await eventually(lambda: mesh.told("rules_refused"))
    shown = await mesh.admin("rules")
    assert "forbidd" in shown["problem"]
    assert [rule["name"] for rule in shown["rules"]] == ["away"]
    assert await mesh.chosen() == ["edge-2", "summarise"]

    mesh.rules.unlink()
    reloaded = await mesh.admin("rules", reload=True)
    assert (reloaded["count"], reloaded["problem"]) == (0, None)
    assert await mesh.chosen() == ["edge-1", "summarise"]
    assert "reload" in await refused(mesh.admin("rules", reload="yes"), InvalidTask)


@pytest.mark.slow
@pytest.mark.timeout(180)
async def test_another_encoder_takes_over_while_tasks_run(mesh: Mesh, eventually: Any) -> None:
    await mesh.start_router()
    await mesh.fleet()
    before = (await mesh.admin("encoder"))["space"]
    asked = {
        "summarise": "summarise this, item {}",
        "translate": "translate number {} into German",
        "read_meter": "read the gas meter {}",
    }
    done: list[tuple[str, Any]] = []
    stop = asyncio.Event()

    async def keep_asking(function: str, words: str) -> None:
        number = 0
        while not stop.is_set():
            number += 1
            result = await mesh.client.ask(words.format(number), timeout_s=20)
            done.append((function, result.output))

    async with asyncio.TaskGroup() as group:
        for function, words in asked.items():
            group.create_task(keep_asking(function, words))
        await eventually(lambda: len(done) > 5)
        await mesh.admin("encoder", backend="turned")
        await eventually(lambda: mesh.told("encoder_changed"), timeout_s=90)
        after = len(done)
        await eventually(lambda: len(done) > after + 5)
        stop.set()
    assert [pair for pair in done if pair[0] != pair[1]] == []
    shown = await mesh.admin("encoder")
    assert shown["space"]["revision"] == f"turned-{before['revision']}"
    assert (shown["records"], shown["unembedded"], shown["changing"]) == (4, 0, None)

    assert "already" in await refused(mesh.admin("encoder", backend="turned"), FoamError)
    assert "unknown encoder" in await refused(mesh.admin("encoder", backend="x"), FoamError)
    assert "backend" in await refused(mesh.admin("encoder", folder="/x"), InvalidTask)
    await eventually(lambda: len(mesh.told("encoder_refused")) == 2)
    assert "unknown encoder" in (await mesh.admin("encoder"))["failure"]
    assert await mesh.chosen() == ["edge-1", "summarise"]


async def test_records_of_another_space_are_embedded_by_the_router(
    mesh: Mesh, onnx: Encoder
) -> None:
    await mesh.start_router(Turned(onnx))
    await mesh.fleet()
    async with asyncio.timeout(25):
        while (await mesh.admin("encoder"))["unembedded"]:  # noqa: ASYNC110  # asked over the wire
            await asyncio.sleep(0.02)
    for words, function in (
        (ASKED, "summarise"),
        ("what is that in French?", "translate"),
        ("which value does the meter show", "read_meter"),
    ):
        assert (await mesh.client.ask(words, timeout_s=20)).output == function


async def test_calibration_can_be_asked_for_and_is_told(mesh: Mesh, eventually: Any) -> None:
    await mesh.start_router()
    await mesh.fleet()
    known = len(mesh.told("calibrated"))
    fitted = await mesh.admin("calibrate")
    assert 0 < fitted["threshold"] < 1
    assert fitted["window"] >= 0
    assert fitted["held_out"] > 0
    await eventually(lambda: len(mesh.told("calibrated")) > known)
    assert mesh.told("calibrated")[-1] == fitted
    assert "takes: none" in await refused(mesh.admin("calibrate", now=True), InvalidTask)
    assert "whatif" in await refused(mesh.admin("what_if"), InvalidTask)


async def test_lists_come_in_pages(mesh: Mesh) -> None:
    await mesh.start_router()
    await mesh.fleet()
    first = await mesh.admin("functions", limit=3)
    assert (len(first["functions"]), first["total"], first["next"]) == (3, 4, "edge-1/translate")
    whole = await mesh.client.admin_pages("functions", limit=1)
    assert [(row["node"], row["function"]) for row in whole["functions"]] == [
        ("edge-1", "read_meter"),
        ("edge-1", "summarise"),
        ("edge-1", "translate"),
        ("edge-2", "summarise"),
    ]
    nodes = await mesh.client.admin_pages("nodes", limit=1)
    assert [row["node"] for row in nodes["nodes"]] == ["edge-1", "edge-2"]
    named = await mesh.admin("functions", function="summarise")
    assert [row["node"] for row in named["functions"]] == ["edge-1", "edge-2"]
    assert len(await mesh.client.live_functions()) == 4
