"""The sub-VP process, whose alpha^2 + sigma^2 is not 1. `schedules` names it. May import: clocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike

from .clocks import Array, Kind, VPSchedule


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
