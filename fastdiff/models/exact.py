"""Closed-form denoisers: what a perfect network would answer, for data whose law is known.

May import: process. Each is called as D(x, level) = E[x0 | alpha x0 + sigma n = x], with x a float64 NumPy array or a
torch tensor of any floating dtype, and answers in kind: the oracles that solvers and executors are tested against.
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from fastdiff.process.schedules import Level

V = TypeVar("V", NDArray[np.float64], torch.Tensor)


class Gaussian:
    """Data N(mean, variance): D = mu + alpha v (x - alpha mu) / (alpha^2 v + sigma^2), v per eigenvector.

    mean: broadcasts to x. variance: 0 or more, broadcasts to x, one per element (0 everywhere is a point mass).
    covariance: [d, d] instead of variance; then x is [..., d]. Raises ValueError on anything else.
    """

    def __init__(
        self, mean: ArrayLike = 0.0, variance: ArrayLike | None = None, covariance: ArrayLike | None = None
    ) -> None:
        if (variance is None) == (covariance is None):
            raise ValueError("Gaussian takes variance (one per element) or covariance ([d, d]): give one of them")
        self.mean = np.asarray(mean, dtype=np.float64)
        self.axes: NDArray[np.float64] | None = None
        if covariance is None:
            self.variance = np.asarray(variance, dtype=np.float64)
        else:
            matrix = np.asarray(covariance, dtype=np.float64)
            if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not np.allclose(matrix, matrix.T):
                raise ValueError(f"covariance must be a symmetric [d, d] matrix, got shape {matrix.shape}")
            self.variance, self.axes = np.linalg.eigh(matrix)
        if not (self.variance >= -1e-12 * np.abs(self.variance).max(initial=1.0)).all():
            raise ValueError(f"a variance must be 0 or more, got {self.variance.min():.6g}")
        self.variance = np.maximum(self.variance, 0.0)

    def __call__(self, x: V, level: Level) -> V:
        """E[x0 | x]; a linear function of x."""
        total = level.alpha**2 * self.variance + level.sigma**2
        gain = np.divide(level.alpha * self.variance, total, out=np.zeros_like(total), where=total > 0.0)
        return self._map(x, gain, level.alpha, 1.0)

    def solve_ode(self, x: V, s: Level, t: Level) -> V:
        """The exact end at level t of the probability-flow ODE that passes x at level s.

        x_t = alpha_t mu + sqrt((sigma_t^2 + v alpha_t^2) / (sigma_s^2 + v alpha_s^2)) (x_s - alpha_s mu), v per
        eigenvector of the covariance.
        """
        after = t.sigma**2 + self.variance * t.alpha**2
        return self._map(x, np.sqrt(after / (s.sigma**2 + self.variance * s.alpha**2)), s.alpha, t.alpha)

    def _map(self, x: V, gain: NDArray[np.float64], before: float, after: float) -> V:
        """after mu + gain (x - before mu), gain along the eigenvectors."""
        mean: Any = _like(self.mean, x)
        moved: Any = x - before * mean
        if self.axes is None:
            moved = _like(gain, x) * moved
        else:
            axes: Any = _like(self.axes, x)
            moved = ((moved @ axes) * _like(gain, x)) @ axes.T
        return after * mean + moved


class Mixture:
    """Data sum_k w_k N(mean_k, v_k I): D = sum_k p_k(x) D_k(x), D_k the Gaussian's and p_k the posterior of k.

    p_k is proportional to w_k N(x; alpha mean_k, alpha^2 v_k + sigma^2). weights: [K], above 0, any sum.
    means: [K, *shape]; x is then [B, *shape]. variances: [K] or one number, 0 or more.
    """

    def __init__(self, weights: ArrayLike, means: ArrayLike, variances: ArrayLike) -> None:
        self.means = np.asarray(means, dtype=np.float64)
        count = len(self.means)
        self.weights = np.asarray(weights, dtype=np.float64)
        self.variances = np.broadcast_to(np.asarray(variances, dtype=np.float64), (count,)).copy()
        if self.weights.shape != (count,) or not (self.weights > 0).all() or not (self.variances >= 0).all():
            raise ValueError(
                f"a mixture of {count} means needs {count} weights above 0 and {count} variances of 0 or more, "
                f"got weights {self.weights} and variances {self.variances}"
            )
        self.weights = self.weights / self.weights.sum()

    def __call__(self, x: V, level: Level) -> V:
        """E[x0 | x]. The level must be noisy (sigma > 0) where a variance is 0."""
        flat: Any = x.reshape(len(x), -1)
        xp: Any = torch if isinstance(x, torch.Tensor) else np
        means = self.means.reshape(len(self.means), -1)
        total = level.alpha**2 * self.variances + level.sigma**2
        if not (total > 0).all():
            raise ValueError(f"a point has no density at sigma = 0 ({level}); evaluate at a noisy level")
        shift: Any = flat[:, None, :] - _like(level.alpha * means, x)
        prior = np.log(self.weights) - 0.5 * means.shape[1] * np.log(total)
        logits = _like(prior, x) - 0.5 * (shift * shift).sum(-1) / _like(total, x)
        posterior = xp.exp(logits - xp.amax(logits, -1)[:, None])
        posterior = posterior / posterior.sum(-1)[:, None]
        gain = _like(level.alpha * self.variances / total, x)
        parts = _like(means, x) + gain[:, None] * shift
        denoised = (posterior[:, :, None] * parts).sum(1)
        return denoised.reshape(x.shape)


class Points(Mixture):
    """A finite data set, each point as likely as another: D = sum_i softmax_i(-|x - alpha x_i|^2 / (2 sigma^2)) x_i.

    points: [K, *shape]. What a network that has memorised its data answers; one point is the point mass D == x_1.
    """

    def __init__(self, points: ArrayLike) -> None:
        super().__init__(np.ones(len(np.asarray(points))), points, 0.0)


def _like(constant: NDArray[np.float64], x: NDArray[np.float64] | torch.Tensor) -> Any:
    """A constant as an array of x's kind, dtype and device."""
    if isinstance(x, torch.Tensor):
        return torch.as_tensor(constant, dtype=x.dtype, device=x.device)
    return constant
