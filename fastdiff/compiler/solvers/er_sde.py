"""Extended reverse-time SDE solvers (Cui et al. 2023): the strength of the noise is a free function of rho."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from fastdiff.compiler.lin import Lin
from fastdiff.compiler.run import Run
from fastdiff.compiler.solvers.history import History, check_choice, check_order
from fastdiff.compiler.solvers.registry import solver

# phi(l) / l: a constant adds no noise, and the faster it grows the more of the noise is drawn anew
NOISES: dict[str, Callable[[float], float]] = {
    "ode": lambda _: 1.0,
    "sde": lambda rho: rho,
    "inverse": lambda rho: math.exp(-1.0 / rho) + 10.0,
    "power": lambda rho: math.sqrt(rho),
    "steep": lambda rho: rho**1.5,
    "log": lambda rho: rho**-0.1 * math.log10(1.0 + 100.0 * rho**1.5),
    "exp": lambda rho: math.exp(rho**0.3) + 10.0,
}
RIEMANN = {None: 0, "authors": 100, "comfyui": 200}
POINTS, WEIGHTS = np.polynomial.legendre.leggauss(40)


@solver("er_sde", order=2, exact_marginal={"s_noise": 1.0})
def er_sde(
    run: Run,
    x: Lin,
    order: int = 3,
    noise: str = "exp",
    form: str = "published",
    s_noise: float = 1.0,
    flavor: str | None = None,
) -> Lin:
    """ER-SDE-Solver of order 1..3 (Cui et al. 2023), l = sigma/alpha from l_s down to l_t.

    x'/alpha_t = r x/alpha_s + (1 - r) D + (l_t - l_s + phi(l_t) S) D' + ((l_t - l_s)^2/2 + phi(l_t) S_u) D''
    + sqrt(l_t^2 - l_s^2 r^2) s_noise z with r = phi(l_t)/phi(l_s), S = int_{l_t}^{l_s} dl/phi,
    S_u = int (l - l_s)/phi dl; D', D'' backward differences.
    noise: phi(l) = l ("ode", no noise), l^2 ("sde", the time reversal), l (e^(-1/l) + 10) ("inverse"), l^1.5 ("power"),
    l^2.5 ("steep"), l^0.9 log10(1 + 100 l^1.5) ("log"), l (e^(l^0.3) + 10) ("exp", the paper's choice).
    form: "published" takes the backward difference for D' and is globally of order 2; "corrected" adds
    (l_s - l_old) D''/2 to it in the third-order step. flavor "authors" or "comfyui": S and S_u as left Riemann sums of
    100 or 200 points instead of to rounding.
    """
    check_order("er_sde", order, 3)
    check_choice("er_sde", "noise", noise, tuple(NOISES))
    check_choice("er_sde", "form", form, ("published", "corrected"))
    check_choice("er_sde", "flavor", flavor, tuple(RIEMANN))
    growth = NOISES[noise]
    history = History(run, order)
    for i, s, t in run.intervals():
        denoised = run.denoise(x, s)
        if t.sigma == 0.0:
            history.order(i, t)
            return t.alpha * denoised
        history.add(s, denoised)
        order_here = history.order(i, t)
        vanishes = math.isinf(s.rho) and noise == "log"  # its two factors are 0 and inf there
        fading = 0.0 if vanishes else growth(t.rho) / growth(s.rho)
        carried = t.rho * fading
        ahead = (t.alpha * carried / s.sigma) * x + t.alpha * (1.0 - carried / s.rho) * denoised
        if order_here > 1:
            linear, curved = _integrals(growth, t.rho, s.rho, RIEMANN[flavor])
            ahead = ahead + t.alpha * _corrections(history, order_here, linear, curved, form == "corrected")
        added = s_noise * t.alpha * math.sqrt(max(0.0, t.rho**2 - carried**2))
        x = ahead + added * run.noise() if added > 0.0 else ahead
    return x


def _corrections(history: History, order: int, linear: float, curved: float, corrected: bool) -> Lin:
    """linear D' + curved D'' from the remembered D."""
    values, rho = history.values, [level.rho for level in history.levels]
    slope = (values[0] - values[1]) / (rho[0] - rho[1])
    if order == 2:
        return linear * slope
    curve = (slope - (values[1] - values[2]) / (rho[1] - rho[2])) * (2.0 / (rho[0] - rho[2]))
    if corrected:
        slope = slope + (0.5 * (rho[0] - rho[1])) * curve
    return linear * slope + curved * curve


def _integrals(growth: Callable[[float], float], low: float, high: float, riemann: int) -> tuple[float, float]:
    """low - high + phi(low) int dl/phi, and (low - high)^2/2 + phi(low) int (l - high)/phi dl, over [low, high].

    Gauss-Legendre in log l, where the integrands are smooth; riemann: so many left points instead, 0 for none.
    """
    half = 0.5 * math.log(high / low)
    points: NDArray[np.floating] = low * np.exp(half * (POINTS + 1.0))
    steps: NDArray[np.floating] = half * WEIGHTS
    if riemann:
        points = low + np.arange(riemann) * ((high - low) / riemann)
        steps = (high - low) / riemann / points
    over_phi = steps / np.array([growth(float(point)) for point in points])
    phi_low = low * growth(low)
    linear = low - high + phi_low * float(over_phi.sum())
    return linear, 0.5 * (low - high) ** 2 + phi_low * float((over_phi * (points - high)).sum())
