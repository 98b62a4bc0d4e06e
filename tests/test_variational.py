"""The variational bound against closed forms: weights, KL terms, bits of pixels; and the learned variance."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from objective_cases import VARIANCE, best, drawn
from scipy import integrate, stats
from torch import Tensor

from fastdiff.process import schedules
from fastdiff.training import objectives
from fastdiff.training.objectives import reverse, weightings

SHORT = schedules.linear(steps=12, beta_min=1e-3, beta_max=0.6)
ENTROPY = 0.5 * math.log(2 * math.pi * math.e * VARIANCE)


def exact(schedule: schedules.Schedule) -> Any:
    """The best eps network for data N(0, VARIANCE)."""
    ab = torch.from_numpy(schedule.alpha_bar(np.arange(schedule.steps)))
    gain = ((1 - ab).sqrt() / (ab * VARIANCE + 1 - ab)).float()

    def network(x: Tensor, time: Tensor, cond: object) -> Tensor:
        return gain[time.long()].reshape(-1, *(1 for _ in x.shape[1:])) * x

    return network


def closed_form(schedule: schedules.Schedule, variance: str) -> tuple[float, np.ndarray]:
    """The prior term and all others of the bound for the exact network, in float64."""
    steps = np.arange(schedule.steps)
    ab = schedule.alpha_bar(steps)
    left = VARIANCE * (1 - ab) / (ab * VARIANCE + 1 - ab)  # Var(x0 | x_t)
    small, spread = reverse.log_variance(schedule, "posterior"), reverse.log_variance(schedule, variance)
    apart = reverse.image_factor(schedule) ** 2 * left
    terms = 0.5 * (spread - small + (np.exp(small) + apart) / np.exp(spread) - 1)
    terms[0] = 0.5 * (math.log(2 * math.pi) + spread[0] + left[0] / np.exp(spread[0]))
    end = 1 - ab[-1]
    return 0.5 * (end + ab[-1] * VARIANCE - 1 - math.log(end)), terms


def test_weights_of_the_terms() -> None:
    index = np.array([0.0, 1.0, 499.0, 999.0])
    weight = weightings.Weighting("elbo").at(schedules.linear(), index, "eps", None) / 1000
    np.testing.assert_allclose(weight, [0.50005, 0.2727, 0.005503, 0.010204], rtol=2e-4)
    first = 1e-4 / (2 * (1 - 1e-4) * 1e-4)  # beta_1 / (2 (1 - beta_1) sigma_1^2): the general formula at t = 1
    assert weight[0] == pytest.approx(first, rel=1e-9)
    posterior = weightings.Weighting("elbo", variance="posterior").at(schedules.linear(), index, "eps", None)
    assert np.isfinite(posterior).all()
    spread = {name: np.exp(reverse.log_variance(schedules.linear(), name)) for name in reverse.VARIANCES}
    np.testing.assert_allclose(posterior / weight / 1000, (spread["beta"] / spread["posterior"])[index.astype(int)])


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "score"])
def test_the_weighted_loss_is_the_kl_of_the_bound(prediction: str) -> None:
    objective = objectives.get("elbo", schedule=SHORT, prediction=prediction)
    time = np.arange(1.0, 12.0)
    draw = drawn(objective, time)
    _, floor = best(draw)
    _, terms = closed_form(SHORT, "beta")
    least = 0.5 * (np.log(SHORT.betas) - reverse.log_variance(SHORT, "posterior"))
    least += 0.5 * (np.exp(reverse.log_variance(SHORT, "posterior")) / SHORT.betas - 1)
    np.testing.assert_allclose(draw.weight * floor / 12, (terms - least)[1:], rtol=1e-5)


def test_the_continuous_weight_is_the_slope_of_the_snr() -> None:
    schedule, time, step = schedules.vp(), np.array([0.2, 0.5, 0.9]), 1e-5
    weight = weightings.Weighting("elbo").at(schedule, time, "x0", None)

    def snr(t: np.ndarray) -> np.ndarray:
        return 1 / schedule.rho(t) ** 2

    np.testing.assert_allclose(weight, -0.5 * (snr(time + step) - snr(time - step)) / (2 * step), rtol=1e-6)


def test_coefficients_of_the_posterior() -> None:
    schedule = schedules.linear()
    beta, ab = schedule.betas, schedule.alpha_bar(np.arange(1000))
    before = np.concatenate([[1.0], ab[:-1]])
    of_state = np.sqrt(1 - beta) * (1 - before) / (1 - ab)
    np.testing.assert_allclose(of_state * np.sqrt(ab) + reverse.image_factor(schedule), np.sqrt(before), rtol=1e-9)
    small = reverse.log_variance(schedule, "posterior")
    assert small[0] == small[1] and np.exp(small[1]) == pytest.approx(beta[1] * (1 - ab[0]) / (1 - ab[1]), rel=1e-12)


def test_kl_of_gaussians() -> None:
    zero = torch.zeros(3, dtype=torch.float64)
    assert torch.equal(reverse.gaussian_kl(zero + 0.3, zero + 0.3, zero), zero)
    for log_q, log_p, apart in ((0.4, -0.7, 0.3), (-1.5, 0.2, -2.0)):
        q, p = stats.norm(apart, math.exp(log_q / 2)), stats.norm(0.0, math.exp(log_p / 2))
        want, _ = integrate.quad(lambda x, q=q, p=p: q.pdf(x) * (q.logpdf(x) - p.logpdf(x)), -12, 12)
        got = reverse.gaussian_kl(*(torch.tensor(value, dtype=torch.float64) for value in (log_q, log_p, apart)))
        assert got.item() == pytest.approx(want, rel=1e-8)
        nll = reverse.gaussian_nll(torch.tensor(apart), torch.tensor(log_p)).item()
        assert nll == pytest.approx(-p.logpdf(apart), rel=1e-6)


def test_pixels_share_all_of_the_mass() -> None:
    pixels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    for mean, log_variance in ((0.1, -2.0), (-1.4, 0.5), (0.9999, -9.0)):
        nll = reverse.pixel_nll(pixels, torch.tensor(mean).double(), torch.tensor(log_variance).double())
        assert torch.exp(-nll).sum().item() == pytest.approx(1.0, abs=1e-9)
    spread = math.exp(-1.0)
    want = -math.log(
        stats.norm.cdf((pixels[9] + 1 / 255 - 0.1) / spread) - stats.norm.cdf((pixels[9] - 1 / 255 - 0.1) / spread)
    )
    got = reverse.pixel_nll(pixels[9], torch.tensor(0.1).double(), torch.tensor(-2.0).double())
    assert got.item() == pytest.approx(want, rel=1e-7)


@pytest.mark.parametrize("variance", reverse.VARIANCES)
def test_the_bound_of_gaussian_data(variance: str) -> None:
    objective = objectives.get("ddpm", schedule=SHORT)
    count, size = 4, 30000
    x0 = math.sqrt(VARIANCE) * torch.randn(count, size, generator=torch.Generator().manual_seed(0))
    got = objectives.bound(objective, exact(SHORT), x0, None, torch.arange(count), variance=variance, clip=False)
    perturbed = objectives.get("ddpm", schedule=SHORT, perturbation=0.5)  # which is for training alone
    again = objectives.bound(perturbed, exact(SHORT), x0[:1], None, torch.arange(1), variance=variance, clip=False)
    assert torch.equal(again.terms, got.terms[:1])
    prior, terms = closed_form(SHORT, variance)
    # what is random of a term is a mean of squares, whose relative error is sqrt(2 / count)
    small, spread = (np.exp(reverse.log_variance(SHORT, name)) for name in ("posterior", variance))
    random = terms - 0.5 * (np.log(spread / small) + small / spread - 1)
    random[0] = terms[0] - 0.5 * math.log(2 * math.pi * spread[0])
    error = 5 * math.sqrt(2 / (count * size)) * random
    assert (np.abs(got.terms.mean(0).numpy() - terms) < error).all()
    assert got.prior.mean().item() == pytest.approx(prior, rel=0.02)
    assert torch.equal(got.total, got.prior + got.terms.sum(1))
    torch.testing.assert_close(got.bits_per_dim, got.total / math.log(2))
    assert prior + terms.sum() > ENTROPY


def test_the_gap_of_the_bound_closes_with_more_steps() -> None:
    gaps = []
    for steps in (50, 200, 1000):  # the same process in finer steps
        schedule = schedules.linear(steps, 0.1 / steps, 20 / steps)
        prior, terms = closed_form(schedule, "beta")
        gaps.append(prior + terms.sum() - ENTROPY)
    assert 0 < gaps[2] < gaps[1] / 3 < gaps[0] / 9


def test_bits_of_pixels_are_less_than_eight_for_a_network_that_knows() -> None:
    schedule = schedules.linear(10, 0.016, 0.6)
    objective = objectives.get("x0", schedule=schedule)
    images = torch.randint(100, 156, (3, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean = 2 * 127.5 / 255 - 1.0
    knows = objectives.bound(objective, lambda x, t, c: torch.full_like(x, mean), images, None, torch.arange(3))
    blind = objectives.bound(objective, lambda x, t, c: torch.full_like(x, 1.0), images, None, torch.arange(3))
    assert ((math.log2(56) < knows.bits_per_dim) & (knows.bits_per_dim < 8)).all()
    assert (blind.bits_per_dim > knows.bits_per_dim + 1).all()


def test_a_learned_variance_reaches_from_one_fixed_one_to_the_other() -> None:
    objective = objectives.get("hybrid", schedule=SHORT)
    x0 = math.sqrt(VARIANCE) * torch.randn(3, 2, 40, generator=torch.Generator().manual_seed(0))
    for value, variance in ((1.0, "beta"), (-1.0, "posterior")):

        def network(x: Tensor, time: Tensor, cond: object, value: float = value) -> Tensor:
            return torch.cat([exact(SHORT)(x, time, cond), torch.full_like(x, value)], 1)

        learned = objectives.bound(objective, network, x0, None, torch.arange(3), variance="learned", clip=False)
        fixed = objectives.bound(objective, exact(SHORT), x0, None, torch.arange(3), variance=variance, clip=False)
        torch.testing.assert_close(learned.terms, fixed.terms, rtol=1e-5, atol=1e-6)
    assert objective.denoiser(lambda x, t: x).learned_variance


def hybrid_gradients(index: float, value: float, share: float) -> tuple[Tensor, Tensor, objectives.Loss]:
    objective = objectives.get("hybrid", schedule=SHORT, share=share, times={"name": "discrete", "values": [index]})
    x0 = 0.2 * torch.randn(8, 1, 4000, generator=torch.Generator().manual_seed(3))
    leaves: list[Tensor] = []

    def network(x: Tensor, time: Tensor, cond: object) -> Tensor:
        level = SHORT.alpha_bar(int(index))
        gain = math.sqrt(1 - level) / (level * 0.04 + 1 - level)
        leaves.extend([(gain * x).requires_grad_(), torch.full_like(x, value).requires_grad_()])
        return torch.cat(leaves, 1)

    loss = objective.loss(network, x0, None, torch.arange(8), 0)
    answer, said = torch.autograd.grad(loss.mean, leaves, allow_unused=True, materialize_grads=True)
    return answer, said, loss


def test_the_hybrid_loss_teaches_the_variance_and_nothing_else() -> None:
    with_share, said, loss = hybrid_gradients(5.0, 0.3, 0.001)
    without, none, simple = hybrid_gradients(5.0, 0.3, 0.0)
    assert torch.equal(with_share, without) and said.abs().sum() > 0 and none.abs().sum() == 0
    torch.testing.assert_close(simple.mean, (simple.weight * simple.per_sample).mean())
    assert loss.mean != simple.mean


def test_the_best_learned_variance_is_that_of_the_step() -> None:
    index, data = 5, 0.04
    ab = SHORT.alpha_bar(index)
    large, small = (reverse.log_variance(SHORT, name)[index] for name in reverse.VARIANCES)
    step = math.exp(small) + reverse.image_factor(SHORT)[index] ** 2 * data * (1 - ab) / (ab * data + 1 - ab)
    value = 2 * (math.log(step) - small) / (large - small) - 1  # V of Var(x_{t-1} | x_t)
    slope = [hybrid_gradients(float(index), v, 1.0)[1].sum().item() for v in (value - 0.3, value, value + 0.3)]
    assert slope[0] < 0 < slope[2]
    assert abs(slope[1]) < 0.05 * min(-slope[0], slope[2])


def test_refusals() -> None:
    with pytest.raises(ValueError, match="needs the steps of a discrete schedule"):
        objectives.bound(objectives.get("flow"), lambda *a: a[0], torch.zeros(1, 2), None, torch.arange(1))
    with pytest.raises(ValueError, match="'learned'"):
        objectives.bound(
            objectives.get("ddpm"), lambda *a: a[0], torch.zeros(1, 2), None, torch.arange(1), variance="b"
        )
    with pytest.raises(ValueError, match="double its output channels"):
        objectives.get("hybrid").loss(lambda *a: a[0], torch.zeros(1, 2, 4), None, torch.arange(1), 0)
    with pytest.raises(ValueError, match="variance belongs to weighting 'elbo'"):
        weightings.Weighting("eps", variance="beta")
    with pytest.raises(ValueError, match="discrete schedule"):
        objectives.get("hybrid", schedule="vp")
    with pytest.raises(ValueError, match="leave out log_variance and perturbation"):
        objectives.get("hybrid", perturbation=0.1)
    with pytest.raises(ValueError, match="one step"):
        reverse.log_variance(schedules.linear(1), "posterior")
