"""UniPC (Zhao et al. 2023): a predictor and a corrector of one order more, sharing their evaluations."""

from __future__ import annotations

import math

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
    made, base, start = 0, x, run.levels[0]
    for i, s, t in run.intervals():
        denoised = run.denoise(x, s)
        if t.sigma == 0.0:
            history.order(i, t)
            return t.alpha * denoised
        if corrector and made and (variant == "bh2" or start.alpha > 0.0):
            x = run.keep(_step(base, history, made, start, s, variant, denoised))
        history.add(s, denoised)
        made, base, start = history.order(i, t), x, s
        x = _step(base, history, made, s, t, variant, None)
    return x


def _step(x: Lin, history: History, order: int, s: Level, t: Level, variant: str, found: Lin | None) -> Lin:
    """From x at s to t by the last `order` values, and by `found` at t in the corrector."""
    h = half_log_snr_step(s, t)
    levels, values = history.levels[:order], history.values[:order]
    if found is not None and order > 1:
        levels, values = [t, *levels], [found, *values]
    if order == 1:
        combined = phi(h) * values[0]
        if found is not None:
            combined = combined + _half(variant, h) * (found - values[0])
    elif order == 2 and found is None:
        r = half_log_snr_step(levels[1], levels[0]) / h
        combined = phi(h) * values[0] + (_half(variant, h) / r) * (values[0] - values[1])
    else:
        weights = exponential_weights([level.lam - t.lam for level in levels], h)
        combined = sum((w * value for w, value in zip(weights, values, strict=True)), 0.0 * values[0])
    return exponential_step(x, combined, s, t, 1.0)


def _half(variant: str, h: float) -> float:
    return 0.5 * (phi(h) if variant == "bh2" or math.isinf(h) else h)
