"""Integrals of interpolating polynomials in closed form: the weights of every multistep sampler.

May import: nothing of the package. Nodes are given from the newest to the oldest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

SERIES = 1.0  # below this |k h| the recurrence of the moments cancels and their series is used


def exponential_weights(nodes: Sequence[float], h: float, k: float = 1.0) -> list[float]:
    """w_j = int_{-h}^0 k e^{k u} L_j(u) du, L_j the Lagrange polynomials of the nodes.

    nodes: lambda_j - lambda_t, with lambda_t the end of the step and h > 0 its length; h = inf with one node.
    The weights sum to 1 - e^{-k h}. k = 1 integrates the data prediction (Lu et al. 2022), k = 1 + tau^2 that of the
    SDE (Xue et al. 2023), k = -1 the noise prediction (Zhang and Chen 2023).
    """
    if len(nodes) == 1:
        return [-math.expm1(-k * h)]
    return _fit([u / h for u in nodes], [_moment(m, k * h) for m in range(len(nodes))])


def lagrange_weights(nodes: Sequence[float], start: float, stop: float) -> list[float]:
    """w_j = int_start^stop L_j(u) du, L_j the Lagrange polynomials of the nodes; they sum to stop - start."""
    length = stop - start
    moments = [length / (m + 1) for m in range(len(nodes))]
    return _fit([(u - start) / length for u in nodes], moments)


def _fit(nodes: Sequence[float], moments: Sequence[float]) -> list[float]:
    """The weights with sum_j w_j nodes_j^m = moments_m for every m."""
    powers = np.vander(np.asarray(nodes, dtype=np.float64), increasing=True).T
    return [float(w) for w in np.linalg.solve(powers, np.asarray(moments, dtype=np.float64))]


def _moment(m: int, z: float) -> float:
    """int_{-1}^0 z e^{z v} v^m dv: by parts, N_m = -(-1)^m e^{-z} - (m/z) N_{m-1}; its series where |z| is small."""
    if abs(z) < SERIES:
        return sum((-1.0) ** (n + m) * z ** (n + 1) / (math.factorial(n) * (n + m + 1)) for n in range(20))
    value = -math.expm1(-z)
    for j in range(1, m + 1):
        value = -((-1.0) ** j) * math.exp(-z) - j / z * value
    return value
