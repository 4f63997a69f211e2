"""Where "nobody can do this" begins, fitted to the catalogue at hand.

The best threshold differs from fleet to fleet, so it is a quantile of what the fleet's own examples
score when each is asked for as if it had not been advertised (leave-one-out). With few examples
that quantile is noisy and too low, because leaving one of three out takes away far more than
leaving one of twenty out; it is therefore blended with a prior that stands for ``PRIOR_WEIGHT``
examples. Measured: 199 capabilities with 8 examples each: quantile 0.36; ten functions with three
or four examples each: quantile 0.28, while nonsense ends at 0.34 and true paraphrases begin at
0.36.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

IN_SCOPE_KEPT: Final = 0.95
PRIOR_BARE: Final = 0.21
PRIOR_WITH_EXAMPLES: Final = 0.38
PRIOR_WEIGHT: Final = 60.0
ENOUGH_EXAMPLES: Final = 3
LOWEST: Final = 0.2
HIGHEST: Final = 0.46

DEFAULT_HALF: Final = 0.5
_HALF_RANGE: Final = (0.2, 1.0)


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was fitted, for ``explain`` and for the log.

    Attributes:
        threshold: lowest score that is an answer, 0 to 1.
        half: coverage at which the lexical part reaches 0.5.
        held_out: examples that were asked for; 0 means that the threshold is the prior.
    """

    threshold: float
    half: float
    held_out: int


def prior_threshold(examples_per_capability: Sequence[int]) -> float:
    """The threshold without any fit.

    Args:
        examples_per_capability: number of examples of every distinct capability. Descriptions alone
            score much lower against a request than utterances do.

    Returns:
        ``PRIOR_BARE`` where nothing has examples, ``PRIOR_WITH_EXAMPLES`` where most have three.
    """
    if not examples_per_capability:
        return PRIOR_WITH_EXAMPLES
    shares = [min(1.0, count / ENOUGH_EXAMPLES) for count in examples_per_capability]
    return PRIOR_BARE + (PRIOR_WITH_EXAMPLES - PRIOR_BARE) * sum(shares) / len(shares)


def fit_threshold(top_scores: Sequence[float], prior: float) -> float:
    """Blend the quantile that keeps 95 % of the held-out examples with the prior.

    Args:
        top_scores: best score of each held-out example over the whole catalogue.
        prior: threshold without a fit.

    Returns:
        Threshold, ``LOWEST`` to ``HIGHEST``.
    """
    count = len(top_scores)
    if count == 0:
        return prior
    fitted = float(np.quantile(np.asarray(top_scores), 1.0 - IN_SCOPE_KEPT))
    blended = (count * fitted + PRIOR_WEIGHT * prior) / (count + PRIOR_WEIGHT)
    return min(HIGHEST, max(LOWEST, blended))


def fit_half(coverages: Sequence[float]) -> float:
    """Half point of the lexical squash: the median coverage of examples by their own capability.

    Args:
        coverages: leave-one-out coverages; zeros say nothing and are left out.
    """
    positive = [coverage for coverage in coverages if coverage > 0.0]
    if not positive:
        return DEFAULT_HALF
    low, high = _HALF_RANGE
    return min(high, max(low, float(np.median(positive))))
