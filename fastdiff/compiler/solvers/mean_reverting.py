"""Samplers of mean-reverting diffusion, which carries an image to a degraded version of itself plus noise."""

from __future__ import annotations

from fastdiff.compiler.lin import Lin
from fastdiff.compiler.run import Run
from fastdiff.compiler.solvers.history import check_choice, check_order
from fastdiff.compiler.solvers.multistep import multistep
from fastdiff.compiler.solvers.registry import solver
from fastdiff.process.schedules import Level


@solver("mean_reverting", order=2)
def mean_reverting(run: Run, x: Lin, order: int = 2, noise: str = "ode", prediction: str = "x0") -> Lin:
    """MRS (Li et al. 2025) for dx = theta (mu - x) dt + g dw (Luo et al. 2023, IR-SDE): the usual solver on y = x - mu.

    x = alpha x0 + (1 - alpha) mu + sigma n, and y' = (sigma_t/sigma_s) e^(-eta h) y + alpha_t (phi_1 (D - mu) + ...)
    + sigma_t sqrt(1 - e^(-2 eta h)) z, eta = 0 ("ode") or 1 ("sde"), order 1..3. mu, the degraded image, is given with
    each run (given={"mu": tensor}); a run without `init` starts from mu + sigma n. prediction: of the network, which
    sees x: "x0" the image, or "eps" or "score", from which D = (x - sigma eps) / alpha = x0 + (1/alpha - 1) mu.
    """
    check_order("mean_reverting", order, 3)
    check_choice("mean_reverting", "noise", noise, ("ode", "sde"))
    check_choice("mean_reverting", "prediction", prediction, ("x0", "eps", "score"))
    mu = run.given("mu", centre=True)

    def evaluate(y: Lin, level: Level) -> tuple[Lin, Lin]:
        state = y + mu
        denoised = run.denoise(state, level)
        return state - mu, denoised - (mu if prediction == "x0" else mu / level.alpha)

    if prediction != "x0" and run.levels[0].alpha == 0.0:
        raise ValueError(
            f"mean_reverting: a network that predicts {prediction!r} says nothing of the image where alpha = 0; use a "
            "grid that starts below it, or a network with prediction='x0'"
        )
    eta = 1.0 if noise == "sde" else 0.0
    return multistep(run, x - mu, order, eta=eta, correction="heun", evaluate=evaluate) + mu
