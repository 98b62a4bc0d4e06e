"""The integrals behind the weights of exponential and multistep samplers, and the weights a paper writes out."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from fastdiff.compiler.solvers.momentum import mix_weights
from fastdiff.compiler.solvers.quadrature import exponential_weights, lagrange_weights

Array = np.ndarray[Any, np.dtype[np.float64]]


def lagrange(nodes: list[float], j: int, u: Array) -> Array:
    value = np.ones_like(u)
    for i, node in enumerate(nodes):
        if i != j:
            value = value * (u - node) / (nodes[j] - node)
    return value


@pytest.mark.parametrize("k", [-1.0, 1.0, 2.0, 1.25])
@pytest.mark.parametrize("h", [1e-4, 0.03, 0.4, 1.5, 6.0])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_exponential_weights(count: int, h: float, k: float) -> None:
    """Against Gauss-Legendre of k e^{k u} L_j(u), for a predictor's nodes and for a corrector's."""
    points, weights = np.polynomial.legendre.leggauss(60)
    u = -h + 0.5 * h * (points + 1.0)
    for start in (-h, 0.0):
        nodes = [start - h * (0.9 + 0.1 * j) * j for j in range(count)]
        expected = [float(0.5 * h * (weights * k * np.exp(k * u) * lagrange(nodes, j, u)).sum()) for j in range(count)]
        got = exponential_weights(nodes, h, k)
        np.testing.assert_allclose(got, expected, rtol=1e-8, atol=1e-12 * max(map(abs, expected)))
        assert sum(got) == pytest.approx(-math.expm1(-k * h), rel=1e-10)


def test_exponential_weights_over_an_infinite_step() -> None:
    assert exponential_weights([-math.inf], math.inf, 1.5) == [1.0]


def test_lagrange_weights() -> None:
    """Equal steps give the Adams-Bashforth numbers; any steps integrate polynomials exactly."""
    np.testing.assert_allclose(
        lagrange_weights([3.0, 2.0, 1.0, 0.0], 3.0, 4.0), np.array([55, -59, 37, -9]) / 24, rtol=1e-12
    )
    nodes = [2.0, 3.1, 4.9, 8.0]
    weights = lagrange_weights(nodes, 2.0, 1.2)
    for power in range(4):
        exact = (1.2 ** (power + 1) - 2.0 ** (power + 1)) / (power + 1)
        assert sum(w * n**power for w, n in zip(weights, nodes, strict=True)) == pytest.approx(exact, rel=1e-10)


@pytest.mark.parametrize("beta", [0.3, 0.8, 1.0])
def test_ghvb_weights(beta: float) -> None:
    """The published mixtures for p = 1, 2, 3; beta = 1 is Adams-Bashforth."""
    assert mix_weights(1, beta) == [1.0]
    np.testing.assert_allclose(mix_weights(2, beta), np.array([2 + beta, -(2 - beta)]) / (2 * beta))
    three = np.array([18 + 5 * beta, -(24 - 8 * beta), 6 - beta]) / (12 * beta)
    np.testing.assert_allclose(mix_weights(3, beta), three)
    assert sum(mix_weights(4, beta)) == pytest.approx(1.0)
    np.testing.assert_allclose(mix_weights(4, 1.0), np.array([55, -59, 37, -9]) / 24)
