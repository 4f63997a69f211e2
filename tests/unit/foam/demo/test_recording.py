import gzip
import json
import threading
from pathlib import Path

import pytest

from capability_schemas.errors import ConfigurationError
from capability_schemas.task import TASK_LIMIT_BYTES, decode_task
from foam.demo import numeric, phrasing
from foam.demo.device import Script
from foam.demo.record import make_plant, write_recording
from foam.demo.recording import DEFAULT_RECORDING, Truth, judge, load_recording
from node_agent.declaration import load_declaration
from node_agent.worker.engines import load_engine
from node_agent.worker.engines.base import EngineOptions, Prompt

PLANT = Path(numeric.__file__).parent / "plant"


@pytest.fixture(scope="module")
def lines():
    text = gzip.decompress(DEFAULT_RECORDING.read_bytes()).splitlines()
    return [json.loads(line) for line in text]


@pytest.fixture(scope="module")
def recording():
    return load_recording()


def test_recording_is_what_the_script_makes(tmp_path):
    size = write_recording(make_plant(), tmp_path / "plant.jsonl.gz")
    assert size < 400_000
    made = gzip.decompress((tmp_path / "plant.jsonl.gz").read_bytes())
    assert made == gzip.decompress(DEFAULT_RECORDING.read_bytes())


def test_every_task_has_a_truth_and_fits_the_protocol(lines, recording):
    assert recording.texts.keys() == recording.truths.keys()
    assert 24 <= len(recording.texts) <= 40
    for device in recording.devices:
        script = Script(str(DEFAULT_RECORDING), device)
        for task in script.tasks:
            body = {"text": task["text"], "input": script.data(task.get("input"))}
            payload = json.dumps(body).encode()
            assert len(payload) < TASK_LIMIT_BYTES
            assert decode_task(payload).text == task["text"]


def test_every_truth_names_a_declared_function(recording):
    declared = set()
    for path in PLANT.glob("*.toml"):
        declaration = load_declaration(path)
        declared |= {(declaration.node, spec.name) for spec in declaration.functions}
    assert {(truth.node, truth.function) for truth in recording.truths.values()} <= declared


def test_no_task_is_word_for_word_an_advertised_example(recording):
    advertised = {
        example.lower()
        for path in PLANT.glob("*.toml")
        for spec in load_declaration(path).functions
        for example in spec.examples
    }
    assert not advertised & {text.lower() for text in recording.texts.values()}


def test_numeric_functions_find_what_was_planted(recording):
    asked = 0
    for device in recording.devices:
        script = Script(str(DEFAULT_RECORDING), device)
        for task in script.tasks:
            truth = recording.truths[task["id"]]
            if truth.node != "edge-numeric":
                continue
            output = getattr(numeric, truth.function)(**script.data(task["input"]))
            verdict = judge(truth, node=truth.node, function=truth.function, output=output)
            assert verdict.right, (task["id"], verdict.reason)
            asked += 1
    assert asked >= 10


def test_shipped_model_answers_every_language_task(recording):
    specs = {spec.name: spec for spec in load_declaration(PLANT / "edge-llm.toml").functions}
    model = specs["advise"].model
    _, engine, _ = load_engine("auto", EngineOptions(model=str(model), n_ctx=512))
    asked = 0
    for task, truth in recording.truths.items():
        if truth.node != "edge-llm":
            continue
        options = specs[truth.function].options
        prepare = getattr(phrasing, options["prepare"].partition(":")[2])
        pieces: list[str] = []
        prompt = Prompt(
            messages=[{"role": "user", "content": prepare({"text": recording.texts[task]})}],
            max_tokens=options["max_tokens"],
            schema=specs[truth.function].output_schema if options.get("json_output") else None,
        )
        engine.generate(prompt, pieces.append, threading.Event())
        output = "".join(pieces)
        if options.get("json_output"):
            output = json.loads(output)
        verdict = judge(truth, node=truth.node, function=truth.function, output=output)
        assert verdict.right, (task, verdict.reason)
        asked += 1
    assert asked >= 12


TRUTH = Truth(
    task="t",
    node="n",
    function="f",
    why="",
    checks=(
        {"path": "a.b", "equals": 1},
        {"path": "x", "near": 2.0, "within": 0.1},
        {"path": "s", "contains": "Stop"},
    ),
)
GOOD = {"a": {"b": 1}, "x": 2.05, "s": "please stop it"}


def test_right_answer_from_the_right_place_is_right():
    assert judge(TRUTH, node="n", function="f", output=GOOD).right


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"a": {"b": 2}}, "a.b is 2, not 1"),
        ({"a": 5}, "a.b is None"),
        ({"x": 2.2}, "x is 2.2"),
        ({"x": float("nan")}, "x is nan"),
        ({"x": True}, "x is True"),
        ({"s": "go on"}, "without 'Stop'"),
        ({"s": None}, "without 'Stop'"),
    ],
)
def test_wrong_answer_is_wrong_and_says_why(change, reason):
    verdict = judge(TRUTH, node="n", function="f", output=GOOD | change)
    assert not verdict.right
    assert reason in verdict.reason


@pytest.mark.parametrize(("node", "function"), [("m", "f"), ("n", "g"), (None, None)])
def test_right_answer_from_the_wrong_place_is_wrong(node, function):
    assert not judge(TRUTH, node=node, function=function, output=GOOD).right


def test_check_without_condition_is_never_right():
    empty = Truth(task="t", node="n", function="f", why="", checks=({"path": ""},))
    assert not judge(empty, node="n", function="f", output=GOOD).right


def test_damaged_recording_is_refused(tmp_path):
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(b"no gzip")
    with pytest.raises(ConfigurationError, match="no recording"):
        load_recording(path)
    path.write_bytes(gzip.compress(b'{"kind":"shift"}\n'))
    with pytest.raises(ConfigurationError, match="no recording"):
        load_recording(path)


def test_clock_counts_from_the_start_of_the_shift(recording):
    task = min(recording.at_s, key=lambda one: recording.at_s[one])
    assert recording.clock(task) == "06:05"
