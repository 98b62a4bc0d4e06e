"""Implicit and explicit score matching, the classifier of noised images, and times that follow the loss."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from objective_cases import VARIANCE, best, drawn
from torch import Tensor

from fastdiff.process import schedules
from fastdiff.training import objectives
from fastdiff.training.objectives import times


def implicit(trace: str, matrix: Tensor, batch: int = 400) -> tuple[objectives.Loss, Tensor]:
    """The loss of the score A x on two-dimensional data, and the noised x it was asked about."""
    seen: list[Tensor] = []

    def network(x: Tensor, time: Tensor, cond: object) -> Tensor:
        seen.append(x.detach().double())
        return x @ matrix.T

    x0 = torch.randn(batch, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.5, 1.5])
    return objectives.get("implicit", trace=trace).loss(network, x0, None, torch.arange(batch), 0), seen[0]


def test_implicit_is_explicit_but_for_a_constant() -> None:
    apart = []
    for matrix in ([[-1.0, 0.0], [0.0, -1.0]], [[-2.0, 0.5], [0.3, -0.4]], [[0.7, -1.0], [2.0, 0.1]]):
        a = torch.tensor(matrix)
        loss, x = implicit("exact", a)
        second = x.T @ x / len(x)  # with this as the law's covariance the identity holds on the sample itself
        truth = -x @ torch.linalg.inv(second)
        explicit = objectives.explicit_score_matching(x @ a.double().T, truth).mean()
        apart.append(loss.mean.item() - 0.5 * explicit.item())
        constant = -0.5 * truth.square().mean().item()
        assert apart[-1] == pytest.approx(constant, rel=1e-5)


def test_a_sliced_trace_is_the_trace_on_average() -> None:
    a = torch.tensor([[-2.0, 0.5], [0.3, -0.4]])
    exact, _ = implicit("exact", a, 4000)
    sliced, _ = implicit("sliced", a, 4000)
    gap = (sliced.per_sample - exact.per_sample).double()
    assert gap.std() > 0.1  # another estimate of each sample
    assert abs(gap.mean()) < 4 * gap.std() / math.sqrt(len(gap))


@pytest.mark.parametrize("trace", ["exact", "sliced"])
def test_the_best_linear_score_of_implicit_matching(trace: str) -> None:
    slope = torch.tensor(-1 / (VARIANCE + 0.01), requires_grad=True)
    x0 = math.sqrt(VARIANCE) * torch.randn(500, 8, generator=torch.Generator().manual_seed(1))
    loss = objectives.get("implicit", trace=trace).loss(lambda x, t, c: slope * x, x0, None, torch.arange(500), 0)
    loss.mean.backward()
    assert slope.grad is not None
    assert abs(slope.grad.item()) < 5 * math.sqrt(2 / 4000)  # 1 + slope mean(x^2), or mean(v^2) for 1


def test_denoising_is_explicit_matching_of_the_noised_data_but_for_a_constant() -> None:
    sigma = np.array([0.1])
    k, floor = best(drawn(objectives.get("dsm"), sigma))
    total = VARIANCE + sigma**2
    assert k == pytest.approx(-1 / total, rel=1e-5)  # the score of N(0, v + sigma^2)
    for slope in (-5.0, -1.0, 0.5):
        denoising = floor + (slope - k) ** 2 * total
        explicit = (slope + 1 / total) ** 2 * total
        assert denoising - explicit == pytest.approx(1 / sigma**2 - 1 / total, rel=1e-4)


def test_the_classifier_learns_the_posterior_of_the_noised_image() -> None:
    level, count = 300.0, 4000
    objective = objectives.get("classifier", times=times.Discrete((level,)))
    labels = torch.arange(count) % 2
    x0 = (2.0 * labels - 1)[:, None] + 0.5 * torch.randn(count, 1, generator=torch.Generator().manual_seed(0))
    alpha, sigma = objective.schedule.alpha(level), objective.schedule.sigma(level)
    exact = float(2 * alpha / (alpha**2 * 0.25 + sigma**2))  # log odds of two Gaussians at -1 and 1
    gain = torch.tensor(exact, requires_grad=True)

    def network(x: Tensor, time: Tensor, cond: object) -> Tensor:
        assert cond is None and (time == level).all()
        return torch.cat([torch.zeros_like(x), gain * x], 1)

    loss = objective.loss(network, x0, {"class_labels": labels}, torch.arange(count), 0)
    loss.mean.backward()
    assert gain.grad is not None
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    x = alpha + math.sqrt(alpha**2 * 0.25 + sigma**2) * nodes
    entropy = (weights * np.logaddexp(0, -exact * x)).sum() / weights.sum()
    spread = float(loss.per_sample.std()) / math.sqrt(count)
    assert abs(loss.mean.item() - entropy) < 4 * spread
    assert abs(gain.grad.item()) < 4 * 0.5 / math.sqrt(count)  # |d loss / d gain| <= |x|, and is 0 on average
    with pytest.raises(ValueError, match="needs the labels"):
        objective.loss(network, x0, None, torch.arange(count), 0)


def test_times_follow_the_loss_and_their_weights_undo_it() -> None:
    schedule = schedules.linear(steps=8)
    objective = objectives.get("ddpm", schedule=schedule, times={"name": "loss_second_moment", "history": 3})
    learnt = objective.times
    assert isinstance(learnt, times.LossSecondMoment)
    every, lost = np.arange(8.0), 1.0 + np.arange(8.0)
    for turn, heard in enumerate((100.0 - lost, lost, lost, lost)):
        if turn < 3:
            np.testing.assert_array_equal(learnt.chances(schedule), 1 / 8)  # until every step has its history
        objective.observe(torch.from_numpy(every), torch.from_numpy(heard))  # the fourth drives out the first
    chances = learnt.chances(schedule)
    np.testing.assert_allclose(chances, 0.999 * lost / lost.sum() + 0.001 / 8, rtol=1e-12)
    u = (np.arange(100000) + 0.5) / 100000
    drawn_times = learnt.at(u, schedule)
    np.testing.assert_allclose(np.bincount(drawn_times.astype(int)) / 100000, chances, atol=2e-5)
    weighted = learnt.importance(drawn_times, schedule) * lost[drawn_times.astype(int)]
    assert weighted.mean() == pytest.approx(lost.mean(), rel=1e-4)
    draw = objective.at(every, torch.arange(8))
    np.testing.assert_allclose(draw.weight, 1 / (8 * chances), rtol=1e-6)
    assert torch.equal(draw.weight, draw.importance)

    again = objectives.from_dict(json.loads(json.dumps(objective.to_dict())))
    np.testing.assert_array_equal(again.times.chances(schedule), 1 / 8)
    again.times.restore(json.loads(json.dumps(learnt.state())))
    np.testing.assert_array_equal(again.times.chances(schedule), chances)
    assert again == objective


def test_refusals() -> None:
    with pytest.raises(ValueError, match="has none"):
        objectives.get("flow", times="loss_second_moment").draw(torch.arange(1), 0)
    with pytest.raises(ValueError, match="history must be at least 1"):
        objectives.get("ddpm", times={"name": "loss_second_moment", "history": 0})
    with pytest.raises(ValueError, match="Unknown trace"):
        objectives.get("implicit", trace="hutch")
    with pytest.raises(ValueError, match="learns a score"):
        objectives.get("implicit", prediction="eps")
