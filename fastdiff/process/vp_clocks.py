"""The clock of the variance-preserving SDE and of its sub-VP variant. `schedules` names them. May import: clocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike

from .clocks import Array, Kind, Schedule


@dataclass(frozen=True, repr=False)
class VPSchedule(Schedule):
    """dx = -beta(t)/2 x dt + sqrt(beta(t)) dW with beta(t) = beta_min + beta_d t (Song et al. 2021, eq. 11)."""

    beta_min: float
    beta_d: float
    t_max: float

    kind: ClassVar[Kind] = "vp"

    def __post_init__(self) -> None:
        total = self._integral(self.t_max)
        if total > 700:
            raise ValueError(f"{self!r}: beta integrates to {total:.6g}, and exp of it overflows. Keep it below 700.")

    @property
    def time_range(self) -> tuple[float, float]:
        return 0.0, self.t_max

    def _integral(self, time: Any) -> Any:
        """The integral of beta from 0 to t."""
        return (self.beta_min + 0.5 * self.beta_d * time) * time

    def _time_of_integral(self, total: Array) -> Array:
        return 2 * total / (self.beta_min + np.sqrt(self.beta_min**2 + 2 * self.beta_d * total))

    def _rho(self, time: Array) -> Array:
        return np.sqrt(np.expm1(self._integral(time)))

    def _time(self, rho: Array) -> Array:
        return self._time_of_integral(np.log1p(np.square(rho)))

    def drift(self, time: ArrayLike) -> Array:
        return -0.5 * (self.beta_min + self.beta_d * self._checked(time))

    def diffusion(self, time: ArrayLike) -> Array:
        return np.sqrt(self.beta_min + self.beta_d * self._checked(time))


@dataclass(frozen=True, repr=False)
class SubVPSchedule(VPSchedule):
    """alpha = e^(-B/2), sigma = 1 - e^(-B) with B = the integral of beta from 0 to t (Song et al. 2021, eq. 29).

    So sigma = 1 - alpha^2 and rho = sigma/alpha = 2 sinh(B/2).
    """

    kind: ClassVar[Kind] = "sub_vp"

    def scales(self, rho: ArrayLike) -> tuple[Array, Array]:
        """alpha = 2/(rho + sqrt(rho^2 + 4)), the root of alpha^2 + rho alpha = 1, and sigma = 1 - alpha^2."""
        rho = np.asarray(rho, dtype=np.float64)
        alpha = 2.0 / (rho + np.hypot(rho, 2.0))
        finite = np.isfinite(rho)
        return alpha, np.multiply(rho, alpha, out=np.ones_like(rho), where=finite)[()]

    def _rho(self, time: Array) -> Array:
        return 2.0 * np.sinh(0.5 * self._integral(time))

    def _time(self, rho: Array) -> Array:
        return self._time_of_integral(2.0 * np.arcsinh(0.5 * rho))

    def diffusion(self, time: ArrayLike) -> Array:
        """g = sqrt(beta(t) (1 - e^(-2 B))) (Song et al. 2021, eq. 28)."""
        times = self._checked(time)
        return np.sqrt(-(self.beta_min + self.beta_d * times) * np.expm1(-2.0 * self._integral(times)))
