"""A node agent with real child processes: what routers and clients see of it."""

import asyncio
import json
import os
import signal
import sys
from functools import partial
from pathlib import Path

import pytest

from broker.session.memory import MemoryBroker, MemorySession
from broker.session.mqtt import MqttSession
from capability_schemas.errors import ConfigurationError
from capability_schemas.functions import FunctionSpec
from capability_schemas.ids import now_ms
from capability_schemas.invocation import Control, Invocation
from capability_schemas.signing import SigningKey, verify
from capability_schemas.topics import TopicKind
from capability_schemas.wire import encode
from node_agent.admission.forecast import Work
from node_agent.agent import NodeAgent
from node_agent.announcer import offline_will
from node_agent.declaration import load_declaration, read_declaration
from node_agent.declaration.watch import SourceWatch
from node_agent.settings import NodeSettings

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "foam" / "models" / "foam-tiny-2.6m-q8_0.gguf"
WORKSHOP = ROOT / "tests" / "data" / "functions" / "workshop.py"
NODE = "edge-1"


def python(name, **fields):
    spec = {"name": name, "description": name, "entry": f"{WORKSHOP}:{name}", **fields}
    return FunctionSpec.model_validate(spec)


FUNCTIONS = (
    python(
        "add",
        input_schema={
            "type": "object",
            "properties": {"a": {"type": "number"}},
            "required": ["a"],
        },
    ),
    python("words"),
    python("fail"),
    python("vanish"),
    python("nested"),
    python("orphan"),
    python("stubborn"),
    python("polite"),
    python("flood", limits={"output_bytes": 1000}),
    python("recite", continues="skip"),
    FunctionSpec(
        name="talk",
        description="Answer with the language model.",
        runtime="llama_cpp",
        model=str(MODEL),
    ),
)


class Router:
    """Invokes and listens, as a router and a client would."""

    def __init__(self, session, topics, eventually):
        self.session = session
        self.topics = topics
        self.eventually = eventually
        self.events = []
        self.reports = []

    async def listen(self):
        await self.session.subscribe(self.topics.root + "/reply/#", self._on_event)
        reports = self.topics.filter(TopicKind.REPORT, router="router-1")
        await self.session.subscribe(reports, self._on_report)

    async def _on_event(self, message):
        self.events.append({"topic": message.topic, **json.loads(message.payload)})

    async def _on_report(self, message):
        self.reports.append(json.loads(message.payload))

    def invoke(self, function, value=None, *, text=None, task="t1", left_ms=20_000, **fields):
        invocation = {
            "task": task,
            "client": "pump-7",
            "router": "router-1",
            "function": function,
            "version": "1.0.0",
            "text": text,
            "input": value,
            "deadline": now_ms() + left_ms,
            "reply": f"{self.topics.root}/reply/pump-7/{task}",
            "sent_at": now_ms(),
            **fields,
        }
        payload = encode(Invocation.model_validate(invocation))
        self.session.post(self.topics.build(TopicKind.INVOKE, node=NODE), payload)

    def control(self, **fields):
        topic = self.topics.build(TopicKind.CONTROL, node=NODE)
        self.session.post(topic, encode(Control.model_validate(fields)))

    def statuses(self, task="t1"):
        return [report["status"] for report in self.reports if report["task"] == task]

    def of(self, task="t1"):
        return [event for event in self.events if event["task"] == task]

    async def ended(self, task="t1", *, times=1):
        ends = ("finished", "failed", "refused")
        await self.eventually(
            lambda: sum(status in ends for status in self.statuses(task)) >= times
        )
        return self.of(task)


@pytest.fixture
async def broker():
    return MemoryBroker()


@pytest.fixture
async def router(broker, topics, eventually):
    async with MemorySession(broker=broker, client_id="router-1") as session:
        await session.wait_connected()
        made = Router(session, topics, eventually)
        await made.listen()
        yield made


@pytest.fixture
async def node_session(broker):
    async with MemorySession(broker=broker, client_id=NODE) as session:
        await session.wait_connected()
        yield session


@pytest.fixture
def make_agent(node_session, topics):
    def make(functions=FUNCTIONS, **settings):
        options = {"node": NODE, "cancel_grace_s": 0.2, "drain_timeout_s": 5.0, **settings}
        return NodeAgent(
            session=node_session,
            topics=topics,
            settings=NodeSettings.model_validate(options),
            functions=functions,
            key=KEY,
        )

    return make


@pytest.fixture
async def agent(make_agent):
    async with make_agent() as made:
        yield made


KEY = SigningKey.generate()


async def test_a_plain_function_answers_with_one_result(agent, router):
    router.invoke("add", {"a": 1}, seq=7)
    (result,) = await router.ended()
    assert result["topic"].endswith("/reply/pump-7/t1/edge-1")
    assert (result["event"], result["seq"], result["output"]) == ("result", 7, 3)
    assert (result["node"], result["function"], result["version"]) == (NODE, "add", "1.0.0")
    assert result["digest"].startswith("sha256:")
    assert router.statuses() == ["admitted", "finished"]
    assert router.reports[-1]["seq"] == 8


async def test_a_generator_streams_numbered_chunks(agent, router):
    router.invoke("words", text="the pump is fine")
    *chunks, result = await router.ended()
    assert [event["seq"] for event in router.of()] == list(range(len(chunks) + 1))
    assert chunks[0]["data"] == "the "
    assert "".join(event["data"] for event in chunks) == "the pump is fine "
    assert result["output"] == "the pump is fine "


async def test_without_streaming_there_is_one_event(agent, router):
    router.invoke("words", text="the pump is fine", stream=False)
    (result,) = await router.ended()
    assert result["output"] == "the pump is fine "


@pytest.mark.llm
async def test_the_language_model_streams_and_counts_its_tokens(agent, router, broker, eventually):
    router.invoke("talk", text="Extract JSON: The humidity of greenhouse-7 is 48 %.")
    *chunks, result = await router.ended()
    assert json.loads(result["output"])["device"] == "greenhouse-7"
    assert "".join(event["data"] for event in chunks) == result["output"]
    assert len(chunks) >= 2
    assert result["usage"]["input_tokens"] == 17
    claims = broker.published("+/+/+/capability/+/talk")
    await eventually(lambda: b"sha256:" in claims_of(broker, "talk")[-1])
    claim = json.loads(claims_of(broker, "talk")[-1])
    assert claim["model"]["engine"].startswith(("llama_cpp", "xllamacpp"))
    assert claim["revision"] > json.loads(claims[0].payload)["revision"]


def claims_of(broker, function):
    return [message.payload for message in broker.published(f"+/+/+/capability/+/{function}")]


async def test_input_that_does_not_fit_is_a_terminal_error(agent, router):
    router.invoke("add", {"a": "one"}, seq=2)
    (error,) = await router.ended()
    assert (error["event"], error["code"], error["seq"]) == ("error", "invalid_task", 2)
    assert error["detail"]["field"] == "input.a"


async def test_an_exception_is_a_terminal_error_without_a_traceback(agent, router):
    router.invoke("fail", {"reason": "no oil"})
    (error,) = await router.ended()
    assert (error["code"], error["message"]) == ("execution_failed", "ValueError: no oil")
    assert "Traceback" not in json.dumps(error)
    assert router.reports[-1]["code"] == "execution_failed"


async def test_a_function_that_cannot_start_is_handed_back_with_the_reason(
    make_agent, router, tmp_path
):
    (tmp_path / "broken.py").write_text("import no_such_thing\ndef f():\n    pass\n")
    broken = python("broken", entry=f"{tmp_path}/broken.py:f")
    async with make_agent((broken,)):
        router.invoke("broken")
        assert await router.ended() == []
    assert router.statuses() == ["admitted", "failed"]
    report = router.reports[-1]
    assert (report["code"], report["seq"]) == ("execution_failed", 0)
    assert "no_such_thing" in report["reason"]


async def test_a_crash_is_handed_back_and_the_next_call_gets_a_new_process(agent, router):
    router.invoke("vanish", {"after": 0})
    assert await router.ended() == []
    assert router.statuses() == ["admitted", "failed"]
    assert (router.reports[-1]["code"], router.reports[-1]["seq"]) == ("node_lost", 0)
    router.invoke("vanish", {"after": 2}, task="t2")
    events = await router.ended("t2")
    assert all(event["event"] == "chunk" for event in events)
    assert router.reports[-1]["seq"] == len(events)


async def test_an_output_that_cannot_be_sent_is_an_error_and_the_next_call_runs(agent, router):
    router.invoke("nested", {"depth": 400})
    router.invoke("nested", {"depth": 1}, task="t2")
    (event,) = await router.ended()
    assert (event["event"], event["code"]) == ("error", "execution_failed")
    (second,) = await router.ended("t2")
    assert second["output"] == [[]]


async def test_a_program_in_a_session_of_its_own_dies_with_its_instance(agent, router, tmp_path):
    pid_file = tmp_path / "pid"
    router.invoke("orphan", {"pid_file": str(pid_file)})
    await router.ended()
    assert router.statuses() == ["admitted", "failed"]
    assert agent.load().functions["orphan"].instances == 0
    stat = Path(f"/proc/{pid_file.read_text()}/stat")  # gone, or a zombie until init looks
    assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] in "ZX"


async def test_a_crashing_function_is_paused_and_shown_as_degraded(make_agent, router):
    async with make_agent(backoff_s=60.0, backoff_limit_s=60.0) as agent:
        for number in range(3):
            router.invoke("vanish", task=f"t{number}")
            await router.ended(f"t{number}")
        assert router.reports[-1]["code"] == "overloaded"
        assert router.reports[-1]["retry_after_ms"] > 1000
        router.invoke("add", {"a": 1}, task="other")
        assert (await router.ended("other"))[-1]["output"] == 3
        assert agent.load().functions["vanish"].instances == 0


async def test_the_same_attempt_is_answered_again_and_never_run_twice(agent, router, tmp_path):
    router.invoke("add", {"a": 1})
    await router.ended()
    router.invoke("add", {"a": 1})
    first, second = await router.ended(times=2)
    assert first == second
    assert agent.counters.finished == 1
    assert agent.counters.duplicates == 1


async def test_a_forgotten_attempt_that_still_holds_its_instance_is_not_started_again(
    make_agent, router, tmp_path, eventually
):
    marker = tmp_path / "pid"
    async with make_agent(outcome_limit=1, cancel_grace_s=60.0) as agent:
        router.invoke("stubborn", {"marker": str(marker)})
        await eventually(lambda: marker.exists() and marker.read_text())
        router.control(verb="cancel", task="t1")
        await router.ended()
        router.invoke("nothing", task="t2")  # its outcome takes the place of the first
        await router.ended("t2")
        router.invoke("stubborn", {"marker": str(marker)})
        await eventually(lambda: agent.counters.duplicates == 1)
        assert (agent.load().running, agent.load().queued) == (1, 0)
        os.kill(int(marker.read_text()), signal.SIGKILL)


async def test_a_running_attempt_is_not_started_again(agent, router, tmp_path, eventually):
    marker = tmp_path / "pid"
    router.invoke("polite", {"marker": str(marker)})
    await eventually(marker.exists)
    router.invoke("polite", {"marker": str(marker)})
    await eventually(lambda: router.statuses() == ["admitted", "admitted"])
    router.control(verb="cancel", task="t1", reason="client")
    await router.ended()
    assert agent.counters.finished == 1


async def test_a_cancelled_task_ends_with_one_error(agent, router, tmp_path, eventually):
    marker = tmp_path / "pid"
    router.invoke("polite", {"marker": str(marker)})
    await eventually(marker.exists)
    router.control(verb="cancel", task="t1", client="pump-7", reason="client")
    (error,) = await router.ended()
    assert (error["code"], error["seq"]) == ("cancelled", 0)
    assert error["message"] == "the client cancelled the task"
    os.kill(int(marker.read_text()), 0)


async def test_a_task_can_be_cancelled_while_it_waits(agent, router, tmp_path, eventually):
    marker = tmp_path / "pid"
    router.invoke("polite", {"marker": str(marker)})
    await eventually(marker.exists)
    router.invoke("polite", {"marker": str(tmp_path / "never")}, task="t2")
    await eventually(lambda: router.statuses("t2") == ["admitted"])
    router.control(verb="cancel", task="t2", reason="client")
    (error,) = await router.ended("t2")
    assert error["code"] == "cancelled"
    assert not (tmp_path / "never").exists()
    router.control(verb="cancel", task="t1")
    await router.ended()


async def test_a_function_that_ignores_the_cancel_is_killed(agent, router, tmp_path, eventually):
    marker = tmp_path / "pid"
    router.invoke("stubborn", {"marker": str(marker)})
    await eventually(marker.exists)
    pid = int(marker.read_text())
    router.control(verb="cancel", task="t1", reason="client")
    (error,) = await router.ended()
    assert error["code"] == "cancelled"
    await eventually(lambda: not Path(f"/proc/{pid}").exists())
    assert not agent.load().functions["stubborn"].degraded
    # It ran that long at least, which the next ones are judged by.
    known = agent.forecast.predict("stubborn", Work(input_bytes=10), now=0)
    assert known.run_ms >= 1
    assert not known.sure


async def test_a_deadline_ends_a_run(agent, router, tmp_path):
    router.invoke("polite", {"marker": str(tmp_path / "pid")}, left_ms=600)
    (error,) = await router.ended()
    assert error["code"] == "deadline_exceeded"


async def test_the_functions_own_time_limit_ends_a_run(make_agent, router, tmp_path):
    limited = python("polite", limits={"timeout_ms": 500})
    async with make_agent((limited,)):
        router.invoke("polite", {"marker": str(tmp_path / "pid")})
        (error,) = await router.ended()
    assert error["code"] == "deadline_exceeded"
    assert error["detail"]["limit_ms"] == 500


async def test_a_deadline_ends_a_wait_in_the_queue(agent, router, tmp_path, eventually):
    marker = tmp_path / "pid"
    router.invoke("polite", {"marker": str(marker)})
    await eventually(marker.exists)
    # Long enough to reach the node in time however busy the machine is, or else it is refused.
    router.invoke("polite", {"marker": str(tmp_path / "never")}, task="t2", left_ms=2000)
    (error,) = await router.ended("t2")
    assert error["code"] == "deadline_exceeded"
    assert router.statuses("t2") == ["admitted", "finished"]
    router.control(verb="cancel", task="t1")
    await router.ended()


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        ({"function": "nothing"}, "no_capable_node"),
        ({"version": "9.0.0"}, "no_capable_node"),
        ({"left_ms": -1}, "deadline_exceeded"),
    ],
)
async def test_what_the_node_cannot_do_is_refused(agent, router, wrong, code):
    router.invoke(**{"function": "add", "value": {"a": 1}, **wrong})
    assert await router.ended() == []
    assert router.statuses() == ["refused"]
    assert router.reports[-1]["code"] == code


async def test_a_full_queue_refuses_with_a_time_to_come_back(
    make_agent, router, tmp_path, eventually
):
    async with make_agent(queue_limit=0):
        marker = tmp_path / "pid"
        router.invoke("polite", {"marker": str(marker)})
        await eventually(marker.exists)
        router.invoke("polite", {"marker": str(marker)}, task="t2")
        await router.ended("t2")
        assert router.reports[-1]["code"] == "overloaded"
        assert router.reports[-1]["retry_after_ms"] > 0
        router.control(verb="cancel", task="t1")
        await router.ended()


async def test_too_much_output_ends_the_task(agent, router):
    router.invoke("flood", {"size": 300})
    events = await router.ended()
    assert events[-1]["code"] == "too_large"
    assert sum(len(event["data"]) for event in events[:-1]) <= 1000


async def test_a_higher_attempt_silences_a_lower_one(agent, router, tmp_path, eventually):
    marker = tmp_path / "pid"
    router.invoke("polite", {"marker": str(marker)})
    await eventually(marker.exists)
    router.invoke("add", {"a": 1}, attempt=2)
    (result,) = await router.ended()
    assert (result["attempt"], result["event"]) == (2, "result")
    await eventually(lambda: agent.counters.dropped == 1)
    router.invoke("add", {"a": 1}, attempt=1, task="t1")
    router.invoke("add", {"a": 1}, task="t2")
    await router.ended("t2")
    assert len(router.of()) == 1


def ask(router, attempt: int | None = 1, task="t1"):
    router.control(verb="account", task=task, client="pump-7", attempt=attempt, sender="router-1")


async def test_a_node_tells_once_more_how_an_attempt_ended(agent, router, eventually):
    router.invoke("add", {"a": 1})
    (result,) = await router.ended()
    ask(router)
    assert await router.ended(times=2) == [result, result]
    ask(router, None)  # the latest one
    assert await router.ended(times=3) == [result, result, result]
    assert router.reports[-1]["seq"] == result["seq"] + 1
    assert agent.counters.finished == 1


async def test_a_node_is_asked_for_many_tasks_at_once(agent, router, eventually):
    router.invoke("add", {"a": 1})
    router.invoke("add", {"a": 2}, task="t2")
    (one,), (two,) = await router.ended(), await router.ended("t2")
    known = [("pump-7", name) for name in ("t1", "never", "t2")]
    router.control(verb="account", tasks=known, sender="router-1")
    assert await router.ended(times=2) == [one, one]
    assert await router.ended("t2", times=2) == [two, two]
    assert router.statuses("never") == []
    assert agent.counters.finished == 2


async def test_a_node_says_what_it_runs_and_what_it_does_not_know(
    agent, router, tmp_path, eventually
):
    marker = tmp_path / "pid"
    ask(router)
    await eventually(lambda: router.statuses() == ["unknown"])
    router.invoke("polite", {"marker": str(marker)}, attempt=2)
    await eventually(marker.exists)
    ask(router, 2)
    await eventually(lambda: router.statuses()[-1] == "running")
    assert router.reports[-1]["seq"] == 0
    ask(router, 3)
    await eventually(lambda: router.statuses()[-1] == "unknown")
    ask(router, None, task="t2")  # who has none does not answer
    ask(router, 2)
    await eventually(lambda: router.statuses()[-1] == "running")
    assert router.statuses("t2") == []
    assert agent.counters.finished == 0


async def test_what_a_node_called_unknown_does_not_begin_when_it_arrives(agent, router, eventually):
    ask(router, 2)  # it overtook the invocation on a slow line
    await eventually(lambda: router.statuses() == ["unknown"])
    for attempt in (1, 2):
        router.invoke("add", {"a": 1}, attempt=attempt)
    await eventually(lambda: router.statuses() == ["unknown", "failed", "failed"])
    assert {report["code"] for report in router.reports[1:]} == {"node_lost"}
    router.invoke("add", {"a": 1}, attempt=3)
    await eventually(router.of)
    (result,) = router.of()
    assert (result["event"], result["attempt"]) == ("result", 3)
    assert agent.counters.dropped == 2
    assert agent.counters.finished == 1


async def test_who_asked_for_an_attempt_hears_that_it_was_superseded(
    agent, router, tmp_path, eventually
):
    marker = tmp_path / "pid"
    router.invoke("polite", {"marker": str(marker)})
    await eventually(marker.exists)
    ask(router)
    await eventually(lambda: "running" in router.statuses())
    router.control(verb="cancel", task="t1", attempt=1, reason="superseded", sender="router-2")
    await eventually(lambda: router.statuses()[-1] == "failed")
    assert router.reports[-1]["code"] == "node_lost"
    ask(router)
    await eventually(lambda: router.statuses().count("failed") == 2)
    assert router.of() == []


@pytest.mark.parametrize(
    "payload",
    [b"", b"nonsense", b'{"task": "t"}', b"\xff\xfe", b"x" * 3_000_000],
)
async def test_bad_frames_are_counted_and_dropped(agent, router, topics, payload, eventually):
    router.session.post(topics.build(TopicKind.INVOKE, node=NODE), payload)
    router.session.post(topics.build(TopicKind.CONTROL, node=NODE), payload)
    await eventually(lambda: agent.bad_frames == 2)
    router.invoke("add", {"a": 1})
    await router.ended()


@pytest.mark.parametrize(
    "reply",
    ["foam/v1/local/reply/other/t1", "foam/v1/local/task/pump-7", "foam/v1/local/reply/pump-7/+"],
)
async def test_a_reply_topic_outside_the_clients_own_is_dropped(agent, router, reply, eventually):
    router.invoke("add", {"a": 1}, reply=reply)
    await eventually(lambda: agent.bad_frames == 1)
    assert router.reports == []


async def test_claims_are_signed_retained_and_withdrawn(make_agent, broker, topics, eventually):
    def retained(kind):
        return {
            topic: message.payload
            for topic, message in broker.retained.items()
            if topics.parse(topic).kind == kind
        }

    async with make_agent() as agent:
        await broker.settle()
        claims = retained(TopicKind.CAPABILITY)
        assert len(claims) == len(FUNCTIONS)
        for payload in claims.values():
            verify(payload, KEY.public)
            claim = json.loads(payload)
            assert (claim["node"], claim["epoch"]) == (NODE, agent.epoch)
            assert claim["expires_at"] > now_ms()
        (state,) = retained(TopicKind.NODE_STATE).values()
        assert json.loads(state)["state"] == "birth"
    await broker.settle()
    assert retained(TopicKind.CAPABILITY) == {}
    (state,) = retained(TopicKind.NODE_STATE).values()
    assert json.loads(state)["state"] == "offline"


async def test_claims_are_renewed_with_a_higher_revision(make_agent, broker, eventually):
    async with make_agent((FUNCTIONS[0],), claim_lease_s=1.0):
        await eventually(lambda: len(claims_of(broker, "add")) >= 3)
    orders = [json.loads(payload)["revision"] for payload in claims_of(broker, "add") if payload]
    assert orders == sorted(set(orders))


async def test_births_come_back_with_the_connection(agent, broker, topics, eventually):
    await broker.settle()
    before = claims_of(broker, "add")
    broker.retained.clear()
    broker.down()
    broker.up()
    await eventually(lambda: len(claims_of(broker, "add")) > len(before))
    assert claims_of(broker, "add")[-1] == before[-1]
    assert topics.build(TopicKind.NODE_STATE, node=NODE) in broker.retained


async def test_the_last_will_says_offline_with_the_epoch_of_the_births(agent, topics):
    will = agent.last_will()
    assert will.topic == topics.build(TopicKind.NODE_STATE, node=NODE)
    assert will.retain
    state = json.loads(will.payload)
    assert (state["state"], state["epoch"]) == ("offline", agent.epoch)


async def test_load_is_sent_at_once_when_the_node_becomes_busy(
    make_agent, router, broker, tmp_path, eventually
):
    def loads():
        return [json.loads(message.payload) for message in broker.published("+/+/+/node/+/load")]

    async with make_agent(load_interval_s=3600.0, load_gap_s=0.0):
        await eventually(loads)
        assert loads()[-1]["running"] == 0
        router.invoke("polite", {"marker": str(tmp_path / "pid")})
        await eventually(lambda: loads()[-1]["running"] == 1)
        assert loads()[-1]["functions"]["polite"]["running"] == 1
        router.control(verb="cancel", task="t1")
        await eventually(lambda: loads()[-1]["running"] == 0)


async def test_a_node_told_to_drain_refuses_until_undrained(agent, router, eventually):
    router.control(verb="drain", reason="maintenance")
    router.invoke("add", {"a": 1})
    await router.ended()
    assert router.reports[-1]["code"] == "overloaded"
    router.control(verb="undrain")
    router.invoke("add", {"a": 1}, task="t2")
    assert (await router.ended("t2"))[-1]["output"] == 3


async def test_leaving_lets_what_runs_finish(make_agent, router, tmp_path, eventually):
    folder = tmp_path / "folder"
    folder.mkdir()
    async with make_agent((python("meet"),)):
        router.invoke("meet", {"name": "a", "folder": str(folder), "parties": 2})
        await eventually((folder / "a").exists)
        (folder / "b").touch()
    (result,) = await router.ended()
    assert result["output"] == ["a", "b"]


async def test_a_node_that_is_being_left_takes_nothing_whoever_says_so(
    make_agent, router, tmp_path, eventually
):
    folder = tmp_path / "folder"
    folder.mkdir()
    agent = make_agent((python("meet"), python("add")))
    await agent.start()
    async with asyncio.TaskGroup() as tasks:
        router.invoke("meet", {"name": "a", "folder": str(folder), "parties": 2})
        await eventually((folder / "a").exists)
        tasks.create_task(agent.stop())
        await eventually(lambda: not agent.running)
        router.control(verb="undrain")
        router.invoke("add", {"a": 1}, task="t2")
        await router.ended("t2")
        (folder / "b").touch()
    assert router.statuses("t2") == ["refused"]
    assert router.statuses("t1") == ["admitted", "finished"]


async def test_leaving_hands_back_what_does_not_finish(make_agent, router, tmp_path, eventually):
    marker = tmp_path / "pid"
    async with make_agent(drain_timeout_s=0.05):
        router.invoke("stubborn", {"marker": str(marker)})
        await eventually(marker.exists)
        router.invoke("stubborn", {"marker": str(marker)}, task="t2")
        await eventually(lambda: router.statuses("t2") == ["admitted"])
    for task in ("t1", "t2"):
        assert await router.ended(task) == []
        assert router.statuses(task) == ["admitted", "failed"]
    assert not Path(f"/proc/{marker.read_text()}").exists()


async def test_a_node_that_is_cut_off_drops_what_it_runs(
    make_agent, router, broker, tmp_path, eventually
):
    marker = tmp_path / "pid"
    async with make_agent(cut_off_s=0.01) as agent:
        router.invoke("polite", {"marker": str(marker)})
        await eventually(marker.exists)
        broker.down()
        await eventually(lambda: agent.counters.dropped == 1)
        broker.up()
        router.invoke("add", {"a": 1}, task="t2")
        await router.ended("t2")
    assert router.of() == []


async def test_instances_of_equal_models_are_shared(make_agent, router, eventually):
    talk = FUNCTIONS[-1]
    advise = talk.model_copy(update={"name": "advise", "options": {"max_tokens": 2}})
    async with make_agent((talk, advise)) as agent:
        router.invoke("talk", text="What should I do? pump-3 flow keeps falling.")
        router.invoke("advise", text="What should I do? pump-3 flow keeps falling.", task="t2")
        long, short = (await router.ended()), (await router.ended("t2"))
        assert short[-1]["usage"]["output_tokens"] == 2
        assert long[-1]["output"].startswith(short[-1]["output"])
        assert agent.load().functions["talk"].instances == 1


async def test_nothing_stays_behind_when_an_agent_is_killed(tmp_path, eventually):
    script = tmp_path / "agent.py"
    marker = tmp_path / "pid"
    script.write_text(KILLED_AGENT)
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(script), str(ROOT), str(WORKSHOP), str(marker)
    )
    await eventually(lambda: marker.exists() and marker.read_text())
    child = int(marker.read_text())
    process.send_signal(signal.SIGKILL)
    await process.wait()
    await eventually(lambda: not Path(f"/proc/{child}").exists())


KILLED_AGENT = """
import asyncio, sys
sys.path.insert(0, sys.argv[1])
from capability_schemas.functions import FunctionSpec
from node_agent.runtimes.base import Request, RuntimeContext
from node_agent.runtimes.python import PythonRuntime

async def main():
    spec = FunctionSpec(name="stubborn", description="d", entry=sys.argv[2] + ":stubborn")
    instance = await PythonRuntime(RuntimeContext()).start(spec, died=lambda _: None)
    async for _ in instance.invoke(Request(id="r", input={"marker": sys.argv[3]}, text=None)):
        pass

asyncio.run(main())
"""


@pytest.mark.broker
async def test_over_a_real_broker_with_its_access_rules(embedded_site, eventually):
    topics = embedded_site.topics
    epoch = now_ms()
    will = offline_will(topics=topics, node=NODE, epoch=epoch, at=epoch)
    async with (
        MqttSession(settings=embedded_site.settings("router-1")) as routers,
        MqttSession(settings=embedded_site.settings("edge-1"), will=will) as nodes,
        MqttSession(settings=embedded_site.settings("watcher-1")) as watchers,
    ):
        router = Router(routers, topics, eventually)
        watcher = Router(watchers, topics, eventually)
        for session in (routers, watchers):
            await session.wait_connected(10)
        await router.listen()
        states = []

        async def on_state(message):
            states.append(json.loads(message.payload)["state"])

        await watchers.subscribe(topics.filter(TopicKind.NODE_STATE, node=NODE), on_state)
        settings = NodeSettings(node=NODE)
        agent = NodeAgent(
            session=nodes, topics=topics, settings=settings, functions=FUNCTIONS[:2], epoch=epoch
        )
        async with agent:
            await nodes.wait_connected(10)
            await eventually(lambda: "birth" in states)
            router.invoke("words", text="the pump is fine", task="real-1")
            await router.ended("real-1")
            await eventually(lambda: router.of("real-1")[-1:] and is_terminal(router.of("real-1")))
            assert router.of("real-1")[-1]["output"] == "the pump is fine "
        await eventually(lambda: states[-1] == "offline")
        assert watcher.reports == []


def is_terminal(events):
    return events[-1]["event"] in ("result", "error")


async def test_waiting_for_warm_functions_ends_when_their_instances_run(make_agent, router):
    loads = []

    async def on_load(message):
        loads.append(json.loads(message.payload)["functions"])

    await router.session.subscribe(router.topics.filter(TopicKind.NODE_LOAD), on_load)
    functions = (python("add", warm=True), python("words"), python("missing", warm=True))
    async with make_agent(functions) as agent:
        assert await agent.wait_warm(20.0), "a function that cannot start must not hold the others"
        await router.eventually(lambda: loads and loads[-1]["add"]["instances"] == 1)
        assert loads[-1]["words"]["instances"] == 0


SHOP = """
import os
import time
from pathlib import Path

def slow(marker: str, until: str) -> str:
    Path(marker + ".new").write_text(str(os.getpid()))
    os.rename(marker + ".new", marker)
    while not Path(until).exists():
        time.sleep(0.01)
    return "{answer}"
"""


class Shop:
    """A Python file with one function, edited while a node runs it."""

    def __init__(self, folder):
        self.folder = folder
        self.marker, self.until = folder / "marker", folder / "until"
        self.write("old")

    def write(self, answer):
        (self.folder / "shop.py").write_text(SHOP.replace("{answer}", answer))

    def functions(self, *more, **fields):
        table = {"name": "slow", "description": "slow", "entry": "shop.py:slow", **fields}
        lines = [f"{name} = {json.dumps(value)}\n" for name, value in table.items()]
        lines += ["input_schema = {}\n", *more]
        path = self.folder / "node.toml"
        path.write_text("[[function]]\n" + "".join(lines))
        return load_declaration(path).functions

    def call(self):
        self.marker.unlink(missing_ok=True)
        return {"marker": str(self.marker), "until": str(self.until)}


@pytest.fixture
def shop(tmp_path):
    return Shop(tmp_path)


async def test_running_work_ends_on_the_old_code_and_the_next_runs_the_new(
    make_agent, router, shop, eventually
):
    async with make_agent(shop.functions()) as agent:
        router.invoke("slow", shop.call())
        await eventually(shop.marker.exists)
        shop.write("new")
        await agent.replace(shop.functions())
        old_process = Path("/proc") / shop.marker.read_text()
        assert old_process.exists()
        shop.until.touch()
        (first,) = await router.ended("t1")
        router.invoke("slow", shop.call(), task="t2")
        (second,) = await router.ended("t2")
        assert (first["output"], second["output"]) == ("old", "new")
        await eventually(lambda: not old_process.exists())
        assert agent.load().functions["slow"].instances == 1


async def test_work_that_waits_is_run_though_its_function_is_gone(
    make_agent, router, shop, eventually
):
    other = python("add")
    async with make_agent((*shop.functions(), other)) as agent:
        router.invoke("slow", shop.call())
        await eventually(shop.marker.exists)
        router.invoke("slow", shop.call(), task="t2")
        await eventually(lambda: router.statuses("t2") == ["admitted"])
        await agent.replace([other])
        router.invoke("slow", shop.call(), task="t3")
        await router.ended("t3")
        assert router.reports[-1]["status"] == "refused"
        shop.until.touch()
        (first,) = await router.ended("t1")
        (second,) = await router.ended("t2")
        assert first["output"] == second["output"] == "old"
        assert list(agent.load().functions) == ["add"]


async def test_a_new_set_of_functions_is_claimed_and_what_is_gone_is_withdrawn(
    make_agent, router, broker, shop, eventually
):
    async with make_agent((*shop.functions(), python("add"))) as agent:
        await eventually(lambda: claims_of(broker, "add") and claims_of(broker, "slow"))
        await agent.replace([python("add", version="1.1.0"), python("words")])
        await eventually(lambda: claims_of(broker, "words"))
        assert claims_of(broker, "slow")[-1] == b""
        first, *_, last = (json.loads(payload) for payload in claims_of(broker, "add"))
        assert (first["version"], last["version"]) == ("1.0.0", "1.1.0")
        assert last["epoch"] == first["epoch"]
        assert last["revision"] > first["revision"]
        router.invoke("words", text="all is well")
        assert (await router.ended())[-1]["output"] == "all is well "


async def test_functions_that_cannot_run_change_nothing(make_agent, router, broker, shop):
    async with make_agent((python("add"),)) as agent:
        await router.eventually(lambda: claims_of(broker, "add"))
        wrong = [python("add", entry="no.py:add"), python("words", options={"x": 1})]
        with pytest.raises(ConfigurationError) as raised:
            await agent.replace(wrong)
        first, second = raised.value.message.splitlines()
        assert "no.py does not exist" in first
        assert "options" in second
        with pytest.raises(ConfigurationError, match="'abacus' is unknown"):
            await agent.replace([python("add", runtime="abacus")])
        with pytest.raises(ConfigurationError, match="share a name"):
            await agent.replace([python("add"), python("add")])
        router.invoke("add", {"a": 1})
        (result,) = await router.ended()
        assert result["output"] == 3
        assert claims_of(broker, "words") == []
        assert list(agent.load().functions) == ["add"]


async def test_edited_files_reach_the_node_by_themselves(make_agent, router, shop, eventually):
    source = shop.folder / "node.toml"
    functions = shop.functions()
    taken_up = []
    async with make_agent(functions) as agent:

        async def apply(declaration):
            await agent.replace(declaration.functions)
            taken_up.extend(declaration.functions)

        watch = SourceWatch(
            node=NODE,
            files=load_declaration(source).files,
            read=partial(read_declaration, source),
            apply=apply,
            poll_s=0.05,
        )
        shop.until.touch()
        async with watch:
            shop.write("new")
            await eventually(lambda: taken_up != [])
        (spec,) = taken_up
        assert spec.code != functions[0].code
        router.invoke("slow", shop.call())
        (result,) = await router.ended()
        assert result["output"] == "new"


async def test_a_warm_function_starts_again_after_an_edit(make_agent, shop, eventually):
    async with make_agent(shop.functions(warm=True)) as agent:
        assert await agent.wait_warm(60)
        shop.write("new")
        await agent.replace(shop.functions(warm=True))
        assert await agent.wait_warm(60)
        assert agent.load().functions["slow"].instances == 1


async def test_what_calls_have_shown_is_claimed(agent, router, broker, eventually):
    router.invoke("add", {"a": 1})
    await router.ended()
    router.invoke("add", {"a": 1}, task="t2")
    await router.ended("t2")
    await eventually(lambda: "first_ms" in json.loads(claims_of(broker, "add")[-1])["resources"])


ASKED = "Extract JSON: The humidity of greenhouse-7 is 48 %."


def going_on(shown, **fields):
    return {"attempt": 2, "seq": 3, "continuation": {"shown": shown, "chunks": 3}, **fields}


def text_of(chunks):
    return "".join(event["data"] for event in chunks)


@pytest.mark.llm
async def test_the_model_goes_on_behind_a_text_exactly_as_if_it_had_written_it(agent, router):
    router.invoke("talk", text=ASKED, task="whole")
    whole = (await router.ended("whole"))[-1]
    for at in range(1, len(whole["output"]) + 1):  # within tokens, too
        shown = whole["output"][:at]
        router.invoke("talk", text=ASKED, task=f"t{at}", **going_on([shown]))
        *chunks, result = await router.ended(f"t{at}")
        assert shown + text_of(chunks) == whole["output"]
        assert result["output"] == whole["output"]
        assert result["digest"] == whole["digest"]
        assert result["usage"] == whole["usage"]
        assert [event["seq"] for event in (*chunks, result)] == list(range(3, 4 + len(chunks)))
        assert result["attempt"] == 2


@pytest.mark.llm
async def test_the_model_goes_on_behind_a_text_that_it_would_not_have_written(agent, router):
    router.invoke("talk", text=ASKED, **going_on(['{"device": "pump-1'], seq=1))
    *chunks, result = await router.ended()
    assert result["output"].startswith('{"device": "pump-1')
    assert '{"device": "pump-1' + text_of(chunks) == result["output"]


async def test_a_function_says_it_again_and_shows_only_what_is_new(agent, router):
    router.invoke("recite", {"lines": 4}, **going_on(["line 0\nline 1\nli"]))
    *chunks, result = await router.ended()
    assert text_of(chunks) == "ne 2\nline 3\n"
    assert result["output"] == "line 0\nline 1\nline 2\nline 3\n"
    assert [event["seq"] for event in router.of()] == list(range(3, 4 + len(chunks)))


@pytest.mark.parametrize("shown", ["line 0\nlime", "line 0\nline 1\nline 2\nline 3\nline 4"])
async def test_a_function_that_says_something_else_is_found_out(agent, router, shown):
    router.invoke("recite", {"lines": 4}, **going_on([shown]))
    (error,) = await router.ended()
    assert (error["code"], error["seq"]) == ("execution_failed", 3)
    assert 'continues = "skip"' in error["message"]


async def test_a_function_that_cannot_go_on_says_so(agent, router):
    router.invoke("words", text="a b c", **going_on(["a "]))
    (error,) = await router.ended()
    assert error["code"] == "execution_failed"
    assert "cannot go on" in error["message"]


async def test_a_held_answer_goes_to_the_router_only(agent, router):
    router.invoke("words", text="a b c", attempt=2, hold=True)
    await router.eventually(lambda: "held" in router.statuses())
    (report,) = [one for one in router.reports if one["status"] == "held"]
    assert report["output"] == "a b c "
    assert router.of() == []


async def test_an_answer_too_large_to_be_held_is_given_up(agent, router):
    router.invoke("recite", {"lines": 30_000}, hold=True)
    await router.ended()
    assert router.statuses()[-1] == "failed"
    assert router.reports[-1]["code"] == "too_large"
    assert router.of() == []


async def test_a_node_that_was_overtaken_gives_the_task_back(agent, router, tmp_path, eventually):
    marker = tmp_path / "begun"
    router.invoke("polite", {"marker": str(marker)})
    await eventually(marker.exists)
    router.control(verb="cancel", task="t1", reason="overtaken")
    await router.ended()
    assert router.statuses()[-1] == "failed"
    assert "overtaken" in router.reports[-1]["reason"]
    assert router.of() == []


async def test_a_node_that_has_shown_something_is_not_overtaken(agent, router, eventually):
    router.invoke("recite", {"lines": 40, "pause_s": 0.01})
    await eventually(router.of)
    router.control(verb="cancel", task="t1", reason="overtaken")
    events = await router.ended()
    assert events[-1]["event"] == "result"
