"""The Fréchet distance against closed forms, and class agreement by hand."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from fastdiff.training.evaluation.metrics import class_agreement, fit_gaussian, frechet_distance


def rotation(size: int, seed: int) -> NDArray[np.float64]:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))[0]


def test_one_dimension_is_difference_of_means_and_deviations() -> None:
    first, second = (np.array([1.5]), np.array([[4.0]])), (np.array([-0.5]), np.array([[0.25]]))
    assert frechet_distance(first, second) == pytest.approx(2.0**2 + (2.0 - 0.5) ** 2, rel=1e-12)


def test_commuting_covariances_have_a_closed_form() -> None:
    """C1 = U a U', C2 = U b U': the distance is |m|^2 + sum (sqrt a - sqrt b)^2."""
    rng, axes = np.random.default_rng(1), rotation(24, 2)
    a, b, gap = rng.uniform(0.01, 5, 24), rng.uniform(0.01, 5, 24), rng.standard_normal(24)
    got = frechet_distance((gap, axes * a @ axes.T), (np.zeros(24), axes * b @ axes.T))
    assert got == pytest.approx(gap @ gap + np.sum((np.sqrt(a) - np.sqrt(b)) ** 2), rel=1e-10)


def test_two_by_two_closed_form_without_commuting() -> None:
    """For 2 x 2, tr (C1 C2)^1/2 = sqrt(tr(C1 C2) + 2 sqrt(det C1 det C2))."""
    c1, c2 = np.array([[2.0, 0.7], [0.7, 1.0]]), np.array([[0.5, -0.3], [-0.3, 3.0]])
    cross = np.sqrt(np.trace(c1 @ c2) + 2 * np.sqrt(np.linalg.det(c1) * np.linalg.det(c2)))
    expected = np.trace(c1) + np.trace(c2) - 2 * cross
    assert frechet_distance((np.zeros(2), c1), (np.zeros(2), c2)) == pytest.approx(expected, rel=1e-10)


def test_zero_on_itself_even_when_singular() -> None:
    features = np.random.default_rng(3).standard_normal((200, 5)) @ np.random.default_rng(4).standard_normal((5, 12))
    gaussian = fit_gaussian(features)
    assert frechet_distance(gaussian, gaussian) == pytest.approx(0.0, abs=1e-6)


def test_symmetric_and_invariant_under_rotation() -> None:
    rng, turn = np.random.default_rng(5), rotation(6, 6)
    first, second = rng.standard_normal((50, 6)), rng.standard_normal((60, 6)) * 2 + 1
    distance = frechet_distance(fit_gaussian(first), fit_gaussian(second))
    assert frechet_distance(fit_gaussian(second), fit_gaussian(first)) == pytest.approx(distance, rel=1e-10)
    assert frechet_distance(fit_gaussian(first @ turn), fit_gaussian(second @ turn)) == pytest.approx(
        distance, rel=1e-10
    )


def test_fit_of_samples_reaches_the_truth() -> None:
    rng = np.random.default_rng(7)
    factor = rng.standard_normal((4, 4))
    samples = rng.standard_normal((200_000, 4)) @ factor + 3
    assert frechet_distance(fit_gaussian(samples), (np.full(4, 3.0), factor.T @ factor)) < 1e-3


def test_bad_features() -> None:
    with pytest.raises(ValueError, match=r"got features of shape \(1, 3\)"):
        fit_gaussian(np.zeros((1, 3)))
    with pytest.raises(ValueError, match="non-finite"):
        fit_gaussian(np.array([[0.0, np.nan], [1.0, 2.0]]))


def test_bad_gaussians() -> None:
    good = np.zeros(2), np.eye(2)
    with pytest.raises(ValueError, match="expected"):
        frechet_distance(good, (np.zeros(3), np.eye(3)))
    with pytest.raises(ValueError, match="not symmetric"):
        frechet_distance(good, (np.zeros(2), np.array([[1.0, 0.5], [0.0, 1.0]])))
    with pytest.raises(ValueError, match="eigenvalue -1"):
        frechet_distance(good, (np.zeros(2), np.diag([1.0, -1.0])))


def test_class_agreement() -> None:
    overall, each = class_agreement(np.array([0, 1, 1, 3]), np.array([0, 1, 0, 1]), classes=3)
    assert overall == 0.5
    np.testing.assert_array_equal(each, [0.5, 0.5, np.nan])
    with pytest.raises(ValueError, match=r"got shapes \(2,\) and \(3,\)"):
        class_agreement(np.zeros(2, int), np.zeros(3, int), classes=3)
