"""Arithmetic of measured values: percentiles, and how a cost grows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Summary:
    """The number and the percentiles of values, in their unit."""

    count: int
    p50: float
    p95: float
    p99: float


def percentile(values: Sequence[float], share: float) -> float:
    """Return the nearest rank: the smallest value that at least this share (0 to 1) of the values do not exceed.

    The result is always a measured value; of fewer than 100 values the 99th percentile is the largest.
    """
    if not values:
        raise ValueError("there is no percentile of nothing")
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def summary(values: Sequence[float]) -> Summary:
    return Summary(len(values), percentile(values, 0.5), percentile(values, 0.95), percentile(values, 0.99))


def median(values: Sequence[float]) -> float:
    return percentile(values, 0.5)


def growth(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Return the exponent of the power law that fits best (least squares over logarithms): 0 is flat, 1 is linear.

    Raise ValueError for fewer than two sizes, and for sizes or costs that are not positive.
    """
    if len(sizes) != len(costs) or len(set(sizes)) < 2:
        raise ValueError("growth needs the costs of two sizes or more")
    if min(*sizes, *costs) <= 0:
        raise ValueError("sizes and costs must be positive")
    x, y = [math.log(size) for size in sizes], [math.log(cost) for cost in costs]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)


def steepest(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Return the larger exponent, of the fit over all sizes or of the last step, which shows a late explosion."""
    return max(growth(sizes, costs), growth(sizes[-2:], costs[-2:]))
