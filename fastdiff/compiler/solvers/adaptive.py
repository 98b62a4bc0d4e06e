"""Samplers with a step size of their own: DPM-Solver-12 and -23, and Dormand-Prince 5(4).

Both run on y = x/alpha against rho = sigma/alpha, where the probability-flow ODE is dy/drho = E, E = (y - D)/rho the
noise estimate (Karras et al. 2022, eq. 4 with s = 1), and measure a step by h = log(rho_s/rho_t).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real

from fastdiff.compiler.adaptive import FIRST_RHO, Method, Trial
from fastdiff.compiler.lin import Lin
from fastdiff.compiler.run import Run
from fastdiff.compiler.solvers.registry import solver
from fastdiff.compiler.solvers.steps import half_log_snr_step, noise_estimate, slope_step
from fastdiff.compiler.step_control import Control
from fastdiff.process.schedules import Level


@solver("dpm_adaptive", order=3, denoises={"denoise": True}, adaptive=True)
def dpm_adaptive(
    top: Level,
    bottom: Level,
    order: int = 3,
    rtol: float = 0.05,
    atol: float = 0.0078,
    h_init: float = 0.05,
    pcoeff: float = 0.0,
    icoeff: float = 1.0,
    dcoeff: float = 0.0,
    accept_safety: float = 0.81,
    eta: float = 0.0,
    s_noise: float = 1.0,
    denoise: bool = True,
    max_steps: int = 1000,
) -> Method:
    """DPM-Solver-12 or -23 with adaptive steps (Lu et al. 2022a, appendix C; k-diffusion's sample_dpm_adaptive).

    Two solutions of order 1 and 2, or 2 and 3, share their evaluations (2 or 3 a step); their difference is the error
    of the lower one and the higher one goes on. eta: each step is ancestral, down to rho_down, then noise. denoise: end
    in x' = D, one evaluation more; False ends at the last noisy level, as k-diffusion does. k-diffusion takes the norm
    of the error over its whole batch; here every sample has steps of its own, as there in a batch of one.
    """
    del top, bottom
    if order not in (2, 3):
        raise ValueError(f"dpm_adaptive: order must be 2 or 3, got {order!r}")
    control = Control(1.5 if eta else float(order), h_init, pcoeff, icoeff, dcoeff, accept_safety)
    _check("dpm_adaptive", rtol, atol, control, max_steps)
    return _DPMSolver(rtol, atol, control, max_steps, 2, 1, (eta, s_noise), order, denoise)


@solver("rk45", order=5, denoises={"denoise": True}, adaptive=True)
def rk45(
    top: Level,
    bottom: Level,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    h_init: float = 0.1,
    pcoeff: float = 0.2,
    icoeff: float = 0.65,
    dcoeff: float = 0.0,
    accept_safety: float = 0.9,
    denoise: bool = True,
    max_steps: int = 1000,
) -> Method:
    """Dormand-Prince 5(4) with PI step control on the probability-flow ODE (Dormand and Prince 1980; Hairer et al.).

    A step is a Runge-Kutta step of y in rho, in which a constant D is solved exactly, while its size is measured in
    log rho, in which the solution changes at an even pace. 6 evaluations a step: the last one is the first one of the
    next (FSAL), and of the denoise at the end. Song et al. 2021b use RK45 with rtol = atol = 1e-5 too, in their time. A
    network in half precision is not smooth to 1e-5; give it 1e-2. pcoeff and icoeff are those of Hairer and Wanner's
    dopri5 (beta = 0.04); a step is accepted where the error is within the tolerance, and 0.9^5 of it is aimed at.
    """
    del top, bottom
    control = Control(5.0, h_init, pcoeff, icoeff, dcoeff, accept_safety, aim=0.9**5)
    _check("rk45", rtol, atol, control, max_steps)
    return _DormandPrince(rtol, atol, control, max_steps, 2, 0, (0.0, 0.0), denoise)


@dataclass(frozen=True)
class _DPMSolver(Method):
    """Held: y, and the lower solution of the last accepted step.

    y_1 = y + drho E_s. Order 2, m at h/2: y_2 = y + drho E_m. Order 3, m and u at h/3 and 2h/3, b(h) = (e^h - 1)/h - 1:
    y_u = y + drho_u E_s - 2 rho_u b(2h/3) (E_m - E_s); y_2 = y_1 + 3/2 drho (E_m - E_s); y_3 = y_1 - 3/2 rho_t b(h)
    (E_u - E_s).
    """

    order: int
    denoise: bool

    def start(self, run: Run, x: Lin, top: Level) -> tuple[Lin, ...]:
        y = _with_signal(run, x, top)
        return y, y

    def step(self, run: Run, s: Level, t: Level, *held: Lin) -> Trial:
        x, length = held[0], t.rho - s.rho
        first = self._noise(run, x, s)
        m = run.level_between(s, t, 0.5 if self.order == 2 else 1.0 / 3.0)
        middle = self._noise(run, slope_step(x, first, s, m), m)
        if self.order == 2:
            return Trial(x + length * middle, length * (first - middle), (x + length * first,))
        u, h, slope = run.level_between(s, t, 2.0 / 3.0), half_log_snr_step(s, t), middle - first
        ahead = slope_step(x, first, s, u) - (2.0 * u.sigma * _bend(2.0 / 3.0 * h)) * slope
        base, bent = run.keep(x + length * first), run.keep(1.5 * length * slope)
        slope = (1.5 * t.sigma * _bend(h)) * (self._noise(run, ahead, u) - first)
        return Trial(base - slope, bent + slope, (base + bent,))

    def finish(self, run: Run, bottom: Level, *held: Lin) -> Lin:
        return run.denoise(held[0], bottom) if self.denoise else held[0]

    def _noise(self, run: Run, x: Lin, s: Level) -> Lin:
        return run.keep(noise_estimate(x, run.denoise(x, s), s))


# Dormand and Prince 1980: nodes, stages, and the fifth- minus the fourth-order weights
_NODES = (0.2, 0.3, 0.8, 8.0 / 9.0, 1.0, 1.0)
_STAGES = (
    (1.0 / 5.0,),
    (3.0 / 40.0, 9.0 / 40.0),
    (44.0 / 45.0, -56.0 / 15.0, 32.0 / 9.0),
    (19372.0 / 6561.0, -25360.0 / 2187.0, 64448.0 / 6561.0, -212.0 / 729.0),
    (9017.0 / 3168.0, -355.0 / 33.0, 46732.0 / 5247.0, 49.0 / 176.0, -5103.0 / 18656.0),
    (35.0 / 384.0, 0.0, 500.0 / 1113.0, 125.0 / 192.0, -2187.0 / 6784.0, 11.0 / 84.0),
)
_ERROR = (71.0 / 57600.0, 0.0, -71.0 / 16695.0, 71.0 / 1920.0, -17253.0 / 339200.0, 22.0 / 525.0, -1.0 / 40.0)


@dataclass(frozen=True)
class _DormandPrince(Method):
    """Held: y, and D there, with which a step begins and the run ends."""

    denoise: bool

    def start(self, run: Run, x: Lin, top: Level) -> tuple[Lin, ...]:
        y = _with_signal(run, x, top)
        s = top if top.alpha > 0.0 else run.level_from_rho(FIRST_RHO)
        return y, run.denoise(y, Level(1.0, s.rho, s.time))

    def step(self, run: Run, s: Level, t: Level, *held: Lin) -> Trial:
        y, slopes = held[0], [noise_estimate(held[0], held[1], s)]
        length = t.rho - s.rho

        def combined(weights: tuple[float, ...]) -> Lin:
            parts = [w * slope for w, slope in zip(weights, slopes, strict=True) if w != 0.0]
            return sum(parts[1:], parts[0])

        for node, weights in zip(_NODES, _STAGES, strict=True):
            level = t if node == 1.0 else run.level_from_rho(s.rho + node * length)
            ahead = y + length * combined(weights)
            if len(slopes) == len(_ERROR) - 1:
                error = run.keep(length * combined(_ERROR[:-1]))
            denoised = run.denoise(ahead, level)
            slopes.append(run.keep(noise_estimate(ahead, denoised, level)))
        return Trial(ahead, error + (length * _ERROR[-1]) * slopes[-1], (denoised,))

    def finish(self, run: Run, bottom: Level, *held: Lin) -> Lin:
        return held[1] if self.denoise else held[0]


def _with_signal(run: Run, x: Lin, top: Level) -> Lin:
    """y at the first level; from alpha = 0, where x is noise alone, y = D + FIRST_RHO x/sigma by one evaluation.

    Exact as sigma/alpha grows without bound: the noise in x then is all that is known of the end.
    """
    return x if top.alpha > 0.0 else run.denoise(x, top) + (FIRST_RHO / top.sigma) * x


def _bend(h: float) -> float:
    """(e^h - 1)/h - 1 for h >= 0."""
    return math.expm1(h) / h - 1.0 if h > 1e-4 else h * (0.5 + h / 6.0 + h * h / 24.0)


def _check(name: str, rtol: float, atol: float, control: Control, max_steps: int) -> None:
    """ValueError unless the tolerances and the controller can lead anywhere."""

    def positive(option: str, value: float) -> None:
        if not (isinstance(value, Real) and 0.0 < value < math.inf):
            raise ValueError(f"{name}: {option} must be finite and above 0, got {value!r}")

    positive("rtol", rtol)
    positive("atol", atol)
    positive("h_init", control.h_init)
    if not 0.0 < control.accept_safety <= 1.0:
        raise ValueError(f"{name}: accept_safety must be in (0, 1], got {control.accept_safety!r}")
    if not control.pcoeff + control.icoeff + control.dcoeff > 0.0:
        raise ValueError(f"{name}: pcoeff + icoeff + dcoeff must be above 0, or a large error would not shorten a step")
    if max_steps < 1:
        raise ValueError(f"{name}: max_steps must be 1 or more, got {max_steps!r}")
