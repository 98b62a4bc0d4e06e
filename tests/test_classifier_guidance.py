"""Guidance by a classifier of noised images: against closed forms, its network, its training run, what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_trainer import Killed, kill_after
from tiny_runs import assert_same, lines, tiny, weights
from torch import Tensor

import fastdiff as fd
from fastdiff import cli
from fastdiff.models import NoisyClassifier, UNetClassifier, UNetConfig, classifier_guided, load_noisy_classifier
from fastdiff.models.exact import Mixture
from fastdiff.process import predictions, schedules
from fastdiff.process.schedules import Level, Schedule
from fastdiff.training.data.loader import Loader
from fastdiff.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("single_thread")

WEIGHTS, MEANS, VARIANCES = [0.3, 0.7], np.array([[1.0, -0.5, 0.2], [-0.8, 0.4, 0.6]]), [0.2, 0.5]
SIGMA_DATA = 0.7
# prediction, schedule, and times that the network is shown, exact in fp32
KINDS = [
    ("eps", "linear", (5.0, 300.0, 700.5)),
    ("v", "cosine", (5.0, 300.0, 900.0)),
    ("v", "rectified_flow", (0.0625, 0.5, 0.9375)),
    ("x0", "sub_vp", (0.0625, 0.5, 0.9375)),
    ("score", "ve", (0.125, 0.5, 0.875)),
    ("flow", "rectified_flow", (0.0625, 0.5, 0.9375)),
    ("eps", "edm", (0.125, 2.0, 100.0)),  # the last is above the clock, where churn leads
    ("edm", "edm", (-0.5, 0.125, 0.75)),
]


def level_of(prediction: str, schedule: Schedule, shown: float) -> Level:
    if prediction == "edm":
        return Level(1.0, math.exp(4 * shown), math.exp(4 * shown))
    return Level(1.0, shown, shown) if schedule.name == "edm" else schedule.level(shown)


def network(prediction: str, schedule: Schedule, law: Mixture):
    """What a perfect network of this kind answers about this law, in the dtype of x."""

    def call(x: Tensor, t: Tensor) -> Tensor:
        answers = []
        for one, shown in zip(x, t.tolist(), strict=True):
            level = level_of(prediction, schedule, shown)
            sigma_data = SIGMA_DATA if prediction == "edm" else None
            how = predictions.coefficients(prediction, level, None, sigma_data)
            state = one[None] / how.c_in
            answers.append((law(state, level) - how.P * state) / how.Q)
        return torch.cat(answers)

    return call


def closed_form(prediction: str, schedule: Schedule):
    """log w_k N(x; alpha mean_k, alpha^2 v_k + sigma^2), x unscaled: the best classifier's logits."""

    def call(x: Tensor, t: Tensor) -> Tensor:
        rows = []
        for one, shown in zip(x, t.tolist(), strict=True):
            level = level_of(prediction, schedule, shown)
            state = one * math.hypot(level.sigma, SIGMA_DATA) if prediction == "edm" else one
            logits = []
            for weight, mean, variance in zip(WEIGHTS, MEANS, VARIANCES, strict=True):
                total = level.alpha**2 * variance + level.sigma**2
                square = (state - level.alpha * torch.from_numpy(mean).to(x.dtype)).square().sum()
                logits.append(math.log(weight) - 1.5 * math.log(total) - 0.5 * square / total)
            rows.append(torch.stack(logits))
        return torch.stack(rows)

    return call


def models(prediction: str, name: str) -> tuple[fd.Denoiser, NoisyClassifier, list[fd.Denoiser]]:
    """The unconditional denoiser of the mixture, its classifier, and the denoiser of each class."""
    schedule, known = schedules.get(name), {"sigma_data": SIGMA_DATA} if prediction == "edm" else {}
    laws = [Mixture(WEIGHTS, MEANS, VARIANCES), *(Mixture([1.0], MEANS[k : k + 1], VARIANCES[k]) for k in range(2))]
    made = [fd.Denoiser(network(prediction, schedule, law), schedule, prediction, **known) for law in laws]
    return made[0], NoisyClassifier(closed_form(prediction, schedule), schedule, prediction, **known), made[1:]


@pytest.mark.parametrize(("prediction", "name", "times"), KINDS)
def test_guided_by_the_exact_classifier_it_is_the_conditional_denoiser(
    prediction: str, name: str, times: tuple[float, ...]
) -> None:
    model, classifier, classes = models(prediction, name)
    guided = classifier_guided(model, classifier, 1.0)
    shown, labels = torch.tensor(times).repeat(2), torch.arange(2).repeat_interleave(len(times))
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(len(shown), 3, dtype=torch.float64, generator=generator)
    x = []
    for one, t in zip(noise, shown.tolist(), strict=True):
        level = level_of(prediction, model.schedule, t)
        scaled = level.alpha * torch.from_numpy(MEANS[0]) + level.sigma * one
        x.append(scaled / math.hypot(level.sigma, SIGMA_DATA) if prediction == "edm" else scaled)
    x = torch.stack(x)
    got = guided(x, shown, {"classifier_labels": labels})
    expected = torch.cat([classes[k](x[labels == k], shown[labels == k]) for k in range(2)])
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    plain = model(x, shown)
    assert ((expected - plain).abs().amax(1) > 1e-5).all(), "the label matters at each of these levels"
    twice = classifier_guided(model, classifier, 2.0)(x, shown, {"classifier_labels": labels})
    torch.testing.assert_close(twice - plain, 2 * (got - plain), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("prediction", "name", "solver"),
    [("edm", "edm", "dpmpp_2m"), ("eps", "linear", "ddpm"), ("flow", "rectified_flow", "heun")],
)
def test_samples_are_those_of_the_conditional_denoiser(prediction: str, name: str, solver: str) -> None:
    model, classifier, classes = models(prediction, name)
    plan = fd.plan(solver, model.schedule, 6)
    guided = fd.Sampler(plan, classifier_guided(model, classifier), "reference")
    for k in range(2):
        with torch.inference_mode():
            x = guided.sample((4, 3), seed=7, cond={"classifier_labels": torch.full((4,), k)})
        expected = fd.Sampler(plan, classes[k], "reference").sample((4, 3), seed=7)
        if name != "rectified_flow":  # which starts at alpha = 0, where no x says anything of the label
            torch.testing.assert_close(x, expected, rtol=0, atol=1e-4)
        apart = (guided.sample((4, 3), seed=7, cond={"classifier_labels": torch.full((4,), 1 - k)}) - x).abs()
        assert apart.max() > 0.1


def test_at_alpha_0_nothing_is_moved_and_other_times_than_the_prepared_are_nan() -> None:
    model, classifier, _ = models("flow", "rectified_flow")
    guided = classifier_guided(model, classifier, 3.0)
    x, labels = (
        torch.randn(1, 3, generator=torch.Generator().manual_seed(0)),
        {"classifier_labels": torch.zeros(1).long()},
    )
    assert torch.equal(guided(x, torch.ones(1), labels), model(x, torch.ones(1)))
    prepared = guided.around(guided.net.prepare_times(torch.tensor([0.25, 0.5])))
    assert torch.equal(prepared(x, torch.tensor([0.5]), labels), guided(x, torch.tensor([0.5]), labels))
    assert prepared(x, torch.tensor([0.75]), labels).isnan().all()


def test_a_learned_variance_is_left_as_it_is() -> None:
    model, classifier, _ = models("eps", "linear")
    own = model.net
    both = fd.Denoiser(lambda x, t: torch.cat((own(x, t), 5 * x), 1), model.schedule, learned_variance=True)
    x, t, labels = torch.ones(2, 3), torch.full((2,), 300.0), {"classifier_labels": torch.arange(2)}
    got = classifier_guided(both, classifier)(x, t, labels)
    assert torch.equal(got[:, :3], classifier_guided(model, classifier)(x, t, labels)) and torch.equal(
        got[:, 3:], 5 * x
    )


CONFIG = UNetConfig(
    sample_size=8, in_channels=2, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    attention_head_dim=8, resnet_time_scale_shift="scale_shift", attn_norm_num_groups=4, num_class_embeds=3,
)  # fmt: skip


def test_the_gradient_of_the_network_is_that_of_finite_differences() -> None:
    torch.manual_seed(0)
    net = UNetClassifier(CONFIG).eval()
    assert torch.equal(net(torch.randn(2, 2, 8, 8), 3.0), torch.zeros(2, 3)), "at first no class is likelier"
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x, shift = torch.randn(2, 2, 2, 8, 8, dtype=torch.float64)
    time, labels, step = torch.tensor([10.0, 600.0]), torch.tensor([2, 0]), 1e-5

    def gradient(net: UNetClassifier, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        classifier = NoisyClassifier(net, schedules.linear())
        return torch.autograd.grad(classifier.log_likelihood(x, time, labels).sum(), x)[0]

    double = UNetClassifier(CONFIG).double().eval()
    double.load_state_dict(net.state_dict())
    exact = gradient(double, x)
    classifier = NoisyClassifier(double, schedules.linear())
    ahead, behind = (classifier.log_likelihood(x + h * shift, time, labels) for h in (step, -step))
    slope = (exact * shift).sum((1, 2, 3))
    torch.testing.assert_close(slope, (ahead - behind).detach() / (2 * step), rtol=1e-6, atol=1e-9)
    assert slope.abs().min() > 1e-3
    frozen = net.requires_grad_(False).to(memory_format=torch.channels_last)
    got = gradient(frozen, x.float().contiguous(memory_format=torch.channels_last)).double()
    torch.testing.assert_close(got, exact, rtol=0, atol=1e-4 * float(exact.abs().max()))


LEVEL, COUNT, PIXELS = 300.0, 512, (113, 142)  # of black to white, of each class


@pytest.fixture
def two_greys(tmp_path: Path) -> Path:
    """Pictures that are one of two greys throughout."""
    labels = np.arange(COUNT) % 2
    images = np.array(PIXELS, np.uint8)[labels][:, None, None] * np.ones((1, 8, 8), np.uint8)
    np.savez(tmp_path / "greys.npz", images=images, labels=labels)
    return tmp_path / "greys.npz"


def classifying(data: Path, **changes: object):
    options = {"times": {"name": "discrete", "values": [LEVEL]}}
    return tiny(data, objective="classifier", weights_dtype="float32").change(objective_options=options, **changes)


def test_training_reaches_the_best_cross_entropy(two_greys: Path, tmp_path: Path) -> None:
    config = classifying(
        two_greys, images=19200, batch=64, learning_rate=1e-2, warmup_images=640, log_images=6400, save_images=19200,
        eval_images=19200, ema_halflife=1000, network={"dropout": 0.0},
    )  # fmt: skip
    trainer = Trainer(config, tmp_path / "run")
    trainer.train()
    level = trainer.objective.schedule.level(LEVEL)
    low, high = (2 * value / 255 - 1 for value in PIXELS)

    def best(x: Tensor, time: Tensor, cond: object) -> Tensor:
        """Log odds of two points: (x - middle, difference) alpha / sigma^2."""
        odds = level.alpha * (high - low) / level.sigma**2 * (x - level.alpha * (low + high) / 2).sum((1, 2, 3))
        return torch.stack((torch.zeros_like(odds), odds), 1)

    batch = Loader(trainer.source, 0x5EED, COUNT).read(0)
    floor = trainer.objective.loss(best, batch.pictures, batch.labels, batch.seeds, 0)
    gap = 8 * level.alpha * (high - low) / level.sigma  # between the means, in deviations of the noise
    nodes, mass = np.polynomial.hermite_e.hermegauss(80)
    entropy = (mass * np.logaddexp(0, -(gap**2 / 2 + gap * nodes))).sum() / mass.sum()
    hits = 0.5 * (1 + math.erf(gap / 2 / math.sqrt(2)))
    spread = float(floor.per_sample.std()) / math.sqrt(COUNT)
    assert 0.2 < entropy < 0.5 and abs(float(floor.mean) - entropy) < 4 * spread
    (found,) = lines(tmp_path / "run", "eval")
    assert -0.005 < found["loss"] - float(floor.mean) < 0.03
    accuracy = float(floor.correct.float().mean()) if floor.correct is not None else 0.0
    assert abs(accuracy - hits) < 0.05 and abs(found["accuracy"] - accuracy) < 0.02

    loaded = load_noisy_classifier(tmp_path / "run")
    assert loaded.schedule == trainer.objective.schedule and loaded.class_names == ("0", "1")
    x, time = torch.randn(2, 1, 8, 8), torch.full((2,), LEVEL)
    told = trainer.previews.network()(x, time).log_softmax(1).diagonal()
    torch.testing.assert_close(loaded.log_likelihood(x, time, torch.arange(2)), told, rtol=0, atol=1e-5)


def test_a_resumed_run_is_the_whole_one(two_greys: Path, tmp_path: Path) -> None:
    config = classifying(two_greys)
    whole = Trainer(config, tmp_path / "whole")
    assert whole.config.drop_label == 0.0 and whole.flops > 0
    whole.train()
    with pytest.raises(Killed):
        Trainer(config, tmp_path / "run").train(kill_after(56))
    resumed = Trainer(config, tmp_path / "run", resume="auto")
    assert resumed.progress.images == 48 and resumed.train() == "done"
    assert_same(weights(resumed), weights(whole))


def test_a_classifier_is_no_denoiser(two_greys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, data = str(tmp_path / "run"), str(two_greys)
    small = ["--images", "128", "--size", "8", "--threads", "1", "--network", "block_out_channels=[8,8]"]
    command = ["train", "--preset", "fashion32", "--data", data, "--out", run, "--resize", "none", *small]
    command += ["--network", "attention_head_dim=8", "--objective", "classifier"]
    assert cli.main(command) == 0
    assert f"classifier_guided(model, fd.models.load_noisy_classifier({run!r}))" in capsys.readouterr().out
    init = ["train", "--preset", "fashion32", "--data", data, "--out", str(tmp_path / "other"), "--init", run, *small]
    for command in (["sample", "--model", run, "--out", str(tmp_path / "x.png")], ["eval", "--model", run], init):
        assert cli.main(command) == 2
        message = capsys.readouterr().err
        assert "holds a classifier of noised images, which draws nothing itself" in message
        assert "Traceback" not in message
    with pytest.raises(ValueError, match="holds no `unet` configuration"):
        fd.models.UNet.load(tmp_path / "run" / "model.safetensors")
    with pytest.raises(ValueError, match="holds no classifier of noised images, expected what fastdiff train"):
        load_noisy_classifier("fashion")


def test_refusals() -> None:
    model, classifier, _ = models("edm", "edm")
    net = UNetClassifier(CONFIG)
    with pytest.raises(TypeError, match="needs a classifier of noised images, got UNetClassifier; load one with"):
        classifier_guided(model, net)
    with pytest.raises(TypeError, match="needs a Denoiser, got function"):
        classifier_guided(model.net, classifier)
    with pytest.raises(ValueError, match="scale must be finite, got nan"):
        classifier_guided(model, classifier, math.nan)
    with pytest.raises(ValueError, match="sigma_data: 0.7 there, 0.5 here. Train one with"):
        classifier_guided(model, NoisyClassifier(net, schedules.edm(), "edm"))
    with pytest.raises(ValueError, match=r"preconditioning: True there, False here; schedule: None there, edm\("):
        classifier_guided(model, NoisyClassifier(net, schedules.edm(), "eps"))
    shared = schedules.time_shared(schedules.linear())
    with pytest.raises(ValueError, match="shown times that levels share"):
        classifier_guided(fd.Denoiser(model.net, shared), NoisyClassifier(net, shared))
    with pytest.raises(ValueError, match="num_class_embeds is 1, expected 2 or more"):
        UNetClassifier(replace(CONFIG, num_class_embeds=1))
    guided = classifier_guided(fd.Denoiser(lambda x, t: x, "linear"), NoisyClassifier(net, schedules.linear()))
    x, time = torch.zeros(2, 2, 8, 8), torch.zeros(2)
    with pytest.raises(ValueError, match=r"got no classifier_labels, expected cond=\{'classifier_labels': int64 \[2\]"):
        guided(x, time, torch.arange(2))
    with pytest.raises(ValueError, match=r"got classifier_labels \[0, 3\], expected integers from 0 to 2"):
        guided(x, time, {"classifier_labels": torch.tensor([0, 3])})
    with pytest.raises(TypeError, match="the network takes"):
        guided(x, time, {"classifier_labels": torch.arange(2), "class_labels": torch.arange(2)})
