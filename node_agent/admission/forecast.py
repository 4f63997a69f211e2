"""How long a run will take, learnt from the runs before it. Pure.

For functions with tokens ``T = overhead + n_in * prefill_token_ms + n_out * token_ms``: how many
are prefilled and written is what it was for the nearest inputs by size, those written capped by
``max_tokens``; the two times come from the calibration of the instance at first and from every run
since. For any function there are three more guesses: the run times of the nearest inputs, a line
over the bytes of the input, and the usual run time. Whichever has been the least wrong lately is
believed (follow the leader: Cesa-Bianchi and Lugosi, Prediction, Learning, and Games, 2006,
section 3.2), but for a run that is cut shorter than any before, which tokens alone tell about.
"""

import heapq
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from node_agent.runtimes.base import Request
from node_agent.worker.frames import to_json

_SMOOTHING: Final = 0.2
"""Weight of the newest value in a smoothed one."""

_DECAY: Final = 0.95
"""Weight of the older points of a line when a new one comes."""

_OUTLIER: Final = 3.0
"""A value counts as at most so many times the usual one, or the usual one as so many times it: one
run that was held up must not have everything refused, a real change is learnt within a few."""

STALE_MS: Final = 60_000
"""Age of the last run from which a forecast no longer refuses anything: or else what was slow once
would never be tried again."""

_BYTES_A_TOKEN: Final = 4.0
_FIRST_OUTPUT_TOKENS: Final = 64
"""Assumed before anything is known about a function's tokens."""

LEAST_RUNS: Final = 3
"""Runs from which work is refused for what they took: the first is often slow, and refusing for it
would keep the second from showing so."""

_CUT: Final = 1.5
"""How many times as long a run is taken to be that was cut. Its bare time would let the next one in
that has as much time, to be cut as well."""

_LEAST_POINTS: Final = 2
_NEAR: Final = 5
_REMEMBERED_NEAR: Final = 64
_REMEMBERED: Final = 32
_REMEMBERED_ERRORS: Final = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What is known about a run before it begins.

    Attributes:
        input_bytes: Size of text, input and messages together.
        max_tokens: Most tokens it may write; None when there is no such limit.
    """

    input_bytes: int
    max_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """How long a run will take on a warm instance.

    Attributes:
        run_ms: Expected, milliseconds; None when nothing is known.
        least_ms: At the very least, going by the quickest of the last runs; 0 when unknown.
        sure: Whether it rests on recent runs, so that work may be refused for it.
    """

    run_ms: float | None = None
    least_ms: float = 0.0
    sure: bool = False


UNKNOWN: Final = Prediction()


def work_of(request: Request) -> Work:
    """Return what is known about the run of a call."""
    asked = {"text": request.text, "input": request.input}
    messages = request.options.get("messages")
    most = request.options.get("max_tokens")
    return Work(
        input_bytes=len(to_json(asked if messages is None else messages)),
        max_tokens=most if isinstance(most, int) and most > 0 else None,
    )


class _Mean:
    """A smoothed value."""

    def __init__(self, value: float | None = None) -> None:
        self.value = value

    def predict(self, _work: Work) -> float | None:
        return self.value

    def learn(self, _work: Work, new: float) -> None:
        old = self.value
        if old:
            new = min(max(new, old / _OUTLIER), old * _OUTLIER)
        self.value = new if old is None else old + _SMOOTHING * (new - old)


class _Line:
    """A least-squares line over the bytes of the input, older points counting for less."""

    def __init__(self) -> None:
        self._n = self._x = self._y = self._xx = self._xy = 0.0

    def predict(self, work: Work) -> float | None:
        if not self._n:
            return None
        mean_x, mean_y = self._x / self._n, self._y / self._n
        spread = self._xx / self._n - mean_x * mean_x
        if (
            self._n < _LEAST_POINTS or spread <= 1e-3 * mean_x * mean_x
        ):  # inputs of one size have no slope
            return mean_y
        slope = max(0.0, (self._xy / self._n - mean_x * mean_y) / spread)
        return max(0.0, mean_y + slope * (work.input_bytes - mean_x))

    def learn(self, work: Work, value: float) -> None:
        x = float(work.input_bytes)
        self._n = self._n * _DECAY + 1
        self._x = self._x * _DECAY + x
        self._y = self._y * _DECAY + value
        self._xx = self._xx * _DECAY + x * x
        self._xy = self._xy * _DECAY + x * value


class _Near:
    """The median over the last runs whose input was about as large: tasks of one kind are alike."""

    def __init__(self) -> None:
        self._points: deque[tuple[int, float]] = deque(maxlen=_REMEMBERED_NEAR)

    def predict(self, work: Work) -> float | None:
        if not self._points:
            return None
        newest_first = enumerate(reversed(self._points))
        near = heapq.nsmallest(
            _NEAR, newest_first, key=lambda one: (abs(one[1][0] - work.input_bytes), one[0])
        )
        return statistics.median(value for _, (_, value) in near)

    def learn(self, work: Work, value: float) -> None:
        self._points.append((work.input_bytes, value))


class _Tokens:
    """Prefill, decode, and what neither explains."""

    def __init__(self) -> None:
        self._input = _Near()
        self._output = _Near()
        self._prefill = _Mean()
        self._decode = _Mean()
        self._rest = _Mean()

    def predict(self, work: Work) -> float | None:
        read, written = self._input.predict(work), self._output.predict(work)
        if read is None or written is None or self._decode.value is None:
            return None
        if work.max_tokens is not None:
            written = min(written, work.max_tokens)
        prefill_ms = read * (self._prefill.value or 0.0)
        return (self._rest.value or 0.0) + prefill_ms + written * self._decode.value

    def is_cut(self, work: Work) -> bool:
        """Tell whether it will write less than it would without its limit."""
        written = self._output.predict(work)
        return written is not None and work.max_tokens is not None and work.max_tokens < written

    def learn(
        self, work: Work, run_ms: float, usage: Mapping[str, int], timing: Mapping[str, float]
    ) -> None:
        prefill_ms, decode_ms = timing.get("prefill_ms"), timing.get("decode_ms")
        written = usage.get("output_tokens", 0)
        if prefill_ms is None or decode_ms is None or not written:
            return
        read = max(0, usage.get("input_tokens", 0) - usage.get("cached_tokens", 0))
        self._input.learn(work, read)
        self._output.learn(work, written)
        self._decode.learn(work, decode_ms / written)
        if read:
            self._prefill.learn(work, prefill_ms / read)
        self._rest.learn(work, max(0.0, run_ms - prefill_ms - decode_ms))


@dataclass(slots=True)
class _Model:
    tokens: _Tokens = field(default_factory=_Tokens)
    near: _Near = field(default_factory=_Near)
    line: _Line = field(default_factory=_Line)
    mean: _Mean = field(default_factory=_Mean)
    wrong: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0, 0.0])
    ratios: deque[float] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))
    runs: int = 0
    learnt_at: int = 0

    def guesses(self, work: Work) -> list[float | None]:
        return [guesser.predict(work) for guesser in (self.tokens, self.near, self.line, self.mean)]

    def best(self, work: Work) -> float | None:
        if self.tokens.is_cut(work):
            return self.tokens.predict(work)
        known = [
            (wrong, guess)
            for wrong, guess in zip(self.wrong, self.guesses(work), strict=True)
            if guess is not None
        ]
        return min(known, key=lambda one: one[0])[1] if known else None


class Forecast:
    """Run times of a node's functions; owned by the agent's event loop."""

    def __init__(self) -> None:
        self._models: dict[str, _Model] = {}
        self._first_asked: dict[str, int] = {}
        self._errors: deque[float] = deque(maxlen=_REMEMBERED_ERRORS)

    def predict(
        self, function: str, work: Work, *, info: Mapping[str, Any] | None = None, now: int
    ) -> Prediction:
        """Predict a run.

        Args:
            function: The function.
            work: What is known about the run.
            info: What the function's instance said when it started; ``prefill_token_ms`` and
                ``token_ms`` give a first idea.
            now: UTC milliseconds.
        """
        model = self._models.get(function)
        run_ms = None if model is None else model.best(work)
        if model is None or run_ms is None:
            idea = _first_idea(work, info or {})
            # The calibration is a measurement like any other, of an instance under load perhaps.
            is_old = now - self._first_asked.setdefault(function, now) > STALE_MS
            return Prediction(run_ms=idea.run_ms) if is_old else idea
        if model.runs < LEAST_RUNS or now - model.learnt_at > STALE_MS:
            return Prediction(run_ms=run_ms)
        quickest = min(model.ratios, default=0.0)
        return Prediction(run_ms=run_ms, least_ms=run_ms * min(1.0, quickest), sure=True)

    def learn(
        self,
        function: str,
        work: Work,
        *,
        run_ms: float,
        usage: Mapping[str, int] | None = None,
        timing: Mapping[str, float] | None = None,
        now: int,
    ) -> None:
        """Take in a run that went well.

        Args:
            function: The function.
            work: What was known about the run.
            run_ms: How long it took from the call of a warm instance on, milliseconds.
            usage: As in `node_agent.runtimes.base.Final`.
            timing: Likewise.
            now: UTC milliseconds.
        """
        model = self._models.setdefault(function, _Model())
        run_ms = max(run_ms, 1.0)  # below the resolution of the clock
        believed = model.best(work)
        if believed:
            model.ratios.append(run_ms / believed)
        for place, guess in enumerate(model.guesses(work)):
            if guess is not None:
                error = min(1.0, abs(guess - run_ms) / run_ms)
                model.wrong[place] += _SMOOTHING * (error - model.wrong[place])
        model.tokens.learn(work, run_ms, usage or {}, timing or {})
        model.near.learn(work, run_ms)
        model.line.learn(work, run_ms)
        model.mean.learn(work, run_ms)
        model.runs += 1
        model.learnt_at = now

    def learn_cut(
        self, function: str, work: Work, *, ran_ms: float, predicted_ms: float | None, now: int
    ) -> None:
        """Take in a run that was cut before its end: it would have taken longer.

        Such a censored run says something only to those guessers that expected less, and raises
        them, as a whole run does: an outlier among many counts for little.

        Args:
            function: The function.
            work: What was known about the run.
            ran_ms: How long it had run since the call of a warm instance, milliseconds.
            predicted_ms: What had been predicted for it, milliseconds.
            now: UTC milliseconds.
        """
        run_ms = max(ran_ms, 1.0) * _CUT
        if predicted_ms is not None and predicted_ms > run_ms:
            return
        model = self._models.setdefault(function, _Model())
        guesses = model.guesses(work)
        for place, guess in enumerate(guesses):
            if guess is not None and guess < ran_ms:
                model.wrong[place] += _SMOOTHING * ((run_ms - guess) / run_ms - model.wrong[place])
        # Not the tokens: how many it would have written is not known.
        learning: tuple[_Near | _Line | _Mean, ...] = (model.near, model.line, model.mean)
        for guesser, guess in zip(learning, guesses[1:], strict=True):
            if guess is None or guess < ran_ms:
                guesser.learn(work, run_ms)
        model.runs += 1
        model.learnt_at = now

    def forget(self, function: str) -> None:
        """Forget a function, for it was edited or withdrawn."""
        self._models.pop(function, None)
        self._first_asked.pop(function, None)

    def judge(self, *, predicted_ms: float, actual_ms: float) -> None:
        """Compare a predicted time from admission to end with the actual one."""
        actual_ms = max(actual_ms, 1.0)
        self._errors.append(abs(predicted_ms - actual_ms) / actual_ms)

    def clear_errors(self) -> None:
        """Forget how far predictions were off; what they rest on stays."""
        self._errors.clear()

    @property
    def judged(self) -> int:
        """How many predictions `median_error` rests on."""
        return len(self._errors)

    @property
    def median_error(self) -> float | None:
        """Median absolute relative error of the last predictions of the finish; None: none yet."""
        return statistics.median(self._errors) if self._errors else None


def _first_idea(work: Work, info: Mapping[str, Any]) -> Prediction:
    """Predict the first run of all, from the calibration of the instance."""
    prefill, decode = info.get("prefill_token_ms"), info.get("token_ms")
    if prefill is None or decode is None:
        return UNKNOWN
    prefill_ms = work.input_bytes / _BYTES_A_TOKEN * float(prefill)
    written = min(_FIRST_OUTPUT_TOKENS, work.max_tokens or _FIRST_OUTPUT_TOKENS)
    # Tokens may be twice as long as assumed: half of the prefill is sure, nothing beyond it.
    return Prediction(run_ms=prefill_ms + written * float(decode), least_ms=prefill_ms / 2)
