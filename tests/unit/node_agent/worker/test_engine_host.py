"""The host of an engine: from invocations to prompts, and from endings to frames."""

import threading

import pytest

from node_agent.worker.base import InvocationError, Request
from node_agent.worker.engine_host import EngineHost, make_prompt
from node_agent.worker.engines.base import Completion
from node_agent.worker.frames import pack

TOOL = {"type": "function", "function": {"name": "read", "parameters": {"type": "object"}}}


class Engine:
    """Says what it is told to, job by job."""

    info = {"slots": 3, "context_tokens": 64}  # noqa: RUF012 - a double, never changed

    def __init__(self):
        self.jobs = []
        self.stopped = threading.Event()

    def submit(self, job):
        self.jobs.append(job)

    def run(self):
        self.stopped.wait(20)

    def stop(self):
        self.stopped.set()

    def answer(self, text, end=None, number=0):
        job = self.jobs[number]
        job.prompt()
        for letter in text:
            job.on_text(letter)
        job.on_end(end or Completion(finish="stop", input_tokens=4, output_tokens=2))


@pytest.fixture
def engine():
    return Engine()


@pytest.fixture
def frames():
    return []


@pytest.fixture
def host(engine, frames):
    def load(name, options):
        assert (name, options.parallel) == ("auto", 3)
        assert options.lora == (("a.gguf", 0.5),)
        return "double", engine, ["llama_cpp: not here"]

    made = EngineHost(
        options={
            "model": "m.gguf",
            "parallel": 3,
            "lora": [{"path": "a.gguf", "scale": 0.5}],
        },
        emit=frames.append,
        load=load,
    )
    info = made.load()
    assert info == {
        "engine": "double",
        "passed_over": ["llama_cpp: not here"],
        "slots": 3,
        "context_tokens": 64,
    }
    return made


def request(text="hello", **options):
    return Request(id="r", input={}, text=text, options=options, session="s")


def test_an_answer_ends_with_its_counts_its_confidence_and_its_times(host, engine, frames):
    host.submit(request())
    engine.answer(
        "fine",
        Completion(
            input_tokens=9,
            output_tokens=3,
            finish="stop",
            cached_tokens=5,
            confidence=0.75,
            prefill_ms=1.5,
            decode_ms=2.5,
        ),
    )
    *pieces, final = frames
    assert "".join(piece["d"] for piece in pieces) == "fine"
    assert final == {
        "t": "final",
        "id": "r",
        "output": "fine",
        "usage": {"input_tokens": 9, "output_tokens": 3, "cached_tokens": 5},
        "finish": "stop",
        "confidence": 0.75,
        "timing": {"prefill_ms": 1.5, "decode_ms": 2.5},
    }


def test_json_is_parsed_and_json_cut_off_is_an_error(host, engine, frames):
    host.submit(request(parse=True))
    engine.answer('{"a": 1}')
    assert frames[-1]["output"] == {"a": 1}
    host.submit(request(parse=True))
    engine.answer('{"a": ', Completion(finish="length"), number=1)
    assert frames[-1]["code"] == "execution_failed"
    assert "cut off by max_tokens" in frames[-1]["message"]


def test_a_call_with_tools_streams_nothing_and_ends_in_calls(host, engine, frames):
    messages = [
        {"role": "user", "content": "read it twice"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "call_1", "function": {}}]},
        {"role": "tool", "tool_call_id": "call_1", "content": "7"},
    ]
    host.submit(request(tools=[TOOL], messages=messages))
    engine.answer('{"tool": "read", "arguments": {"n": 2}}')
    (final,) = frames
    assert final["finish"] == "tool_calls"
    assert final["output"] == {
        "content": None,
        "tool_calls": [{"id": "call_2", "name": "read", "arguments": {"n": 2}}],
    }
    host.submit(request(tools=[TOOL]))
    engine.answer('{"answer": "seven"}', number=1)
    assert frames[-1]["output"] == {"content": "seven", "tool_calls": []}
    assert frames[-1]["finish"] == "stop"


@pytest.mark.parametrize(
    ("end", "code", "words"),
    [
        (Completion(finish="cancelled"), "cancelled", "cancelled"),
        (InvocationError("invalid_task", "too long", tokens=9), "invalid_task", "too long"),
        (ZeroDivisionError("oh"), "execution_failed", "ZeroDivisionError: oh"),
    ],
)
def test_bad_ends_become_errors(host, engine, frames, end, code, words):
    host.submit(request())
    engine.answer("", end)
    (frame,) = frames
    assert (frame["t"], frame["id"], frame["code"]) == ("error", "r", code)
    assert words in frame["message"]


def test_a_cancel_reaches_the_job_of_its_call_only(host, engine):
    first, second = request(), request()
    second.id = "other"
    host.submit(first)
    host.submit(second)
    host.cancel("other")
    host.cancel("nobody")
    assert [job.cancelled.is_set() for job in engine.jobs] == [False, True]


def test_serving_ends_with_close(host):
    thread = threading.Thread(target=host.serve)
    thread.start()
    host.close()
    thread.join(20)
    assert not thread.is_alive()


def test_a_conversation_takes_the_place_of_the_template():
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    prompt = make_prompt(
        request(messages=messages, system="ignored", template="ignored", seed=3, top_k=0)
    )
    assert prompt.messages == messages
    assert (prompt.seed, prompt.top_k, prompt.session) == (3, 0, "s")
    with pytest.raises(InvocationError, match="messages"):
        make_prompt(request(messages="hi"))


def test_tools_bring_their_schema_and_their_form():
    prompt = make_prompt(request(tools=[TOOL], tools_template="{names}", schema={"enum": [1]}))
    assert prompt.tools_template == "{names}"
    assert prompt.tools[0]["name"] == "read"
    assert prompt.schema is not None
    assert "anyOf" in prompt.schema


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"parse": True}, "[" * 100_000),  # deeper than can be read
        ({"parse": True}, "NaN"),  # read, and not to be written again
        ({"tools": [TOOL]}, "7"),  # an engine without a strict grammar
        ({"tools": [TOOL]}, '{"tool": "read"}'),
    ],
)
def test_an_answer_that_cannot_be_used_ends_one_call(engine, options, said):
    sent = []

    def emit(frame):
        pack(frame)
        sent.append(frame)

    host = EngineHost(
        options={"model": "m.gguf"}, emit=emit, load=lambda _name, _options: ("x", engine, [])
    )
    host.load()
    host.submit(request(**options))
    engine.answer(said)
    assert (sent[-1]["t"], sent[-1]["code"]) == ("error", "execution_failed")
    host.submit(request())
    engine.answer("fine", number=1)
    assert sent[-1]["output"] == "fine"


def test_a_prepare_that_breaks_is_the_functions_fault(tmp_path):
    path = tmp_path / "words.py"
    path.write_text("def prepare(given):\n    raise OSError('no table of words')\n")
    with pytest.raises(InvocationError, match="no table of words") as raised:
        make_prompt(request(prepare=f"{path}:prepare"))
    assert raised.value.code == "execution_failed"
