"""What quotas cost a router for each task, and how much room many clients take."""

import time
import tracemalloc
from typing import Any

from benchmarks.measure import p50
from broker.access.policy import Role
from capability_schemas.errors import Overloaded
from router.quota import REMEMBERED_CLIENTS, Limits, QuotaBook, QuotaFile, Quotas

ROUNDS = 5
TASKS = 100_000


class _Book(QuotaFile):
    """Quotas that stand in no file."""

    def __init__(self, book: QuotaBook) -> None:
        self.value = book


def _quotas(**limits: float) -> Quotas:
    book = QuotaBook(default=Limits.model_validate(limits))
    return Quotas(file=_Book(book), role_of=lambda _: Role.DEVICE)


def _admitted_us(clients: int) -> float:
    """Microseconds to admit and end a task, the tasks spread over some clients."""
    quotas = _quotas(tasks_per_s=1_000_000, burst=1_000_000)
    names = [f"device-{number}" for number in range(clients)]
    started = time.perf_counter()
    for number in range(TASKS):
        name = names[number % clients]
        quotas.admit(name, 100)
        quotas.end(name)
    return (time.perf_counter() - started) * 1e6 / TASKS


def _refused_us() -> float:
    """Microseconds to refuse a task, the error included."""
    quotas = _quotas(tasks_per_s=0.001, burst=1)
    quotas.admit("a", 100)
    refused = 0
    started = time.perf_counter()
    for _ in range(TASKS):
        try:
            quotas.admit("a", 100)
        except Overloaded:
            refused += 1
    took = (time.perf_counter() - started) * 1e6 / TASKS
    if refused != TASKS:
        raise RuntimeError(f"{TASKS - refused} tasks got in")
    return took


def _bytes_per_client() -> float:
    names = [f"device-{number}" for number in range(REMEMBERED_CLIENTS)]
    tracemalloc.start()
    try:
        quotas = _quotas(tasks_per_s=10)
        for name in names:
            quotas.admit(name, 100)
            quotas.end(name)
        return tracemalloc.get_traced_memory()[0] / REMEMBERED_CLIENTS
    finally:
        tracemalloc.stop()


def measure() -> list[dict[str, Any]]:
    """Measure admission, refusal and memory."""
    return [
        {
            "admit, one client, us": p50([_admitted_us(1) for _ in range(ROUNDS)]),
            "admit, 100,000 clients, us": p50([_admitted_us(100_000) for _ in range(ROUNDS)]),
            "refuse, us": p50([_refused_us() for _ in range(ROUNDS)]),
            "bytes per client": round(_bytes_per_client()),
        }
    ]
