"""What a device saw of each task, and what that adds up to."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from foam.demo.recording import Recording, Truth, Verdict, judge

__all__ = ["Summary", "Trace", "quantile", "summarise"]


@dataclass
class Trace:
    """One task as its device saw it.

    Attributes:
        task: Task id in the recording.
        device: Who asked.
        text: What was asked.
        node: Chosen node.
        function: Chosen function.
        score: Rank value of the choice.
        streamed: Text of the chunks so far.
        chunks: Number of chunks.
        output: Output of the result.
        error: Code and message of the error that ended it.
        first_ms: From publishing to the first chunk or result, at the device.
        total_ms: From publishing to the last event, at the device.
        tokens: Tokens the model wrote.
        run_ms: Time the node spent running it.
        ended: Whether the last event came.
        verdict: The judgement, once it ended.
    """

    task: str
    device: str
    text: str
    node: str | None = None
    function: str | None = None
    score: float | None = None
    streamed: str = ""
    chunks: int = 0
    output: Any = None
    error: str | None = None
    first_ms: float | None = None
    total_ms: float | None = None
    tokens: int = 0
    run_ms: float = 0.0
    ended: bool = False
    verdict: Verdict = field(default_factory=lambda: Verdict(False, "no answer"))

    def take(self, event: Mapping[str, Any], after_ms: float) -> None:
        """Take an event as the device told it, in order.

        Args:
            event: A reply event, with the ``source`` level of its topic.
            after_ms: Since the task was published.
        """
        kind = event["event"]
        if kind in ("chunk", "result") and self.first_ms is None:
            self.first_ms = after_ms
        if kind == "routed":
            self.node, self.function, self.score = event["node"], event["function"], event["score"]
        elif kind == "chunk":
            self.chunks += 1
            if isinstance(event["data"], str):
                self.streamed += event["data"]
        elif kind == "result":
            self.output = event.get("output")
            self.node, self.function = event["source"], event.get("function", self.function)
            self.tokens = (event.get("usage") or {}).get("output_tokens") or 0
            timing = event.get("timing") or {}
            self.run_ms = timing.get("total_ms", 0.0) - timing.get("queue_ms", 0.0)
        elif kind == "error":
            self.error = f"{event['code']}: {event['message']}"
        if kind in ("result", "error"):
            self.total_ms, self.ended = after_ms, True

    def judged(self, truth: Truth) -> Verdict:
        """Compare the ended task with the truth, and the streamed text with the result's."""
        if self.error is not None:
            self.verdict = Verdict(False, self.error)
        elif self.ended:
            self.verdict = judge(truth, node=self.node, function=self.function, output=self.output)
            if isinstance(self.output, str) and self.chunks and self.streamed != self.output:
                self.verdict = Verdict(False, "the streamed text is not the text of the result")
        return self.verdict


@dataclass(frozen=True, slots=True)
class Summary:
    """What the demo came to.

    Attributes:
        tasks: Tasks of the recording.
        right: Answered as the truth says.
        wrong: Answered otherwise, or with an error.
        missing: Never answered.
        rows: Per node: name, tasks, right, p50 and p95 of first and total time in ms.
        tokens_per_s: Tokens of the language node over the time it ran.
    """

    tasks: int
    right: int
    wrong: int
    missing: int
    rows: Sequence[tuple[str, int, int, float, float, float, float]]
    tokens_per_s: float

    @property
    def passed(self) -> bool:
        """Whether every task was answered, and rightly."""
        return self.right == self.tasks > 0


def quantile(values: Iterable[float], share: float) -> float:
    """Return the smallest value that at least ``share`` of the values do not exceed; 0 for none.

    Args:
        values: Any order.
        share: From 0 to 1.
    """
    ordered = sorted(values)
    return ordered[max(math.ceil(share * len(ordered)) - 1, 0)] if ordered else 0.0


def summarise(recording: Recording, traces: Mapping[str, Trace]) -> Summary:
    """Add the traces up.

    Args:
        recording: What was asked.
        traces: Task id to trace; tasks that are not in it count as missing.
    """
    ended = [trace for trace in traces.values() if trace.ended]
    right = sum(trace.verdict.right for trace in ended)
    rows = []
    for node in sorted({truth.node for truth in recording.truths.values()}):
        mine = [trace for trace in ended if recording.truths[trace.task].node == node]
        first = [trace.first_ms for trace in mine if trace.first_ms is not None]
        total = [trace.total_ms for trace in mine if trace.total_ms is not None]
        good = sum(trace.verdict.right for trace in mine)
        times = [quantile(ms, share) for ms in (first, total) for share in (0.5, 0.95)]
        rows.append((node, len(mine), good, times[0], times[1], times[2], times[3]))
    spoken = [trace for trace in ended if trace.tokens]
    seconds = sum(trace.run_ms for trace in spoken) / 1000
    return Summary(
        tasks=len(recording.truths),
        right=right,
        wrong=len(ended) - right,
        missing=len(recording.truths) - len(ended),
        rows=rows,
        tokens_per_s=sum(trace.tokens for trace in spoken) / seconds if seconds else 0.0,
    )
