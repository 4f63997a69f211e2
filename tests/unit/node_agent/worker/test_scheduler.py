"""The scheduling of answers, on a model that is a few lines of arithmetic."""

import threading
from typing import Any

import pytest

from node_agent.worker.base import InvocationError
from node_agent.worker.engines.base import Completion, Job, Prompt
from node_agent.worker.engines.scheduler import Scheduler

END = 0


class Model:
    """Says the alphabet from the last letter of the prompt on, and checks how it is used.

    Its memory is what was really decoded into each sequence, so a token at the wrong place, or a
    prefix that is not there, is an error.
    """

    n_ctx = 64
    n_batch = 16

    def __init__(self, sequences):
        self.memory: list[list[int]] = [[] for _ in range(sequences)]
        self.batches = []
        self.copies = []
        self.samplers = 0
        self.failing = False

    def encode(self, prompt):
        return [ord(c) for c in prompt.messages[0]["content"]]

    def tokenize(self, text):
        return [ord(c) for c in text]

    def sampler(self, prompt):
        self.samplers += 1
        return Letters(self)

    def decode(self, tokens, positions, sequences, outputs):
        assert 0 < len(tokens) <= self.n_batch
        assert outputs == sorted(outputs)
        if self.failing:
            raise InvocationError("execution_failed", "the model broke")
        for token, position, number in zip(tokens, positions, sequences, strict=True):
            assert position == len(self.memory[number]), "a hole in the memory"
            self.memory[number].append(token)
        self.last = [tokens[at] for at in range(len(tokens))]
        self.batches.append(list(zip(sequences, tokens, strict=True)))

    def certainties(self, tokens):
        return [-0.5 if token == END else -0.1 for token in tokens]

    def piece(self, token):
        return None if token == END else chr(token).encode("latin-1")

    def copy(self, source, target):
        self.copies.append((source, target))
        self.memory[target] = list(self.memory[source])
        return True

    def cut(self, sequence, length):
        del self.memory[sequence][length:]
        return True


class Letters:
    def __init__(self, model):
        self.model = model

    def sample(self, output):
        letter = self.model.last[output]
        return END if letter == ord("z") else letter + 1

    def free(self):
        self.model.samplers -= 1


class Call:
    def __init__(self, text, **given):
        self.text = ""
        self.end: Any = None
        self.cancelled = threading.Event()
        self.prompt = Prompt(messages=[{"role": "user", "content": text}], **given)
        self.job = Job(
            prompt=lambda: self.prompt,
            on_text=self.take,
            on_end=self.finish,
            cancelled=self.cancelled,
        )

    def take(self, text):
        assert self.end is None
        self.text += text

    def finish(self, end):
        assert self.end is None, "ended twice"
        self.end = end


def make(sequences=2, **given):
    model = Model(sequences)
    given = {"prefill_token_s": 1e-5, **given}
    return model, Scheduler(model, sequences=sequences, **given)


def work(scheduler, *calls):
    for call in calls:
        scheduler.submit(call.job)
    while scheduler.step():
        pass
    return calls


def test_one_answer_with_its_counts_and_its_least_certain_token():
    model, scheduler = make()
    (call,) = work(scheduler, Call("say w"))
    assert call.text == "xyz"
    assert call.end == Completion(
        input_tokens=5,
        output_tokens=4,
        finish="stop",
        confidence=call.end.confidence,
        prefill_ms=call.end.prefill_ms,
        decode_ms=call.end.decode_ms,
    )
    assert call.end.confidence == pytest.approx(0.6065, abs=1e-3)  # exp(-0.5), of the end
    assert model.samplers == 0


def test_answers_share_every_decode():
    model, scheduler = make(sequences=3)
    calls = work(scheduler, Call("1:p"), Call("2:q"), Call("3:r"))
    assert [call.text for call in calls] == ["qrstuvwxyz", "rstuvwxyz", "stuvwxyz"]
    assert [number for number, _ in model.batches[1]] == [0, 1, 2]
    assert len(model.batches) == 11  # the longest answer, its end included, sets the count


def test_few_answers_go_one_by_one_where_a_batch_would_be_slower():
    model, scheduler = make(sequences=4, worth_batching=3)
    pair = work(scheduler, Call("1:p"), Call("2:q"))
    assert [call.text for call in pair] == ["qrstuvwxyz", "rstuvwxyz"]
    assert {len(batch) for batch in model.batches[1:]} == {1}
    model.batches.clear()
    work(scheduler, Call("3:r"), Call("4:r"), Call("5:r"))
    assert {len(batch) for batch in model.batches[1:]} == {3}
    late = Call("-" * 20 + "y")
    for call in (Call("6:a"), Call("7:a")):
        scheduler.submit(call.job)
    scheduler.step()
    model.batches.clear()
    work(scheduler, late)
    assert late.text == "z"
    assert [len(batch) for batch in model.batches[:3]] == [1, 1, 16]


def test_more_calls_than_sequences_wait_and_are_all_answered():
    _, scheduler = make(sequences=2)
    calls = work(scheduler, *[Call(f"{n}:v") for n in range(7)])
    assert [call.text for call in calls] == ["wxyz"] * 7
    assert scheduler.running == 0


def test_a_long_prompt_goes_in_pieces_beside_a_running_answer():
    model, scheduler = make()
    running, late = Call("a"), Call("-" * 40 + "x")
    scheduler.submit(running.job)
    scheduler.step()
    work(scheduler, late)
    assert (running.text, late.text) == ("bcdefghijklmnopqrstuvwxyz", "yz")
    mixed = [batch for batch in model.batches if len({number for number, _ in batch}) == 2]
    assert len([batch for batch in mixed if len(batch) > 2]) == 3  # 15 + 15 + 11 prompt tokens
    assert all(sum(number == 0 for number, _ in batch) == 1 for batch in mixed)


def test_pieces_follow_the_measured_speed():
    model, scheduler = make(prefill_token_s=0.100 / 10)
    work(scheduler, Call("-" * 20 + "y"))
    assert len(model.batches[0]) == 10


def test_a_cancelled_answer_ends_and_the_others_do_not_notice():
    model, scheduler = make(sequences=3)
    calls = [Call("1:a"), Call("2:a"), Call("3:a")]
    for call in calls:
        scheduler.submit(call.job)
    scheduler.step()
    scheduler.step()
    calls[1].cancelled.set()
    work(scheduler)
    assert calls[1].end.finish == "cancelled"
    assert len(calls[1].text) == 2
    assert [calls[0].text, calls[2].text] == ["bcdefghijklmnopqrstuvwxyz"] * 2
    assert model.samplers == 0


def test_a_cancel_in_the_middle_of_a_prompt_or_of_the_queue():
    model, scheduler = make(sequences=1)
    first, second = Call("-" * 40 + "a"), Call("b")
    scheduler.submit(first.job)
    scheduler.submit(second.job)
    scheduler.step()
    first.cancelled.set()
    second.cancelled.set()
    work(scheduler)
    assert (first.end.finish, first.text, first.end.output_tokens) == ("cancelled", "", 0)
    assert first.end.confidence is None
    assert (second.end.finish, second.text) == ("cancelled", "")
    assert len(model.memory[0]) == 16


def test_a_second_call_decodes_only_what_is_new():
    model, scheduler = make(sequences=1)
    first, second = Call("a system, then one: x"), Call("a system, then two: x")
    work(scheduler, first)
    model.batches.clear()
    work(scheduler, second)
    assert (first.text, second.text) == ("yz", "yz")
    assert (first.end.cached_tokens, second.end.cached_tokens) == (0, 15)
    assert len(model.batches[0]) == len("two: x")


def test_a_turn_of_a_conversation_continues_what_was_generated():
    _, scheduler = make(sequences=2)
    first = Call("talk: w", session="s")
    work(scheduler, first)
    again = Call("talk: wxyz. and x", session="s")
    work(scheduler, again)
    assert again.end.cached_tokens == len("talk: wxyz")
    assert again.text == "yz"


def test_the_memory_of_another_session_is_copied_and_kept():
    model, scheduler = make(sequences=2)
    work(scheduler, Call("the same system; a: x", session="a"))
    (other,) = work(scheduler, Call("the same system; b: x", session="b"))
    (again,) = work(scheduler, Call("the same system; a: xyz, v", session="a"))
    assert model.copies == [(0, 1)]
    assert other.end.cached_tokens == len("the same system; ")
    assert again.end.cached_tokens == len("the same system; a: xyz")
    assert (other.text, again.text) == ("yz", "wxyz")


def test_a_dear_copy_is_not_made():
    model, scheduler = make(sequences=2, prefill_token_s=0.001, copy_s=1.0)
    work(scheduler, Call("the same system; a: x", session="a"))
    work(scheduler, Call("the same system; b: x", session="b"))
    assert model.copies == []


def test_limits_and_stop_texts():
    _, scheduler = make()
    limited, stopped, none = Call("a", max_tokens=3), Call("b", stop=("ef",)), Call("z")
    work(scheduler, limited, stopped, none)
    assert (limited.text, limited.end.finish, limited.end.output_tokens) == ("bcd", "length", 3)
    assert (stopped.text, stopped.end.finish) == ("cd", "stop")
    assert (none.text, none.end.finish) == ("", "stop")


def test_an_answer_ends_with_the_context():
    _, scheduler = make()
    (call,) = work(scheduler, Call("-" * 60 + "a"))
    assert (call.text, call.end.finish) == ("bcd", "length")


def test_what_cannot_start_is_told_and_stops_nobody():
    model, scheduler = make()
    good, long, broken = Call("w"), Call("a" * 64), Call("x")

    def refuse():
        raise InvocationError("invalid_task", "no")

    def crash():
        raise ZeroDivisionError

    broken.job.prompt = refuse
    crashed = Call("x")
    crashed.job.prompt = crash
    work(scheduler, long, broken, crashed, good)
    assert "context holds 64" in long.end.message
    assert broken.end.message == "no"
    assert isinstance(crashed.end, ZeroDivisionError)
    assert good.text == "xyz"
    assert model.samplers == 0


def test_a_failed_decode_fails_its_calls_and_leaves_no_rubbish_behind():
    model, scheduler = make()
    calls = [Call("1:a"), Call("2:a")]
    for call in calls:
        scheduler.submit(call.job)
    scheduler.step()
    model.failing = True
    work(scheduler)
    model.failing = False
    assert [call.end.message for call in calls] == ["the model broke"] * 2
    assert model.memory == [[], []]
    assert work(scheduler, Call("1:w"))[0].text == "xyz"


def test_characters_of_several_tokens_come_whole():
    model, scheduler = make()
    bytes_of = {ord("b"): b"\xe2", ord("c"): b"\x82", ord("d"): b"\xac!"}
    plain = model.piece
    model.piece = lambda token: bytes_of.get(token) or plain(token)
    (call,) = work(scheduler, Call("a", max_tokens=4))
    assert call.text == "€!e"
    (cut,) = work(scheduler, Call("a", max_tokens=1))
    assert cut.text == "\N{REPLACEMENT CHARACTER}"


def test_it_works_until_it_is_stopped_and_ends_what_is_under_way():
    _, scheduler = make()
    ended = threading.Event()
    call = Call("a")
    finish = call.finish

    def note(end):
        finish(end)
        ended.set()

    call.job.on_end = note
    thread = threading.Thread(target=scheduler.run)
    thread.start()
    scheduler.submit(call.job)
    scheduler.stop()
    thread.join(20)
    assert not thread.is_alive()
    assert ended.is_set()
    assert call.text.endswith("z")


def test_a_failure_together_ends_only_the_answer_behind_it(monkeypatch):
    model, scheduler = make(sequences=3)
    decode = model.decode

    def fussy(tokens, positions, sequences, outputs):
        if ord("!") in tokens:
            raise InvocationError("execution_failed", "no such token")
        decode(tokens, positions, sequences, outputs)

    monkeypatch.setattr(model, "decode", fussy)
    good, bad, other = Call("vw"), Call("v!"), Call("wx")
    work(scheduler, good, bad, other)
    assert (good.text, other.text) == ("xyz", "yz")
    assert isinstance(bad.end, InvocationError)
    assert model.samplers == 0
    later = Call("uv")
    work(scheduler, later)
    assert later.text == "wxyz"


def test_a_file_that_is_missing_while_a_prompt_is_made_ends_that_call_only():
    _, scheduler = make()
    bad, good = Call("a"), Call("xy")
    bad.job.prompt = lambda: (_ for _ in ()).throw(FileNotFoundError("words.txt"))
    work(scheduler, bad, good)
    assert isinstance(bad.end, FileNotFoundError)
    assert good.text == "z"


def test_what_was_shown_is_confirmed_many_tokens_at_a_time_and_not_handed_out():
    model, scheduler = make(sequences=1)
    call = Call("say: a", shown="bcdefghijk")
    work(scheduler, call)
    assert call.text == "lmnopqrstuvwxyz"
    assert call.end.output_tokens == len("bcdefghijklmnopqrstuvwxyz") + 1
    assert max(len(batch) for batch in model.batches) >= 8
    assert model.memory[0] == [ord(c) for c in "say: abcdefghijklmnopqrstuvwxyz"]


def test_what_the_model_would_not_say_is_said_for_it():
    model, scheduler = make(sequences=1)
    call = Call("say: a", shown="bxy")
    work(scheduler, call)
    assert call.text == "z"
    assert model.memory[0] == [ord(c) for c in "say: abxyz"]


def test_two_answers_are_said_again_beside_each_other():
    _, scheduler = make(sequences=2)
    calls = [Call("say: a", shown="bcdef"), Call("talk: m", shown="nop"), Call("go: s")]
    work(scheduler, *calls)
    assert [call.text for call in calls] == ["ghijklmnopqrstuvwxyz", "qrstuvwxyz", "tuvwxyz"]


def test_an_answer_under_a_grammar_that_comes_out_differently_ends_with_an_error():
    _, scheduler = make(sequences=1)
    call = Call("say: a", shown="bxy", schema={"type": "string"})
    work(scheduler, call)
    assert isinstance(call.end, InvocationError)
    assert "say again" in call.end.message
