"""Where "nobody can do this" begins, and how likely the first is right, fitted to the catalogue.

The best threshold differs from fleet to fleet. Two things of the fleet itself tell where it lies.
What its own examples score when each is asked for as if it had not been advertised
(leave-one-out): the quantile that keeps 95 % of them. And what requests of every kind score
(``registry.background``): a fleet of two hundred that serves all sorts of things comes nearer to
any request than a plant with ten functions, whether it has examples or not. The second gives the
prior, which stands for ``PRIOR_WEIGHT`` examples, because the quantile of a few is noisy, and too
low when leaving one of three out takes most of a capability away.

Measured over 51 fleets of ten to 1,590 capabilities, requests kept and strangers refused: large
ones with examples 92 and 84 %, small ones with two to four examples 92 and 73 % (half of the
strangers there ask for a function of the same trade that the fleet lacks), large ones without any
89 and 63 %, small ones without any 90 and 56 %.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np

IN_SCOPE_KEPT: Final = 0.95
PRIOR_BARE: Final = 0.1
PRIOR_WITH_EXAMPLES: Final = 0.22
PRIOR_WEIGHT: Final = 60.0
ENOUGH_EXAMPLES: Final = 3
LOWEST: Final = 0.08
HIGHEST: Final = 0.55
_BACKGROUND_SHARE: Final = 0.55
_BACKGROUND_QUANTILE: Final = 0.8
_BACKGROUND_USUAL: Final = 0.2

DEFAULT_HALF: Final = 0.5
_HALF_RANGE: Final = (0.2, 1.0)

_WINDOW: Final = 0.03
"""Of the requests with a smaller margin the first match is right in 40 % of the cases."""
_BIAS: Final = -1.5
_SLOPE: Final = 4.1
_MARGIN_SLOPE: Final = 14.0
_BIAS_WEIGHT: Final = 5.0
_STEPS: Final = 20
_MOST_ODDS: Final = 30.0


class HeldOut(NamedTuple):
    """What became of an example that was asked for as if nobody had advertised it.

    Attributes:
        score: best score over the catalogue.
        margin: distance of the first two.
        right: whether its own capability came first.
    """

    score: float
    margin: float
    right: bool


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was fitted, for ``explain`` and for the log.

    Attributes:
        threshold: lowest score that is an answer, 0 to 1.
        half: coverage at which the lexical part reaches 0.5.
        held_out: examples that were asked for; with 0 the threshold is the prior.
        window: margin below which a choice is ambiguous.
        bias: log odds of being right at the threshold without a margin.
    """

    threshold: float
    half: float = DEFAULT_HALF
    held_out: int = 0
    window: float = _WINDOW
    bias: float = _BIAS

    def probability(self, score: float, margin: float) -> float:
        """Chance that the first match is what the request wants.

        Logistic in both. The slopes are those of 51 fleets together, a quarter as many strangers
        among the requests; the bias is the fleet's own where examples could be held out.

        Args:
            score: its score.
            margin: distance to the second, of whatever sign.

        Returns:
            0 to 1; grows with both.
        """
        return _logistic(self.bias + _evidence(score - self.threshold, margin))


def prior(
    exampled: float, background: Sequence[float] = (), *, half: float = DEFAULT_HALF
) -> Calibration:
    """What holds without held-out examples.

    Args:
        exampled: share of capabilities with enough examples, 0 to 1. Descriptions alone score lower
            against a request than utterances do.
        background: best scores of requests of every kind; unknown when empty.
        half: of the lexical squash.
    """
    general = (
        float(np.quantile(np.asarray(background), _BACKGROUND_QUANTILE))
        if len(background)
        else _BACKGROUND_USUAL
    )
    base = PRIOR_BARE + (PRIOR_WITH_EXAMPLES - PRIOR_BARE) * min(1.0, max(0.0, exampled))
    return Calibration(_within(base + _BACKGROUND_SHARE * general, LOWEST, HIGHEST), half)


def fit(
    inside: Sequence[HeldOut], background: Sequence[float], exampled: float, *, half: float
) -> Calibration:
    """Fit everything to a catalogue.

    Args:
        inside: held-out examples.
        background: as for ``prior``.
        exampled: as for ``prior``.
        half: of the lexical squash.
    """
    before = prior(exampled, background, half=half)
    threshold = fit_threshold([one.score for one in inside], before.threshold)
    bias = _fit_bias(inside, threshold)
    return Calibration(threshold, half, held_out=len(inside), bias=bias)


def fit_threshold(top_scores: Sequence[float], before: float) -> float:
    """Blend the quantile that keeps 95 % of the held-out examples with the prior.

    Args:
        top_scores: best score of each held-out example over the whole catalogue.
        before: threshold without a fit.

    Returns:
        Threshold, ``LOWEST`` to ``HIGHEST``.
    """
    count = len(top_scores)
    if count == 0:
        return before
    fitted = float(np.quantile(np.asarray(top_scores), 1.0 - IN_SCOPE_KEPT))
    blended = (count * fitted + PRIOR_WEIGHT * before) / (count + PRIOR_WEIGHT)
    return _within(blended, LOWEST, HIGHEST)


def fit_half(coverages: Sequence[float]) -> float:
    """Half point of the lexical squash: the median coverage of examples by their own capability.

    Args:
        coverages: leave-one-out coverages; zeros say nothing and are left out.
    """
    positive = [coverage for coverage in coverages if coverage > 0.0]
    return _within(float(np.median(positive)), *_HALF_RANGE) if positive else DEFAULT_HALF


def _fit_bias(inside: Sequence[HeldOut], threshold: float) -> float:
    """Maximum of the posterior: a normal prior about ``_BIAS``, by Newton's method."""
    known = np.array([_evidence(one.score - threshold, one.margin) for one in inside])
    right = sum(one.right for one in inside)
    bias = _BIAS
    for _ in range(_STEPS if inside else 0):
        chance = 1.0 / (1.0 + np.exp(-np.clip(bias + known, -_MOST_ODDS, _MOST_ODDS)))
        gradient = right - float(chance.sum()) - _BIAS_WEIGHT * (bias - _BIAS)
        bias += gradient / (float((chance * (1.0 - chance)).sum()) + _BIAS_WEIGHT)
    return bias


def _evidence(above: float, margin: float) -> float:
    return _SLOPE * above + _MARGIN_SLOPE * margin


def _logistic(odds: float) -> float:
    return 1.0 / (1.0 + math.exp(-_within(odds, -_MOST_ODDS, _MOST_ODDS)))


def _within(value: float, low: float, high: float) -> float:
    return min(high, max(low, value))
