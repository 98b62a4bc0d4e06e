"""Measures of generated samples: the Fréchet distance of features, and agreement with the class asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def fit_gaussian(features: NDArray[Any]) -> tuple[Array, Array]:
    """Mean [F] and unbiased covariance [F, F] of features [N, F], float64.

    Raises: ValueError when features are not [N >= 2, F] or not finite.
    """
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"fit_gaussian: got features of shape {features.shape}, expected [N, F] with N at least 2")
    if not np.isfinite(features).all():
        raise ValueError("fit_gaussian: got non-finite features, expected finite ones; check the samples")
    return features.mean(axis=0), np.atleast_2d(np.cov(features, rowvar=False))


def frechet_distance(first: tuple[Array, Array], second: tuple[Array, Array]) -> float:
    """Squared Fréchet distance of two Gaussians, as FID reports it (Dowson & Landau 1982; Heusel et al. 2017).

    |m1 - m2|^2 + tr(C1) + tr(C2) - 2 tr((C1^1/2 C2 C1^1/2)^1/2)

    first, second: mean [F] and covariance [F, F], as `fit_gaussian` returns. Deterministic; never negative.
    Raises: ValueError for shapes that do not fit or a covariance that is not symmetric positive semi-definite.
    """
    (mean_1, cov_1), (mean_2, cov_2) = first, second
    if mean_1.shape != mean_2.shape or cov_1.shape != cov_2.shape or cov_1.shape != mean_1.shape * 2:
        raise ValueError(
            f"frechet_distance: got means {mean_1.shape}, {mean_2.shape} and covariances {cov_1.shape}, "
            f"{cov_2.shape}, expected [F], [F], [F, F], [F, F]"
        )
    root = _symmetric_root(cov_1)
    # The product is symmetric, so its root needs no general matrix square root, which loses half the digits.
    eigenvalues = _eigenvalues(root @ _checked(cov_2) @ root)
    cross = float(np.sqrt(eigenvalues).sum())
    gap = mean_1 - mean_2
    return max(0.0, float(gap @ gap + np.trace(cov_1) + np.trace(cov_2) - 2 * cross))


def class_agreement(predicted: NDArray[Any], asked: NDArray[Any], classes: int) -> tuple[float, Array]:
    """How often the predicted class is the one asked for: over all samples, and [classes] for each class.

    predicted, asked: [N] integers. A class never asked for has NaN. Raises: ValueError when lengths differ or N is 0.
    """
    predicted, asked = np.asarray(predicted), np.asarray(asked)
    if predicted.ndim != 1 or predicted.shape != asked.shape or not len(asked):
        raise ValueError(
            f"class_agreement: got shapes {predicted.shape} and {asked.shape}, expected two equal [N] with N at least 1"
        )
    right = (predicted == asked).astype(np.float64)
    count = np.bincount(asked, minlength=classes)
    with np.errstate(invalid="ignore"):
        return float(right.mean()), np.bincount(asked, right, minlength=classes) / count


def _checked(cov: Array) -> Array:
    if not np.allclose(cov, cov.T, rtol=1e-8, atol=1e-10 * max(1e-300, float(np.abs(cov).max()))):
        raise ValueError("frechet_distance: got a covariance that is not symmetric; pass what fit_gaussian returns")
    _eigenvalues(cov)
    return cov


def _eigenvalues(matrix: Array) -> Array:
    """Eigenvalues of a symmetric matrix, rounding below zero removed."""
    values = np.asarray(np.linalg.eigvalsh((matrix + matrix.T) / 2), dtype=np.float64)
    return _clip(values)


def _symmetric_root(cov: Array) -> Array:
    values, vectors = np.linalg.eigh(_checked(cov))
    return (vectors * np.sqrt(_clip(values))) @ vectors.T


def _clip(values: NDArray[Any]) -> Array:
    if values.min() < -1e-8 * max(1e-300, float(np.abs(values).max())):
        raise ValueError(
            f"frechet_distance: got a covariance with eigenvalue {values.min():.3g}, expected none below zero; "
            "pass what fit_gaussian returns"
        )
    return np.maximum(values, 0.0)
