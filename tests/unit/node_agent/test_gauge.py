"""The gauge: what a node tells of its functions, so that routers can predict a finish."""

from typing import TYPE_CHECKING, cast

import pytest

from capability_schemas.functions import FunctionSpec
from node_agent.admission.control import Admission
from node_agent.admission.queue import AdmissionQueue
from node_agent.gauge import LoadGauge

if TYPE_CHECKING:
    from node_agent.pool.pool import InstancePool

F = FunctionSpec(name="f", description="d")


class FakePool:
    """What gauge and admission need of `node_agent.pool.pool.InstancePool`."""

    def __init__(self):
        self.start = 0.0

    def offer(self, specs):
        pass

    def group_of(self, spec):
        return spec.name

    def start_ms(self, _spec):
        return self.start

    def instances(self, _spec):
        return []

    def is_degraded(self, _spec):
        return False


class Node:
    """A gauge with a clock of its own."""

    def __init__(self):
        self.now = 0
        self.pool = FakePool()
        pool = cast("InstancePool", self.pool)
        queue = AdmissionQueue(limit=10)
        admission = Admission(queue=queue, pool=pool, clock=lambda: self.now)
        admission.configure({"f": F}, edited=set())
        self.gauge = LoadGauge(
            node="n",
            epoch=1,
            functions={"f": F},
            queue=queue,
            queue_limit=10,
            admission=admission,
            pool=pool,
            clock=lambda: self.now,
        )

    def run(self, *times_ms):
        for total_ms in times_ms:
            self.gauge.add_run("f", first_ms=total_ms / 2, total_ms=total_ms)

    @property
    def told(self):
        return self.gauge.load().functions["f"]


@pytest.fixture
def node():
    return Node()


def test_nothing_is_told_before_anything_ran(node):
    assert (node.told.first_ms, node.told.total_ms, node.told.least_ms) == (None, None, None)


def test_times_are_smoothed_and_the_quickest_is_told_once_there_are_a_few(node):
    node.run(100, 200)
    assert node.told.total_ms == pytest.approx(120)
    assert node.told.first_ms == pytest.approx(60)
    assert node.told.least_ms is None
    node.run(80)
    assert node.told.least_ms == 80


def test_the_quickest_is_of_the_latest_runs(node):
    node.run(10, *[500] * 31)
    assert node.told.least_ms == 10
    node.run(500)
    assert node.told.least_ms == 500


def test_old_runs_refuse_nothing(node):
    node.run(500, 500, 500)
    node.now = 60_000
    assert node.told.least_ms == 500
    node.now = 60_001
    assert node.told.least_ms is None
    assert node.told.total_ms == 500


def test_the_wait_is_told_with_the_start_of_an_instance(node):
    assert node.told.wait_ms == 0
    node.pool.start = 1234.5678
    assert node.told.wait_ms == 1234.568
    node.pool.start = None
    assert node.told.wait_ms is None


def test_an_edited_function_is_measured_anew(node):
    node.run(500, 500, 500)
    edited = FunctionSpec(name="f", description="other")
    node.gauge.replace({"f": F})
    assert node.told.least_ms == 500
    node.gauge.replace({"f": edited})
    assert node.told.total_ms is None
    node.gauge.replace({})
    node.run(100)
    assert node.gauge.first_ms("f") is None
