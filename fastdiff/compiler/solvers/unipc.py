"""UniPC (Zhao et al. 2023): a predictor and a corrector of one order more, sharing their evaluations."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fastdiff.compiler.lin import Lin
from fastdiff.compiler.run import Run
from fastdiff.compiler.solvers.exponential import exponential_step, phi
from fastdiff.compiler.solvers.history import History, check_choice, check_order
from fastdiff.compiler.solvers.quadrature import exponential_weights
from fastdiff.compiler.solvers.registry import solver
from fastdiff.compiler.solvers.steps import half_log_snr_step
from fastdiff.process.schedules import Level


@solver("unipc", order=3)
def unipc(
    run: Run, x: Lin, order: int = 2, variant: str = "bh2", corrector: bool = True, lower_final: bool = True
) -> Lin:
    """UniPC of order 1..4 on D (Zhao et al. 2023): x' = (sigma_t/sigma_s) x + alpha_t sum_j w_j D_j.

    The weights integrate the polynomial through the known D exactly, which is what the paper's system R rho = b says;
    where that system is replaced by rho = 1/2 (predictor of order 2, corrector of order 1) the last difference weighs
    B(h)/2, B = h ("bh1") or 1 - e^-h ("bh2"). The corrector repeats the step just made with the D found at its end;
    corrector=False leaves the predictor alone, of one order less. lower_final: come down to order 1 at the end.
    """
    check_order("unipc", order, 4)
    check_choice("unipc", "variant", variant, ("bh1", "bh2"))
    history = History(run, order, lower_final=lower_final)
    begun: tuple[Lin, float] | None = None
    for i, s, t in run.intervals():
        denoised = run.denoise(x, s)
        if t.sigma == 0.0:
            history.order(i, t)
            return t.alpha * denoised
        if begun is not None:
            rest, weight = begun
            x = rest + weight * denoised
        history.add(s, denoised)
        made = history.order(i, t)
        begun = None
        if corrector and (variant == "bh2" or s.alpha > 0.0):
            weight, *known = _weights(history.levels[:made], s, t, variant, corrects=True)
            # all of the next correction but D at t, so that one register carries what several would
            begun = run.keep(_step(x, known, history, s, t)), t.alpha * weight
        x = _step(x, _weights(history.levels[:made], s, t, variant, corrects=False), history, s, t)
    return x


def _step(x: Lin, weights: Sequence[float], history: History, s: Level, t: Level) -> Lin:
    """From x at s to t by the newest values with these weights."""
    combined = sum((w * value for w, value in zip(weights, history.values, strict=False)), 0.0 * x)
    return exponential_step(x, combined, s, t, 1.0)


def _weights(levels: Sequence[Level], s: Level, t: Level, variant: str, corrects: bool) -> list[float]:
    """Of the values at these levels, newest first; in the corrector that of the value at t before them."""
    h, order = half_log_snr_step(s, t), len(levels)
    half = 0.5 * (phi(h) if variant == "bh2" or math.isinf(h) else h)
    if order == 1:
        return [half, phi(h) - half] if corrects else [phi(h)]
    if order == 2 and not corrects:
        ahead = half * h / half_log_snr_step(levels[1], levels[0])
        return [phi(h) + ahead, -ahead]
    through = [t, *levels] if corrects else levels
    return exponential_weights([level.lam - t.lam for level in through], h)
