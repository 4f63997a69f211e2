"""Many answers at a time from the shipped model: the same ones as one after another."""

import json
import random
import threading
from pathlib import Path
from typing import Any

import pytest

from node_agent.worker.base import InvocationError
from node_agent.worker.engines.base import EngineOptions, Job, Prompt

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

from llama_cpp import llama_cpp as native

from node_agent.worker.engines.llama_cpp import LlamaCppEngine

pytestmark = pytest.mark.llm

MODEL = Path(__file__).parents[2] / "foam" / "models" / "foam-tiny-2.6m-q8_0.gguf"
QUESTIONS = [
    "Extract JSON: The humidity of greenhouse-7 is 48 %.",
    "What should I do? the vibration of pump-3 is too high.",
    "Trend of 20 24 29 35?",
    "Extract JSON: pump-3 reports flow 31 l/min",
    "MQTT topic for noise of fan-2 at yard?",
    "What can you do?",
    "Classify the severity: fan-2 noise 96 dB, warning at 85, critical at 100.",
    "Convert 5.2 bar to kPa.",
]
LIST = {
    "type": "array",
    "items": {"enum": ["ok", "warning", "critical"]},
    "minItems": 30,
    "maxItems": 30,
}


class Call:
    def __init__(self, text, **given):
        self.parts: list[str] = []
        self.ends: list[Any] = []
        self.cancelled = threading.Event()
        given = {"max_tokens": 80, **given}
        self.prompt = Prompt(messages=[{"role": "user", "content": text}], **given)
        self.job = Job(
            prompt=lambda: self.prompt,
            on_text=self.parts.append,
            on_end=self.ends.append,
            cancelled=self.cancelled,
        )

    @property
    def text(self):
        return "".join(self.parts)

    @property
    def end(self):
        (end,) = self.ends
        return end


@pytest.fixture
def engine():
    made = LlamaCppEngine(EngineOptions(model=str(MODEL), parallel=8, n_batch=64))
    yield made
    made.close()


def work(engine, *calls):
    for call in calls:
        engine.submit(call.job)
    while engine.scheduler.step():
        pass
    return calls


def one_by_one(engine, questions, **given):
    return [work(engine, Call(question, **given))[0].text for question in questions]


def cells(engine):
    """How many tokens the native memory holds for each sequence."""
    memory = native.llama_get_memory(engine._backend.context)
    return [native.llama_memory_seq_pos_max(memory, number) + 1 for number in range(8)]


def test_answers_made_together_are_those_made_one_by_one(engine):
    alone = one_by_one(engine, QUESTIONS)
    together = work(engine, *map(Call, QUESTIONS))
    assert [call.text for call in together] == alone
    assert json.loads(alone[0])["device"] == "greenhouse-7"
    assert cells(engine) == [len(held) for held in engine.scheduler.held]


def test_a_cancelled_answer_leaves_the_others_as_they_would_be(engine):
    alone = one_by_one(engine, QUESTIONS)
    calls = [Call(question) for question in QUESTIONS]
    victim = calls[3]
    take = victim.parts.append

    def take_three(text):
        take(text)
        if len(victim.parts) == 3:
            victim.cancelled.set()

    victim.job.on_text = take_three
    work(engine, *calls)
    assert victim.end.finish == "cancelled"
    assert len(victim.parts) == 3
    others = [call.text for call in calls if call is not victim]
    assert others == [text for at, text in enumerate(alone) if at != 3]


def test_prompts_of_many_pieces_come_out_the_same_beside_others(engine):
    long = "Summarise: a-1 flow 3 l/min; b-2 flow 9 l/min; c-3 flow 5 l/min. " * 6
    (alone,) = work(engine, Call(long))
    assert alone.end.input_tokens > 128
    calls = [Call(question) for question in QUESTIONS[:4]]
    for call in calls:
        engine.submit(call.job)
    engine.scheduler.step()
    fresh = LlamaCppEngine(EngineOptions(model=str(MODEL), parallel=8, n_batch=64))
    beside = Call(long)
    for question in QUESTIONS[:4]:
        fresh.submit(Call(question).job)
    fresh.scheduler.step()
    work(fresh, beside)
    fresh.close()
    work(engine)
    assert beside.text == alone.text


def test_a_shared_system_text_is_decoded_once_and_changes_nothing(engine):
    def asked(question, session):
        call = Call(question, session=session)
        system = {"role": "system", "content": "You watch a plant of pumps, fans and ovens. " * 4}
        call.prompt = Prompt(
            messages=[system, {"role": "user", "content": question}],
            max_tokens=60,
            session=session,
        )
        return call

    cold = []
    for question in QUESTIONS[:3]:
        fresh = LlamaCppEngine(EngineOptions(model=str(MODEL)))
        cold += work(fresh, asked(question, None))
        fresh.close()
    warm = [work(engine, asked(q, f"s{at}"))[0] for at, q in enumerate(QUESTIONS[:3])]
    assert [call.text for call in warm] == [call.text for call in cold]
    assert [call.end.cached_tokens for call in cold] == [0, 0, 0]
    assert warm[0].end.cached_tokens == 0
    assert all(call.end.cached_tokens > 40 for call in warm[1:])
    again = work(engine, asked(QUESTIONS[0], "s0"))[0]
    assert again.end.cached_tokens == again.end.input_tokens - 1
    assert again.text == warm[0].text


def test_a_grammar_a_stop_text_a_seed_and_a_limit_hold_side_by_side(engine):
    free = {"temperature": 1.2, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 11}
    bound, stopped, short, long, drawn = work(
        engine,
        Call("List", schema=LIST, max_tokens=300),
        Call(QUESTIONS[0], stop=("humidity",)),
        Call(QUESTIONS[0], max_tokens=3),
        Call("too long " * 1000),
        Call("Tell me something", **free),
    )
    assert len(json.loads(bound.text)) == 30
    assert stopped.text == '{"device": "greenhouse-7", "metric": "'
    assert short.end.finish == "length"
    assert isinstance(long.end, InvocationError)
    assert "context holds 512" in long.end.message
    again = LlamaCppEngine(EngineOptions(model=str(MODEL)))
    assert work(again, Call("Tell me something", **free))[0].text == drawn.text
    again.close()


def test_two_hundred_calls_with_cancels_leak_no_sequence(engine):
    rng = random.Random(5)
    calls = []
    for number in range(200):
        given: dict[str, Any] = {"session": f"s{rng.randrange(12)}"} if rng.random() < 0.6 else {}
        if rng.random() < 0.2:
            given["schema"] = LIST
        if rng.random() < 0.2:
            given |= {"temperature": 0.9, "seed": number}
        call = Call(rng.choice(QUESTIONS), **given)
        calls.append(call)
        engine.submit(call.job)
        for _ in range(rng.randrange(6)):
            engine.scheduler.step()
        if rng.random() < 0.3:
            rng.choice(calls).cancelled.set()
    work(engine)
    assert all(len(call.ends) == 1 for call in calls)
    finishes = [call.end.finish for call in calls]
    assert set(finishes) == {"stop", "length", "cancelled"}
    assert finishes.count("cancelled") > 5
    assert engine.scheduler.running == 0
    assert cells(engine) == [len(held) for held in engine.scheduler.held]
    expected = one_by_one(engine, QUESTIONS[:2])
    fresh = LlamaCppEngine(EngineOptions(model=str(MODEL)))
    assert expected == one_by_one(fresh, QUESTIONS[:2])
    fresh.close()
