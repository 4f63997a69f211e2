"""Admission: by predicted finish, in turn, dropped unstarted, and as many at a time as pay."""

import pytest

from capability_schemas.errors import DeadlineExceeded, Overloaded
from capability_schemas.functions import FunctionSpec
from node_agent.admission.control import Admission
from node_agent.admission.forecast import Work
from node_agent.admission.queue import AdmissionQueue
from node_agent.runtimes.base import Final

WORK = Work(input_bytes=10)
DONE = Final(output="x")


class FakePool:
    """What admission needs of `node_agent.pool.InstancePool`."""

    def __init__(self):
        self.offered = ()
        self.start = 0.0
        self.facts = {}
        self.prepared = []

    def prepare(self, spec):
        self.prepared.append(spec)

    def offer(self, specs):
        self.offered = tuple(specs)

    def group_of(self, spec):
        return spec.entry or spec.name

    def info(self, _spec):
        return self.facts

    def start_ms(self, _spec):
        return self.start


def make_pool():
    return FakePool()


def spec(name="f", **fields):
    return FunctionSpec(name=name, description="d", **fields)


F = spec()


class Desk:
    """An admission with a clock of its own, and what it began and dropped."""

    def __init__(self, *functions):
        self.now = 0
        self.pool = make_pool()
        self.queue = AdmissionQueue(limit=100)
        self.admission = Admission(queue=self.queue, pool=self.pool, clock=lambda: self.now)
        self.configure(*functions)
        self.begun = []
        self.dropped = {}
        self.tickets = {}

    def configure(self, *functions, edited=()):
        self.admission.configure({one.name: one for one in functions}, edited=set(edited))

    def admit(self, key, one=F, *, within=10_000, work=WORK, **fields):
        ticket = self.admission.admit(
            key,
            one,
            work,
            deadline=self.now + within,
            priority=5,
            begin=lambda: self.begun.append(key),
            drop=lambda error: self.dropped.update({key: error}),
            **fields,
        )
        self.tickets[key] = ticket
        self.admission.dispatch()
        return ticket

    def end(self, key, run_ms):
        self.now += run_ms
        ticket = self.tickets.pop(key)
        self.admission.ended(ticket, DONE, run_ms=run_ms)
        self.admission.free(ticket, run_ms=run_ms)
        self.admission.dispatch()

    def run(self, run_ms, times=5, one=F):
        for _ in range(times):
            self.admit("run", one)
            self.end("run", run_ms)


@pytest.fixture
def desk():
    return Desk(F)


def test_the_unknown_is_admitted(desk):
    ticket = desk.admit("a", within=5)
    assert desk.begun == ["a"]
    assert ticket.finish_ms is None


def test_what_would_end_too_late_is_refused_with_the_figures(desk):
    desk.run(400)
    desk.admit("a")
    figures = r"would end in 800 ms \(wait 400, start 0, run 400\)"
    with pytest.raises(Overloaded, match=figures) as no:
        desk.admit("b", within=700)
    assert no.value.retry_after_ms == 400
    ticket = desk.admit("c", within=900)
    assert (ticket.wait_ms, ticket.finish_ms) == (400, 800)


def test_a_run_longer_than_all_the_time_is_refused_at_once(desk):
    desk.run(400)
    with pytest.raises(DeadlineExceeded, match="f takes about 400 ms, 300 ms were left") as no:
        desk.admit("a", within=300)
    assert no.value.detail == {"predicted_ms": 400, "left_ms": 300}


def test_the_start_of_an_instance_counts(desk):
    desk.run(100)
    desk.pool.start = 500.0
    with pytest.raises(Overloaded, match="start 500") as no:
        desk.admit("a", within=550)
    # Nothing else would start it: what one slow start has shown would be believed for ever.
    assert desk.pool.prepared == [F]
    assert no.value.retry_after_ms == 500
    ticket = desk.admit("a", within=700)
    assert ticket.wait_ms == 500
    assert desk.admit("b").wait_ms == pytest.approx(600)  # the place, and the instance with it


def test_a_first_slow_run_refuses_nothing(desk):
    desk.run(400, times=2)
    desk.admit("a", within=300)
    assert desk.begun[-1] == "a"


def test_an_old_experience_refuses_nothing(desk):
    desk.run(400)
    desk.now += 61_000
    desk.admit("a", within=300)
    assert desk.begun[-1] == "a"


def test_what_cannot_end_in_time_any_more_is_dropped_before_it_begins(desk):
    desk.run(400)
    desk.admit("slow", within=10_000)
    desk.admit("waits", within=900)
    desk.end("slow", 600)
    assert "waits" not in desk.begun
    error = desk.dropped["waits"]
    assert isinstance(error, DeadlineExceeded)
    assert error.detail["left_ms"] == 300
    assert 300 < error.detail["predicted_ms"] <= 600
    assert not error.retryable


def test_a_ticket_knows_when_its_time_is_up(desk):
    desk.run(400)
    ticket = desk.admit("a", within=1000)
    ticket.check_time(desk.now + 500)
    with pytest.raises(DeadlineExceeded, match="not begun"):
        ticket.check_time(desk.now + 700)


def test_a_withdrawn_call_never_begins(desk):
    desk.admit("a")
    ticket = desk.admit("b")
    assert desk.admission.withdraw(ticket)
    assert not desk.admission.withdraw(ticket)
    desk.end("a", 10)
    assert desk.begun == ["a"]


def test_predictions_are_judged_by_what_happened(desk):
    desk.run(200, times=4)
    assert desk.admission.forecast.median_error == pytest.approx(0.0)
    assert desk.admission.forecast.judged == 3  # the first was unknown


def test_what_is_cut_again_and_again_is_refused_to_those_with_no_more_time(desk):
    for number in range(3):
        ticket = desk.admit(f"slow-{number}", within=1000)
        desk.now += 1000
        desk.admission.cut(ticket, ran_ms=998)
        desk.admission.free(ticket, run_ms=None)
    with pytest.raises(DeadlineExceeded, match="takes"):
        desk.admit("next", within=1000)
    desk.admit("patient", within=2000)


def test_a_cut_below_the_prediction_teaches_nothing(desk):
    desk.run(500)
    ticket = desk.admit("short", within=5000)
    desk.admission.cut(ticket, ran_ms=400)
    assert desk.admission.forecast.predict(F.name, WORK, now=desk.now).run_ms == pytest.approx(500)


def test_places_follow_what_was_measured():
    wide = spec(concurrency=2)
    desk = Desk(wide)
    desk.run(100, times=8, one=wide)
    for _ in range(10):
        desk.admit("a", wide)
        desk.admit("b", wide)
        desk.end("a", 200)  # both at once take twice as long
        desk.admit("c", wide)
        desk.end("b", 200)
        desk.end("c", 200)
    assert desk.queue.capacity_of("f") == 1
    desk.configure(spec(concurrency=4))
    assert desk.queue.capacity_of("f") == 4


def test_what_is_taken_already_survives_another_set_of_functions(desk):
    desk.run(300)
    running = desk.admit("running")
    desk.admit("waiting")
    other = spec("g")
    desk.configure(other, edited={"f"})
    assert desk.pool.offered == (other,)
    assert desk.begun[-1] == "running"
    desk.end("running", 300)
    assert desk.begun[-1] == "waiting"
    assert running.spec is F
    desk.end("waiting", 300)
    assert set(desk.admission.functions) == {"g"}


def test_the_wait_of_a_call_that_came_now_is_told_in_advance(desk):
    assert desk.admission.wait_ms(F) == 0
    desk.pool.start = 250.0
    assert desk.admission.wait_ms(F) == 250
    desk.pool.start = None
    assert desk.admission.wait_ms(F) is None


def test_it_stands_behind_all_that_waits_and_needs_no_start_of_its_own(desk):
    desk.run(400)
    desk.pool.start = 250.0
    desk.admit("a")
    desk.admit("b")
    told = desk.admission.wait_ms(F)
    assert told == desk.admit("c", within=60_000).wait_ms
    assert told == 250 + 400 + 400  # "a" starts an instance, "b" gets its place
