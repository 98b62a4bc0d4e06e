"""Objectives that regress on image and noise against their closed-form optima, and the draws they are made of."""

from __future__ import annotations

import json
import math
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from objective_cases import VARIANCE, best, drawn
from torch import Tensor

from fastdiff.compiler import layout as at
from fastdiff.engine import backends, train_ops
from fastdiff.engine import noise as counter_noise
from fastdiff.models.exact import Gaussian
from fastdiff.process import predictions, schedules
from fastdiff.training import objectives
from fastdiff.training.objectives import Objective, counters, times, weightings

KINDS = {name: type(objectives.get(name)) for name in objectives.names()}
REGRESSIONS = [name for name, kind in KINDS.items() if kind is objectives.Regression]
SCHEDULES = {
    "linear": np.array([0.0, 1.0, 499.0, 999.0]),
    "vp": np.array([1e-3, 0.3, 1.0]),
    "ve": np.array([0.0, 0.4, 1.0]),
    "edm": np.array([0.002, 0.5, 80.0]),
    "rectified_flow": np.array([1e-3, 0.5, 0.99]),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", predictions.names())
def test_the_best_network_is_the_exact_denoiser(prediction: str, schedule: str) -> None:
    objective = objectives.get("ddpm", prediction=prediction, schedule=schedule)
    time = SCHEDULES[schedule]
    draw = drawn(objective, time)
    k, _ = best(draw)
    for i, t in enumerate(time):
        level = objective.schedule.level(t)
        known = predictions.coefficients(prediction, level, objective.schedule, objective.sigma_data)
        x = np.array([level.alpha, -2.0])
        exact = Gaussian(0.0, VARIANCE)(x, level)
        # fp32 tables, and x0 = (x - sigma eps) / alpha loses what alpha has lost
        near = 3e-7 * (1 + abs(known.P) + abs(known.Q * k[i]))
        np.testing.assert_allclose(known.P * x + known.Q * k[i] * known.c_in * x, exact, rtol=0, atol=2.5 * near)
        np.testing.assert_allclose(float(draw.model_time[i]), known.time, rtol=1e-6)
        np.testing.assert_allclose(float(draw.table[i, at.INPUT_X0]), known.c_in * level.alpha, rtol=1e-7)


def test_closed_forms_of_the_literature() -> None:
    v = VARIANCE
    ddpm = objectives.get("ddpm")
    index = np.array([0.0, 10.0, 500.0, 999.0])
    ab = ddpm.schedule.alpha_bar(index)
    k, floor = best(drawn(ddpm, index))
    np.testing.assert_allclose(k, np.sqrt(1 - ab) / (ab * v + 1 - ab), rtol=1e-6)
    np.testing.assert_allclose(floor, ab * v / (ab * v + 1 - ab), rtol=1e-5, atol=3e-7)

    flow = objectives.get("flow")
    noise = np.array([0.1, 0.5, 0.9])
    t = 1 - noise  # theory counts from noise to data; its u is -F
    k, floor = best(drawn(flow, noise))
    np.testing.assert_allclose(-k, (t * v - (1 - t)) / ((1 - t) ** 2 + t**2 * v), rtol=1e-5)
    np.testing.assert_allclose(floor, v / ((1 - t) ** 2 + t**2 * v), rtol=1e-5)  # Var(X1 - X0 | Xt)

    ncsn = objectives.get("ncsn")
    sigma = np.geomspace(0.01, 1.0, 10)
    draw = drawn(ncsn, sigma)
    k, floor = best(draw)
    np.testing.assert_allclose(k, -1 / (v + sigma**2), rtol=2e-3)
    np.testing.assert_allclose(floor * draw.weight.numpy(), v / (v + sigma**2), rtol=2e-3)  # about 1 at every level

    edm = objectives.get("edm")
    sigma = np.array([0.01, 0.5, 20.0])
    draw = drawn(edm, sigma)
    x = draw.table.double().numpy()
    np.testing.assert_allclose(x[:, at.INPUT_X0] ** 2 * 0.25 + x[:, at.INPUT_Z] ** 2, 1.0, rtol=1e-6)  # unit input
    np.testing.assert_allclose(x[:, at.TARGET_X0] ** 2 * 0.25 + x[:, at.TARGET_Z] ** 2, 1.0, rtol=1e-6)  # and target
    np.testing.assert_allclose(best(draw)[0], 0.0, atol=1e-7)  # data of variance sigma_data^2: F = 0 is best
    np.testing.assert_allclose(draw.model_time, np.log(sigma) / 4, rtol=1e-6)


def expected(objective: Objective, x0: Tensor, draw: objectives.Draw) -> tuple[np.ndarray, np.ndarray]:
    """The network's input and its target, from the formulas in float64 with the noise of the keys."""
    x, target = np.zeros(x0.shape), np.zeros(x0.shape)
    clean = x0.double().numpy() / 127.5 - 1 if x0.dtype == torch.uint8 else x0.double().numpy()
    for b, row in enumerate(draw.table.double().numpy()):
        image = clean[b][..., ::-1] if row[at.FLIP] else clean[b]
        z, y = (
            counter_noise.normal(int(draw.key[b]), image.size, number, 3).astype(np.float64).reshape(image.shape)
            for number in (0, 1)
        )
        x[b] = row[at.INPUT_X0] * image + row[at.INPUT_Z] * z + row[at.INPUT_Y] * y
        target[b] = row[at.TARGET_X0] * image + row[at.TARGET_Z] * z + row[at.TARGET_Y] * y
    return x, target


@pytest.mark.parametrize("name", REGRESSIONS)
def test_the_loss_and_its_gradient(name: str) -> None:
    objective = objectives.get(name, perturbation=0.1, flip=True)
    x0 = torch.randint(0, 256, (6, 2, 3, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    seeds, k = torch.arange(100, 106), torch.tensor(0.7, requires_grad=True)
    seen: list[Tensor] = []

    def network(x: Tensor, time: Tensor, cond: object) -> Tensor:
        seen.append(x.detach().clone())
        assert cond is None
        return k * x + 0.25 * time[:, None, None, None].clamp(-1, 1)

    loss = objective.loss(network, x0, None, seeds, 3)
    loss.mean.backward()
    draw = objective.draw(seeds, 3)
    x, target = expected(objective, x0, draw)
    assert 0 < draw.table[:, at.FLIP].sum() < 6
    np.testing.assert_allclose(seen[0], x, rtol=1e-5, atol=2e-6 * np.abs(x).max())
    rest = 0.7 * x + 0.25 * draw.model_time.double().numpy()[:, None, None, None].clip(-1, 1) - target
    error = (rest**2).mean((1, 2, 3))
    np.testing.assert_allclose(loss.per_sample, error, rtol=3e-5)
    weight = draw.weight.double().numpy()
    np.testing.assert_allclose(loss.mean.item(), (weight * error).mean(), rtol=3e-5)
    assert k.grad is not None
    slope = (weight * 2 * (rest * x).mean((1, 2, 3))).mean()
    np.testing.assert_allclose(k.grad.item(), slope, rtol=1e-4, atol=1e-5 * (weight * error).mean())
    assert torch.equal(loss.level, draw.model_time)
    assert torch.equal(loss.weight, draw.weight)


@pytest.mark.parametrize("name", ["ddpm", "v", "edm", "flow"])
def test_least_squares_over_many_draws_finds_the_optimum(name: str) -> None:
    objective = objectives.get(name, times=times.Discrete((0.4 if name in ("edm", "flow") else 400.0,)))
    count, size = 256, 512
    x0 = math.sqrt(VARIANCE) * torch.randn(count, size, generator=torch.Generator().manual_seed(1))
    k, floor = (value[0] for value in best(objective.draw(torch.arange(1), 0)))
    slope = torch.zeros((), requires_grad=True)
    inputs: list[Tensor] = []

    def network(x: Tensor, time: Tensor, cond: object) -> Tensor:
        inputs.append(x)
        return slope * x

    loss = objective.loss(network, x0, None, torch.arange(count), 7)
    loss.mean.backward()
    assert slope.grad is not None
    spread = inputs[0].double().square().mean().item()
    found = -slope.grad.item() / 2 / spread  # the least squares of a linear model, from its gradient at 0
    error = math.sqrt(floor / spread / (count * size))
    assert abs(found - k) < 5 * error
    left = loss.mean.item() - found**2 * spread
    assert abs(left - floor) < 5 * math.sqrt(2 / (count * size)) * floor


def test_a_draw_depends_on_its_seed_and_step_alone() -> None:
    objective = objectives.get("edm", flip=True, drop_label=0.5, null_label=10)
    seeds = torch.tensor([7, -3, 2**62, 11])
    together = objective.draw(seeds, 5)
    for i, seed in enumerate(seeds):
        alone = objective.draw(seed.reshape(1), 5)
        for name in ("key", "time", "model_time", "table", "weight", "importance", "dropped"):
            assert torch.equal(getattr(alone, name)[0], getattr(together, name)[i]), name
    assert len({*together.key.tolist(), *objective.draw(seeds, 6).key.tolist()}) == 8
    assert not torch.equal(objective.draw(seeds, 2**40).key, objective.draw(seeds, 2**40 + 2**33).key)


def test_an_input_that_the_network_does_not_keep_is_gone_before_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs: list[weakref.ref[Tensor]] = []
    alive: list[bool] = []
    squared_error = train_ops.squared_error

    def network(x: Tensor, time: Tensor, cond: object) -> Tensor:
        inputs.append(weakref.ref(x))
        return torch.zeros(2, 1, 4, 4, requires_grad=True)

    def watched(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        alive.append(inputs[0]() is not None)
        return squared_error(*tensors)

    monkeypatch.setattr(train_ops, "squared_error", watched)
    objectives.get("ddpm").loss(network, torch.zeros(2, 1, 4, 4), None, torch.arange(2), 0)
    assert alive == [False]


def test_draws_are_those_of_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds, step = np.array([5, -(2**63), 2**62 + 1]), 2**33 + 9
    key = counters.keys(seeds, step)
    for seed, one in zip(seeds.tolist(), key.tolist(), strict=True):
        words = counter_noise.philox(seed, step, 0xFFFFFFFF, at.STREAM_TRAINING)  # the step in the element's place
        assert one % 2**64 == int(words[0]) | int(words[1]) << 32
    numbers = counters.uniforms(key)
    words = counter_noise.philox(int(key[1]), 0, 3, at.STREAM_TRAINING)
    assert numbers[1, 2] == ((int(words[0]) + int(words[1]) * 2**32) // 2**12 + 0.5) / 2**52
    given = torch.from_numpy(seeds)
    found = [counters.draws(given, step), counters.draws(given.repeat_interleave(2)[::2], step)]
    monkeypatch.setattr(train_ops.backends, "probe", lambda: {"cpp": backends.Backend(False, ())})
    for pair in (*found, counters.draws(given, step)):
        np.testing.assert_array_equal(pair[0], key)
        np.testing.assert_array_equal(pair[1], numbers)


@pytest.mark.parametrize(
    "objective",
    [
        objectives.get("ddpm", flip=True, drop_label=0.25, null_label=3),
        objectives.get("v", times=times.Uniform(low=2, high=6.5), weighting="min_snr"),
        objectives.get("ncsn"),
        objectives.get("elbo", perturbation=0.1),
    ],
    ids=lambda objective: objective.name,
)
def test_draws_from_rows_are_those_of_the_formulas(objective: Objective, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = torch.arange(-500, 500)
    found = objective.draw(seeds, 7)
    monkeypatch.setattr(train_ops.backends, "probe", lambda: {"cpp": backends.Backend(False, ())})
    expected = objective.draw(seeds, 7)
    for name, tensor in vars(expected).items():
        assert tensor.dtype == getattr(found, name).dtype
        assert torch.equal(getattr(found, name), tensor), name
    assert len(set(found.time.tolist())) == {"ddpm": 631, "v": 5, "ncsn": 10, "elbo": 631}[objective.name]


def test_times_between_two_steps_are_refused() -> None:
    with pytest.raises(ValueError, match=r"uniform times from 2\.25 to 2\.75 hold no whole step of .*; widen them"):
        objectives.get("ddpm", times=times.Uniform(low=2.25, high=2.75)).draw(torch.arange(2), 0)


@pytest.mark.parametrize("seeds", [torch.arange(3, dtype=torch.int32), torch.arange(3.0), torch.zeros(2, 2).long()])
def test_a_draw_of_other_seeds_is_refused(seeds: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"seeds must be int64 \[batch\], got torch"):
        objectives.get("ddpm").draw(seeds, 0)


def test_uniforms_are_uniform_and_apart() -> None:
    key = counters.keys(np.arange(20000, dtype=np.int64), 1)
    numbers = counters.uniforms(key)
    assert ((numbers > 0) & (numbers < 1)).all()
    for column in numbers.T:
        gap = np.abs(np.sort(column) - (np.arange(len(column)) + 0.5) / len(column)).max()
        assert gap * math.sqrt(len(column)) < 1.95  # Kolmogorov and Smirnov, 0.1 %
    off = np.corrcoef(numbers.T) - np.eye(4)
    assert np.abs(off).max() < 4 / math.sqrt(len(numbers))


def test_labels_and_flips_are_chances() -> None:
    objective = objectives.get("ddpm", flip=True, drop_label=0.1, null_label=10)
    count = 4000
    draw = objective.draw(torch.arange(count), 0)
    for chance, rate in ((draw.dropped, 0.1), (draw.table[:, at.FLIP] != 0, 0.5)):
        assert abs(chance.double().mean().item() - rate) < 4 * math.sqrt(rate * (1 - rate) / count)
    labels = torch.arange(count) % 10
    replaced = objective.condition(labels, draw.dropped)
    assert torch.equal(replaced, torch.where(draw.dropped, 10, labels))
    named = objective.condition({"class_labels": labels, "size": 3}, draw.dropped)
    assert torch.equal(named["class_labels"], replaced) and named["size"] == 3
    plain = objectives.get("ddpm").draw(torch.arange(count), 0)
    assert not plain.dropped.any() and not plain.table[:, at.FLIP].any()


def test_distributions_of_times() -> None:
    u = (np.arange(4000) + 0.5) / 4000
    linear, edm, flow = schedules.linear(), schedules.edm(), schedules.rectified_flow()
    counts = np.bincount(times.Uniform().at(u, linear).astype(int))
    assert len(counts) == 1000 and (counts == 4).all()
    np.testing.assert_array_equal(np.unique(times.Uniform(low=2, high=4.5).at(u, linear)), [2, 3, 4])
    np.testing.assert_allclose(times.Uniform().at(u, flow), u)
    logs = np.log(times.LogNormal(-1.2, 1.2).at(u, edm))
    np.testing.assert_allclose([logs.mean(), logs.std()], [-1.2, 1.2], rtol=1e-3)
    logit = times.LogitNormal(0.5, 0.8).at(u, flow)
    odds = np.log(logit / (1 - logit))
    np.testing.assert_allclose([odds.mean(), odds.std()], [0.5, 0.8], rtol=1e-3)
    index = times.LogNormal().at(u, linear)
    assert (index == np.rint(index)).all() and index.min() >= 0 and index.max() <= 999
    assert np.bincount(np.searchsorted([0.1, 0.2], times.Discrete((0.1, 0.2)).at(u, edm))).tolist() == [2000, 2000]


@pytest.mark.parametrize("prediction", predictions.names())
def test_a_weighting_is_an_error_in_other_terms(prediction: str) -> None:
    schedule, time = schedules.vp(), np.array([0.1, 0.5, 0.9])
    alpha, sigma = schedule.alpha(time), schedule.sigma(time)
    snr = (alpha / sigma) ** 2

    def weight(kind: str, gamma: float | None = None) -> np.ndarray:
        return weightings.Weighting(kind, gamma).at(schedule, time, prediction, None)

    # an error of D at fixed x in terms of F, from the other side: x0 = P x + Q F
    q = np.array([predictions.coefficients(prediction, schedule.level(t), schedule).Q for t in time])
    np.testing.assert_allclose(weight("x0"), q**2, rtol=1e-12)
    np.testing.assert_allclose(weight("eps"), q**2 * snr, rtol=1e-12)
    np.testing.assert_allclose(weight("v"), q**2 * (snr + 1), rtol=1e-12)
    np.testing.assert_allclose(weight("score"), q**2 * snr / sigma**2, rtol=1e-12)
    np.testing.assert_allclose(weight("min_snr", 2.0), q**2 * np.minimum(snr, 2.0), rtol=1e-12)
    rho = sigma / alpha
    np.testing.assert_allclose(weight("edm"), q**2 * (rho**2 + 0.25) / (rho * 0.5) ** 2, rtol=1e-12)
    np.testing.assert_array_equal(weight("prediction"), 1.0)


def test_min_snr_is_the_papers() -> None:
    time = np.array([0.0, 300.0, 999.0])
    for prediction, over in (("x0", lambda s: 1), ("eps", lambda s: s), ("v", lambda s: s + 1)):
        objective = objectives.get("min_snr", prediction=prediction)
        ab = objective.schedule.alpha_bar(time)
        snr = ab / (1 - ab)
        np.testing.assert_allclose(drawn(objective, time).weight, np.minimum(snr, 5) / over(snr), rtol=1e-6)


def test_perturbation_and_shared_times() -> None:
    time = np.array([0.0, 30.0, 500.0])
    plain, perturbed = (drawn(objectives.get("ddpm", perturbation=g), time).table for g in (0.0, 0.1))
    torch.testing.assert_close(perturbed[:, at.INPUT_Y], 0.1 * plain[:, at.INPUT_Z])
    kept = [at.INPUT_X0, at.INPUT_Z, at.TARGET_X0, at.TARGET_Z, at.TARGET_Y]
    assert torch.equal(perturbed[:, kept], plain[:, kept])
    shared = drawn(objectives.get("ddpm", schedule=schedules.time_shared(schedules.linear())), time)
    assert shared.model_time.tolist() == [0.0, 20.0, 500.0]
    assert torch.equal(shared.table, plain)


def test_the_log_variance_head_learns_the_log_of_the_error() -> None:
    objective = objectives.get("edm", log_variance=True)
    net = objectives.WithLogVariance(lambda x, time, cond: 0.0 * x)
    x0, seeds = torch.zeros(64, 1, 4, 4), torch.arange(64)
    loss = objective.loss(net, x0, None, seeds, 0)
    plain = objectives.get("edm").loss(lambda x, time, cond: 0.0 * x, x0, None, seeds, 0)
    torch.testing.assert_close(loss.mean, plain.mean)  # u starts at 0
    loss.mean.backward()
    assert net.head.bias.grad is not None
    torch.testing.assert_close(net.head.bias.grad[0], 1 - plain.per_sample.mean())

    errors = plain.per_sample
    best_u = errors.log().requires_grad_()
    again = objective.loss(lambda x, time, cond: (0.0 * x, best_u), x0, None, seeds, 0)
    again.mean.backward()
    torch.testing.assert_close(best_u.grad, torch.zeros(64), rtol=0, atol=1e-7)
    torch.testing.assert_close(again.mean.item(), 1 + errors.log().mean().item())


@pytest.mark.parametrize("name", objectives.names())
def test_an_objective_is_json(name: str) -> None:
    objective = objectives.get(name, drop_label=0.2, null_label=3)
    again = objectives.from_dict(json.loads(json.dumps(objective.to_dict())))
    assert again == objective and hash(again) == hash(objective)
    seeds = torch.arange(5)
    assert torch.equal(again.draw(seeds, 1).table, objective.draw(seeds, 1).table)


def test_the_denoiser_of_an_objective() -> None:
    model = objectives.get("edm", sigma_data=0.7, null_label=4).denoiser(lambda x, t: x)
    assert (model.prediction, model.sigma_data, model.null_label) == ("edm", 0.7, 4)
    assert model.schedule == schedules.edm()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dpm", {}, "Did you mean 'ddpm'"),
        ("ddpm", {"flipped": True}, "Did you mean 'flip'"),
        ("ddpm", {"schedule": 3}, "schedule must be a schedule"),
        ("ddpm", {"sigma_data": 0.5}, "belongs to prediction 'edm'"),
        ("ddpm", {"drop_label": 0.1}, "needs null_label"),
        ("ddpm", {"drop_label": 1.5, "null_label": 1}, "a probability"),
        ("ddpm", {"weighting": "snr"}, "Did you mean 'min_snr'"),
        ("ddpm", {"weighting": {"kind": "eps", "gamma": 5}}, "gamma belongs to"),
        ("ddpm", {"times": "lognorm"}, "Did you mean"),
        ("ddpm", {"times": {"name": "lognormal", "sd": 1}}, "Its options: mean, std"),
        ("ddpm", {"times": {"name": "lognormal", "std": 0}}, "above 0"),
        ("ddpm", {"perturbation": -1.0}, "0 or more"),
    ],
)
def test_refusals(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        objectives.get(name, **options)


def test_refusals_of_a_call() -> None:
    objective, x0 = objectives.get("ddpm", drop_label=0.5, null_label=1), torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"int64 \[2\]"):
        objective.loss(lambda *a: a[0], x0, None, torch.arange(3), 0)
    with pytest.raises(ValueError, match="unsigned 64-bit"):
        objective.loss(lambda *a: a[0], x0, None, torch.arange(2), -1)
    with pytest.raises(ValueError, match="integer labels"):
        objective.loss(lambda *a: a[0], x0, torch.zeros(2, 4), torch.arange(2), 0)
    with pytest.raises(ValueError, match="class_labels"):
        objective.loss(lambda *a: a[0], x0, {"text": x0}, torch.arange(2), 0)
    with pytest.raises(ValueError, match="expected the same shape"):
        objective.loss(lambda *a: a[0][:, :2], x0, None, torch.arange(2), 0)
    with pytest.raises(ValueError, match=r"the network returned \(\) for images of \(2, 3\)"):
        objective.loss(lambda *a: a[0].mean(), x0, None, torch.arange(2), 0)
    with pytest.raises(TypeError, match="WithLogVariance"):
        objectives.get("edm", log_variance=True).loss(lambda *a: a[0], x0, None, torch.arange(2), 0)
    with pytest.raises(ValueError, match="no finite target"):
        objectives.get("ddpm", prediction="edm", schedule="rectified_flow").at(np.array([1.0]), torch.arange(1))
    with pytest.raises(ValueError, match="not within the clock"):
        objectives.get("flow", times={"name": "uniform", "low": 2}).draw(torch.arange(1), 0)
