"""Grids by other rules than those of `grids`, which names them all.

Each function takes a schedule and the number of levels and returns descending times on the schedule's clock, without
the clean level; steps = 1 is the schedule's noisiest level. sigma_min, sigma_max: ends of sigma/alpha, as in karras.
"""

from __future__ import annotations

import math

import numpy as np

from .clocks import Array, Schedule
from .spacing import at_rhos, clock, ends, spaced

# sigma/alpha of Align Your Steps at 10 steps (Sabour et al. 2024)
AYS = {
    "sd15": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152),
    "sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113),
    "svd": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034),
}
AYS_SLACK = 0.01  # how far, relatively, a schedule's top may be from the table's
SERIES_TERMS = 64
BISECTIONS = 60


def quadratic(schedule: Schedule, steps: int, *, top: float = 1.0) -> Array:
    """Uniform in the square root of the clock (the code of Song et al. 2021, skip_type "quad").

    top: fraction of the clock to start from; theirs is 0.8, and 1 by default starts from the noisiest level.
    """
    if not 0 < top <= 1:
        raise ValueError(f"top must be within (0, 1], got {top!r}.")
    low, high = clock(schedule)
    times = np.linspace(math.sqrt(high * top), math.sqrt(low), steps) ** 2
    return _between(times, low, high * top if steps > 1 else high)


def polyexponential(
    schedule: Schedule,
    steps: int,
    *,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    rho: float = 1.0,
) -> Array:
    """log(sigma/alpha) from one end to the other along ramp^rho, ramp from 1 to 0 (k-diffusion); 1 is exponential."""
    _positive("rho", rho)
    low, high, top = ends(schedule, steps, sigma_min, sigma_max)
    ramp = np.linspace(1, 0, steps) ** rho
    return at_rhos(schedule, np.exp(ramp * math.log(high / low)) * low, low, top)


def vp(
    schedule: Schedule,
    steps: int,
    *,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    beta_d: float = 19.9,
    beta_min: float = 0.1,
) -> Array:
    """Uniform in the t of sigma/alpha = sqrt(e^(beta_d t^2/2 + beta_min t) - 1) (Karras et al. 2022, Table 1, VP)."""
    _positive("beta_d", beta_d)
    _positive("beta_min", beta_min)

    def time(rho: float) -> float:
        total = math.log1p(rho**2)
        return 2.0 * total / (beta_min + math.sqrt(beta_min**2 + 2.0 * beta_d * total))

    def rho(time: Array) -> Array:
        return np.sqrt(np.expm1((0.5 * beta_d * time + beta_min) * time))

    return spaced(schedule, steps, sigma_min, sigma_max, time, rho)


def beta(schedule: Schedule, steps: int, *, a: float = 0.6, b: float = 0.6) -> Array:
    """Times at the quantiles 1 - i/steps of a Beta(a, b) law on the clock (Lee et al. 2024).

    On a discrete schedule rounded to indices, unless two of them would fall together.
    """
    low, high = clock(schedule)
    times = low + (high - low) * beta_quantile(1.0 - np.arange(steps) / steps, a, b)
    rounded = np.rint(times)
    return rounded if schedule.steps is not None and len(set(rounded)) == steps else times


def beta_sigma(
    schedule: Schedule,
    steps: int,
    *,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    a: float = 0.6,
    b: float = 0.6,
) -> Array:
    """sigma/alpha itself at even quantiles of a Beta(a, b) law between its ends, both included (diffusers' sigmas)."""
    low, high, top = ends(schedule, steps, sigma_min, sigma_max)
    return at_rhos(schedule, low + (high - low) * beta_quantile(np.linspace(1, 0, steps), a, b), low, top)


def laplace(
    schedule: Schedule,
    steps: int,
    *,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    mu: float = 0.0,
    b: float = 0.5,
) -> Array:
    """log(sigma/alpha) at even quantiles of a Laplace(mu, b) law cut off at the ends (Hang et al. 2024).

    Away from the ends: mu - b sign(1/2 - x) log(1 - 2 |x - 1/2|) for x uniform.
    """
    _positive("b", b)

    def rank(rho: float) -> float:
        z = (math.log(rho) - mu) / b
        return 0.5 * math.exp(z) if z < 0 else 1.0 - 0.5 * math.exp(-z)

    def rho(rank: Array) -> Array:
        tail = np.maximum(np.minimum(rank, 1.0 - rank), np.finfo(np.float64).tiny)
        return np.exp(mu + b * np.sign(rank - 0.5) * -np.log(2.0 * tail))

    return spaced(schedule, steps, sigma_min, sigma_max, rank, rho)


def linear_quadratic(
    schedule: Schedule, steps: int, *, threshold: float = 0.025, linear_steps: int | None = None
) -> Array:
    """Mochi's rule: the first half of the steps goes linearly down by `threshold` of the clock, the rest quadratically.

    With n linear of N steps: s_i = threshold i/n, then c i^2 + d i + e with c = (n - threshold N)/(n (N - n)^2),
    d = threshold/n - 2 (n - threshold N)/(N - n)^2, e = c n^2, and times high - (high - low) s_i.
    """
    if not 0 < threshold < 1:
        raise ValueError(f"threshold must be within (0, 1), got {threshold!r}.")
    n = max(1, steps // 2) if linear_steps is None else linear_steps
    if steps > 1 and not 1 <= n < steps:
        raise ValueError(f"linear_steps must be an integer of 1..{steps - 1}, got {linear_steps!r}.")
    low, high = schedule.time_range
    i = np.arange(steps, dtype=np.float64)
    line = threshold * i / n
    if steps == 1:
        return np.array([high])
    rest = n - threshold * steps
    c, d = rest / (n * (steps - n) ** 2), threshold / n - 2.0 * rest / (steps - n) ** 2
    return high - (high - low) * np.where(i < n, line, c * i**2 + d * i + c * n**2)


def kl_optimal(
    schedule: Schedule, steps: int, *, sigma_min: float | None = None, sigma_max: float | None = None
) -> Array:
    """Uniform in arctan(sigma/alpha) (Sabour et al. 2024: optimal for Gaussian data)."""
    return spaced(schedule, steps, sigma_min, sigma_max, math.atan, np.tan)


def simple(schedule: Schedule, steps: int) -> Array:
    """Indices T - 1 - floor(i T/steps) (ComfyUI's "simple"); on a continuous clock the same as trailing."""
    if schedule.steps is None:
        low, high = schedule.time_range
        return high - np.arange(steps, dtype=np.float64) * ((high - low) / steps)
    return schedule.steps - 1 - np.floor(np.arange(steps) * (schedule.steps / steps))


def normal(schedule: Schedule, steps: int) -> Array:
    """Uniform on the clock, both ends included and nothing rounded (ComfyUI's "normal")."""
    low, high = clock(schedule)
    return np.linspace(high, low, steps)


def sgm_uniform(schedule: Schedule, steps: int) -> Array:
    """Uniform on the clock, the last of steps + 1 levels left out, nothing rounded (Stability's generative-models)."""
    low, high = clock(schedule)
    return np.linspace(high, low, steps + 1)[:-1]


def ddim_uniform(schedule: Schedule, steps: int) -> Array:
    """Indices 1 + k (T // steps), the noisiest left out (ComfyUI's "ddim_uniform").

    Always `steps` levels; where T/steps is not an integer theirs may be more. On a continuous clock: leading.
    """
    low, high = clock(schedule)
    if steps == 1:
        return np.array([high])
    k = np.arange(steps - 1, -1, -1, dtype=np.float64)
    return low + k * ((high - low) / steps) if schedule.steps is None else 1 + k * (schedule.steps // steps)


def ays(schedule: Schedule, steps: int, *, model: str = "sd15") -> Array:
    """Align Your Steps (Sabour et al. 2024): published levels, log-linear between them for other than 10 steps.

    model: "sd15", "sdxl" (for scaled_linear) or "svd" (for edm with sigma_max = 700). The first level is the schedule's
    own top. Raises ValueError for a schedule whose top is not the table's, or that ends above the table's last level.
    """
    if model not in AYS:
        raise ValueError(f"model must be one of {', '.join(AYS)}, got {model!r}.")
    table = np.array(AYS[model])
    top = schedule.rho_max
    if abs(top / table[0] - 1) > AYS_SLACK or schedule.rho_min > table[-1]:
        raise ValueError(
            f"Align Your Steps has no levels for {schedule!r}: its table for {model!r} goes from sigma/alpha = "
            f"{table[0]:g} to {table[-1]:g}, this schedule from {top:.6g} to {schedule.rho_min:.6g}. Use "
            "scaled_linear() for sd15 and sdxl, edm(sigma_max=700) for svd, or another grid: karras, or gits, which "
            "is measured on your model."
        )
    places = np.linspace(0, len(table) - 1, steps)
    rhos = np.exp(np.interp(places, np.arange(len(table)), np.log(table)))
    return at_rhos(schedule, rhos, float(rhos[-1]) if steps > 1 else top, top)


def flow_shift(
    schedule: Schedule,
    steps: int,
    *,
    shift: float = 3.0,
    tokens: int | None = None,
    terminal: float | None = None,
) -> Array:
    """Uniform times 1 - i/steps of a flow, shifted: s' = shift s/(1 + (shift - 1) s) (Esser et al. 2024, eq. 23).

    tokens: instead of shift, the length of the image sequence: shift = e^mu, mu linear from 0.5 at 256 tokens to 1.15
    at 4096 (Flux). terminal: stretch 1 - s' so that the last level is this one (LTX-Video); with one step there is
    nothing to stretch. Raises ValueError unless the schedule is a flow.
    """
    if schedule.kind != "flow":
        raise ValueError(f"flow_shift is for flow schedules, got {schedule!r}. Use rectified_flow(), or another grid.")
    if tokens is not None:
        _positive("tokens", tokens)
        shift = math.exp(0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256))
    _positive("shift", shift)
    if terminal is not None and not 0 < terminal < 1:
        raise ValueError(f"terminal must be within (0, 1), got {terminal!r}.")
    times = 1.0 - np.arange(steps, dtype=np.float64) / steps
    times = shift * times / (1.0 + (shift - 1.0) * times)
    if terminal is not None and steps > 1:
        times = 1.0 - (1.0 - times) * ((1.0 - terminal) / (1.0 - times[-1]))
    return times


def beta_quantile(ranks: Array, a: float, b: float) -> Array:
    """The x in [0, 1] with I_x(a, b) = rank, I the regularised incomplete beta function; by bisection.

    I_x(a, b) = x^a/B(a, b) sum_n (1 - b)_n x^n/(n! (a + n)) for x <= 1/2, and 1 - I_{1-x}(b, a) above.
    """
    _positive("a", a)
    _positive("b", b)
    lower, upper = _half_series(a, b), _half_series(b, a)
    left = np.asarray(ranks) <= _half_beta(np.array([0.5]), a, lower[:, None])
    power, series = np.where(left, a, b), np.where(left, lower[:, None], upper[:, None])
    target = np.where(left, ranks, 1.0 - np.asarray(ranks))
    low, high = np.zeros_like(target), np.full_like(target, 0.5)
    for _ in range(BISECTIONS):
        x = 0.5 * (low + high)
        below = _half_beta(x, power, series) < target
        low, high = np.where(below, x, low), np.where(below, high, x)
    x = np.where(target == 0.0, 0.0, 0.5 * (low + high))
    x = np.where(0.5 - x < 1e-12, 0.5, x)  # the middle itself, which is a tie where times are rounded
    return np.where(left, x, 1.0 - x)


def _half_beta(x: Array, a: Array | float, series: Array) -> Array:
    """I_x(a, b) for x in [0, 1/2]. series: [SERIES_TERMS, *] of the same b."""
    value: Array = x**a * np.polynomial.polynomial.polyval(x, series, tensor=False)
    return value


def _half_series(a: float, b: float) -> Array:
    scale = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b))
    coefficients, term = [], 1.0
    for n in range(SERIES_TERMS):
        coefficients.append(scale * term / (a + n))
        term *= (n + 1.0 - b) / (n + 1.0)
    return np.array(coefficients)


def _between(times: Array, low: float, high: float) -> Array:
    """The times with their ends set exactly."""
    times[-1], times[0] = low, high
    return times


def _positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be finite and above 0, got {value!r}.")
