"""How errors, spreads and distances are computed, each in one place."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from analysis.metrics.columns import Floats, Ints


def relative_difference(value: float | None, reference: float | None) -> float | None:
    """(value - reference) / reference. None where one is not known, or the reference is 0."""
    return (value - reference) / reference if value is not None and reference else None


def relative_errors(sim: Ints | Floats, real: Ints | Floats) -> Floats:
    """(sim - real) / real, element by element. NaN where it is undefined."""
    known = np.where(real > 0, real, np.nan)
    return np.asarray((sim - known) / known)


def mean_of_known(values: Floats) -> float | None:
    """The mean without NaNs. None if there is nothing else."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else None


def relative_spread(values: Sequence[float | None]) -> float | None:
    """(max - min) / mean of the values of several runs. None of a single run, or where a run has no value."""
    known = [value for value in values if value is not None]
    if len(values) < 2 or len(known) < len(values) or not sum(known):
        return None
    return (max(known) - min(known)) / (sum(known) / len(known))


def ks_distance(ours: Floats, theirs: Floats) -> float | None:
    """The Kolmogorov-Smirnov distance of two distributions. None if one is empty."""
    from scipy.stats import ecdf

    if not (len(ours) and len(theirs)):
        return None
    values = np.concatenate([ours, theirs])
    return float(np.abs(ecdf(ours).cdf.evaluate(values) - ecdf(theirs).cdf.evaluate(values)).max())
