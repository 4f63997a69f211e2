"""Where "nobody can do this" begins, and how likely the first is right, fitted to the catalogue.

The best threshold differs from fleet to fleet. Two things of the fleet itself tell where it lies.
What its own examples score when each is asked for as if it had not been advertised
(leave-one-out): the quantile that keeps 94 % of them. And what requests of every kind score
(``registry.background``): a fleet of two hundred that serves all sorts of things comes nearer to
any request than a plant with ten functions, whether it has examples or not. The second gives the
prior.

To refuse a task that somebody serves is worse than to send an odd one to the nearest function. So
the two are not blended evenly: examples that score higher than the prior need to be many
(``PRIOR_WEIGHT``) to raise the threshold, because people word their requests less like the examples
than these are like each other; a few that score lower (``DOUBT_WEIGHT``) bring it down.

Requests kept and strangers refused, measured. The prior and the two weights were chosen on
CLINC150, HWU64 and fleets drawn from them: 92 and 76 % there with examples, 93 and 67 % for small
fleets of four to thirty functions (half of the strangers ask for what the rest of the set has), 94
and 44 % with nothing but names, 95 and 41 % for small ones. On sets that had no part in that (the
developers' tools, BANKING77, BFCL): 96 and 81, 98 and 76, 98 and 31, 98 and 47 %. The share to
keep, and that a description counts as one example, were settled with all of them in view.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np

IN_SCOPE_KEPT: Final = 0.94
PRIOR_BARE: Final = 0.03
PRIOR_WITH_EXAMPLES: Final = 0.15
PRIOR_WEIGHT: Final = 120.0
DOUBT_WEIGHT: Final = 10.0
ENOUGH_EXAMPLES: Final = 3
LOWEST: Final = 0.04
HIGHEST: Final = 0.55
_BACKGROUND_SHARE: Final = 0.5
_BACKGROUND_QUANTILE: Final = 0.8
_BACKGROUND_USUAL: Final = 0.2

DEFAULT_HALF: Final = 0.5
_HALF_RANGE: Final = (0.2, 1.0)

_WINDOW: Final = 0.03
"""Of the requests with a smaller margin the first match is right in 43 % of the cases."""
_BIAS: Final = -2.0
_SLOPE: Final = 3.2
_MARGIN_SLOPE: Final = 14.8
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
        bias: log odds of being right with a score and a margin of 0.
    """

    threshold: float
    half: float = DEFAULT_HALF
    held_out: int = 0
    window: float = _WINDOW
    bias: float = _BIAS

    def probability(self, score: float, margin: float) -> float:
        """Chance that the first match is what the request wants.

        Logistic in both. The slopes are those of CLINC150, HWU64 and fleets drawn from them, a
        quarter as many strangers among the requests; the bias is the fleet's own where examples
        could be held out. It is off by 0.04 there (expected calibration error, of the requests that
        are routed, mean over the sets) and by 0.06 on other sets. Without examples nothing is known
        of the fleet, and it is off by 0.07 and 0.13: too high for many names alike (by up to 0.19),
        too low for a few functions that are described well (by up to 0.28).

        Args:
            score: its score.
            margin: distance to the second, of whatever sign.

        Returns:
            0 to 1; grows with both.
        """
        return _logistic(self.bias + _evidence(score, margin))


def prior(
    exampled: float, background: Sequence[float] = (), *, half: float = DEFAULT_HALF
) -> Calibration:
    """What holds without held-out examples.

    Args:
        exampled: share of capabilities with enough examples, 0 to 1. Descriptions alone score lower
            against a request than utterances do, and bare names lower still.
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
    return Calibration(threshold, half, held_out=len(inside), bias=_fit_bias(inside))


def fit_threshold(top_scores: Sequence[float], before: float) -> float:
    """Blend the quantile that keeps ``IN_SCOPE_KEPT`` of the held-out examples with the prior.

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
    weight = PRIOR_WEIGHT if fitted > before else DOUBT_WEIGHT
    return _within((count * fitted + weight * before) / (count + weight), LOWEST, HIGHEST)


def fit_half(coverages: Sequence[float]) -> float:
    """Half point of the lexical squash: the median coverage of examples by their own capability.

    Args:
        coverages: leave-one-out coverages; zeros say nothing and are left out.
    """
    positive = [coverage for coverage in coverages if coverage > 0.0]
    return _within(float(np.median(positive)), *_HALF_RANGE) if positive else DEFAULT_HALF


def _fit_bias(inside: Sequence[HeldOut]) -> float:
    """Maximum of the posterior: a normal prior about ``_BIAS``, by Newton's method."""
    known = np.array([_evidence(one.score, one.margin) for one in inside])
    right = sum(one.right for one in inside)
    bias = _BIAS
    for _ in range(_STEPS if inside else 0):
        chance = 1.0 / (1.0 + np.exp(-np.clip(bias + known, -_MOST_ODDS, _MOST_ODDS)))
        gradient = right - float(chance.sum()) - _BIAS_WEIGHT * (bias - _BIAS)
        bias += gradient / (float((chance * (1.0 - chance)).sum()) + _BIAS_WEIGHT)
    return bias


def _evidence(score: float, margin: float) -> float:
    return _SLOPE * score + _MARGIN_SLOPE * margin


def _logistic(odds: float) -> float:
    return 1.0 / (1.0 + math.exp(-_within(odds, -_MOST_ODDS, _MOST_ODDS)))


def _within(value: float, low: float, high: float) -> float:
    return min(high, max(low, value))
