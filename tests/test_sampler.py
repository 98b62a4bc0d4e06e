"""The loop: seeds, places, formats, guidance, callbacks and starts."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from sampler_cases import bumpy, bumpy_model  # noqa: F401
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastdiff as fd
from fastdiff.engine import noise

BACKENDS = [name for name in ("reference", "cpp") if fd.backends()[name].ok]
SOLVERS = ("ddim", "ddpm", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_2m_sde")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_seed_gives_the_same_image_alone_in_a_batch_and_in_any_place(
    model: fd.Denoiser, solver: str, backend: str
) -> None:
    draw = {"solver": solver, "steps": 6, "backend": backend}
    shape = (3, 9, 7)  # not a multiple of four
    alone = fd.sample(model, (1, *shape), seed=[17], **draw)
    rng = np.random.default_rng(0)
    for place in (0, 31, 63):
        seeds = rng.integers(0, 2**62, 64).tolist()
        seeds[place] = 17
        batch = fd.sample(model, (64, *shape), seed=seeds, **draw)
        assert torch.equal(batch[place], alone[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 3, 9, 7), (1, 1, 5, 5), (2, 4, 6, 2)])
def test_memory_format_does_not_change_the_image(model: fd.Denoiser, shape: tuple[int, ...], backend: str) -> None:
    results = [
        fd.sample(model, shape, solver="dpmpp_2m_sde", steps=5, backend=backend, memory_format=layout)
        for layout in (torch.contiguous_format, torch.channels_last)
    ]
    assert torch.equal(results[0], results[1])


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.skipif(len(BACKENDS) < 2, reason="the compiled extension is not here: fastdiff info says why")
def test_executors_agree(model: fd.Denoiser, solver: str) -> None:
    results = [fd.sample(model, (4, 3, 8, 8), solver=solver, steps=10, backend=name) for name in BACKENDS]
    for other in results[1:]:
        assert (other - results[0]).abs().max() <= 1e-5 * results[0].abs().max()


def test_integer_seed_counts_up(model: fd.Denoiser) -> None:
    counted = fd.sample(model, (3, 2, 4, 4), seed=5, steps=3)
    assert torch.equal(counted, fd.sample(model, (3, 2, 4, 4), seed=[5, 6, 7], steps=3))
    assert torch.equal(counted, fd.sample(model, (3, 2, 4, 4), seed=torch.tensor([5, 6, 7]), steps=3))


def test_latents_are_sigma_times_the_named_normals(model: fd.Denoiser) -> None:
    seen: list[Tensor] = []

    def record(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x.clone())
        return torch.zeros_like(x)

    zero = fd.Denoiser(record, fd.schedules.edm(), "x0")
    fd.sample(zero, (2, 3, 4, 4), steps=1, seed=[8, 9])
    expected = np.stack([noise.normal(s, 48, 0, 0).reshape(3, 4, 4) for s in (8, 9)]) * np.float32(80.0)
    assert np.array_equal(seen[0].numpy(), expected)


FROM_THE_TOP = [s for s in map(fd.solvers.get, fd.solvers.names()) if not (s.flow_only or s.upward)]


@pytest.mark.parametrize("solver", [s.name for s in FROM_THE_TOP if s.name != "euler_maruyama"])
def test_one_step_from_the_top_returns_the_estimate_or_a_finite_walk(solver: str) -> None:
    constant = fd.Denoiser(lambda x, t: torch.full_like(x, 0.25), fd.schedules.edm(), "x0")
    given = {name: torch.ones(2, 3, 4, 4) for name in fd.plan(solver, "edm", 1).given}
    x = fd.sample(constant, (2, 3, 4, 4), solver=solver, steps=1, given=given)
    assert torch.equal(x, torch.full_like(x, 0.25))


def test_guidance_is_the_affine_combination_and_half_rows_run_half() -> None:
    sizes = []

    def labelled(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        sizes.append(len(x))
        return label.view(-1, 1, 1, 1).expand_as(x).contiguous()

    model = fd.Denoiser(labelled, fd.schedules.edm(), "x0")
    cond, uncond = {"label": torch.tensor([1.0, 2.0])}, {"label": torch.tensor([0.5, 0.0])}
    x = fd.sample(model, (2, 1, 2, 2), steps=2, cond=cond, uncond=uncond, guidance=[3.0, 1.0])
    assert x[:, 0, 0, 0].tolist() == [0.5 + 3 * 0.5, 2.0]
    assert sizes == [4, 4]
    fd.sample(model, (2, 1, 2, 2), steps=2, cond=cond, uncond=uncond, guidance=1.0)
    assert sizes[2:] == [2, 2]


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_whose_guidance_is_off_run_half_the_batch(backend: str) -> None:
    sizes = []

    def labelled(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        sizes.append(len(x))
        return 0.5 * x + label.view(-1, 1, 1, 1)

    model = fd.Denoiser(labelled, fd.schedules.edm(), "edm", sigma_data=0.5)
    cond, uncond = {"label": torch.tensor([1.0, 2.0])}, {"label": torch.zeros(2)}
    levels = [float(level.sigma) for level in fd.plan("dpmpp_2m", model.schedule, 4, "karras").levels]

    def run(interval: tuple[float, float] | None, guidance: float) -> Tensor:
        plan = fd.plan("dpmpp_2m", model.schedule, 4, "karras", guidance_interval=interval)
        sampler = fd.Sampler(plan, model, backend)
        return sampler.sample((2, 1, 3, 5), cond=cond, uncond=uncond, guidance=guidance)

    limited = run((levels[2] / 2, levels[1] * 2), 3.0)
    assert sizes == [2, 4, 4, 2]
    assert not torch.equal(limited, run(None, 3.0))
    assert torch.equal(run((1e3, 2e3), 3.0), run(None, 1.0))
    with pytest.raises(ValueError, match=r"guidance_interval must be \(low, high\)"):
        run((2.0, 1.0), 3.0)


def test_callback_sees_the_denoised_estimate(model: fd.Denoiser) -> None:
    seen: list[tuple[int, float, Tensor, Tensor]] = []

    def note(info: fd.RowInfo) -> None:
        seen.append((info.row, info.level.sigma, info.denoised.clone(), info.state.clone()))

    x = fd.sample(model, (2, 3, 4, 4), solver="euler", steps=4, callback=note)
    assert [row for row, *_ in seen] == [0, 1, 2, 3]
    assert torch.equal(seen[-1][2], x) and torch.equal(seen[-1][3], x)
    (_, sigma, denoised, state), (_, sigma_next, *_) = seen[1], seen[2]
    before = seen[0][3]
    expected = before + (sigma_next - sigma) / sigma * (before - denoised)
    assert torch.allclose(state, expected, rtol=1e-6, atol=1e-5)


def test_given_noise_replaces_the_counters(model: fd.Denoiser) -> None:
    plan = fd.plan("ddpm", model.schedule, 5, "karras")
    shape = (2, 3, 4, 4)
    draws = torch.from_numpy(
        np.stack([[noise.normal(s, 48, i, 1).reshape(3, 4, 4) for s in (0, 1)] for i in range(plan.draws)])
    )
    sampler = fd.Sampler(plan, model)
    white = sampler.sample(shape, seed=0)
    assert torch.equal(white, sampler.sample(shape, seed=0, noise=draws))
    assert torch.equal(white, sampler.sample(shape, seed=0, noise=lambda i, size: draws[i]))
    assert not torch.equal(white, sampler.sample(shape, seed=0, noise=draws.flip(0)))
    with pytest.raises(ValueError, match=r"noise must have shape \(4, 2, 3, 4, 4\)"):
        sampler.sample(shape, noise=draws[:2])


def test_init_is_used_as_it_is_and_image_is_noised(model: fd.Denoiser) -> None:
    image = torch.linspace(-1, 1, 48).view(1, 3, 4, 4)
    plan = fd.plan("euler", model.schedule, 10, "karras", strength=0.01)
    start = plan.levels[0]
    assert start.sigma == pytest.approx(0.002 + 0.01 * (80 - 0.002))
    sampler = fd.Sampler(plan, model)
    latent = torch.from_numpy(noise.normal(4, 48, 0, 0)).view(1, 3, 4, 4)
    from_state = sampler.sample(image.shape, seed=4, init=image + np.float32(start.sigma) * latent)
    from_image = sampler.sample(image.shape, seed=4, init=image, opening="image")
    assert torch.allclose(from_state, from_image, rtol=0, atol=1e-6)
    assert torch.equal(from_image, fd.sample(model, image.shape, "euler", 10, seed=4, init=image, strength=0.01))


def test_half_precision_network_and_fp32_state() -> None:
    seen = []

    def half(x: Tensor, t: Tensor) -> Tensor:
        seen.append((x.dtype, t.dtype))
        return torch.tanh(x)

    model = fd.Denoiser(half, fd.schedules.edm(), "edm", sigma_data=0.5, dtype=torch.bfloat16)
    exact = fd.Denoiser(half, fd.schedules.edm(), "edm", sigma_data=0.5)
    x, y = (fd.sample(m, (2, 3, 8, 8), steps=10) for m in (model, exact))
    assert seen[0] == (torch.bfloat16, torch.float32)
    assert x.dtype == torch.float32
    assert 0 < (x - y).abs().max() < 0.02


def test_buffers_are_reused_and_a_run_leaves_no_trace(model: fd.Denoiser) -> None:
    sampler = fd.Sampler(fd.plan("dpmpp_2m", model.schedule, 8, "karras"), model)
    first = sampler.sample((2, 3, 4, 4), seed=1)
    (kept,) = sampler._shelf.entries
    sampler.sample((2, 3, 4, 4), seed=99)
    assert torch.equal(first, sampler.sample((2, 3, 4, 4), seed=1))
    assert sampler._shelf.entries == (kept,)


class Dispatched(TorchDispatchMode):
    """Notes every torch operation that runs under it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(not fd.backends()["cpp"].ok, reason="the compiled extension is not here: fastdiff info says why")
def test_the_loop_runs_no_torch_operation_of_its_own() -> None:
    output = torch.zeros(2, 3, 8, 8)
    model = fd.Denoiser(lambda x, t: output, fd.schedules.edm(), "x0")
    counts = []
    for steps in (3, 30):
        sampler = fd.Sampler(fd.plan("dpmpp_2m_sde", model.schedule, steps, "karras"), model, "cpp")
        sampler.sample(output.shape)
        with Dispatched() as seen:
            sampler.sample(output.shape)
        counts.append(len(seen.names))
    assert counts[0] == counts[1]  # whatever is allocated, it is not per row


def test_a_seed_may_be_a_zero_dimensional_tensor(model: fd.Denoiser) -> None:
    shape = (2, 3, 4, 4)
    assert torch.equal(fd.sample(model, shape, steps=2, seed=torch.tensor(3)), fd.sample(model, shape, steps=2, seed=3))


def test_conditions_may_be_nested_and_every_tensor_reaches_its_branch() -> None:
    def net(x: Tensor, t: Tensor, added: dict[str, list[Tensor]], scale: float) -> Tensor:
        return scale * added["e"][0].view(-1, 1, 1, 1).expand_as(x).contiguous()

    model = fd.Denoiser(net, fd.schedules.edm(), "x0")

    def tree(value: float, scale: float = 2.0) -> dict[str, object]:
        return {"added": {"e": [torch.tensor([value])]}, "scale": scale}

    x = fd.sample(model, (1, 1, 2, 2), steps=2, cond=tree(1.0), uncond=tree(0.5), guidance=3.0)
    assert torch.equal(x, torch.full_like(x, 2.0 * (0.5 + 3 * 0.5)))
    with pytest.raises(ValueError, match=r"cond\['scale'\] and its counterpart.*got 2.0 and 1.0"):
        fd.sample(model, (1, 1, 2, 2), steps=2, cond=tree(1.0), uncond=tree(0.5, 1.0), guidance=3.0)
    text = fd.Denoiser(lambda x, t, text: x, fd.schedules.edm(), "x0")
    with pytest.raises(ValueError, match="'a cat' and ''.*encode text"):
        fd.sample(text, (1, 1, 2, 2), cond={"text": "a cat"}, uncond={"text": ""}, guidance=3.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_does_not_matter(model: fd.Denoiser, dtype: torch.dtype) -> None:
    expected = fd.sample(model, (2, 3, 4, 4), solver="ddpm", steps=3)
    torch.set_default_dtype(dtype)
    try:
        assert torch.equal(expected, fd.sample(model, (2, 3, 4, 4), solver="ddpm", steps=3))
    finally:
        torch.set_default_dtype(torch.float32)


def test_inference_mode_may_come_and_go(model: fd.Denoiser) -> None:
    sampler = fd.Sampler(fd.plan("ddpm", model.schedule, 3), model)
    with torch.inference_mode():
        inside = sampler.sample((2, 3, 4, 4))
    assert torch.equal(inside, sampler.sample((2, 3, 4, 4)))


def test_noise_given_and_drawn_may_alternate_on_one_sampler(model: fd.Denoiser) -> None:
    plan = fd.plan("ddpm", model.schedule, 4)
    sampler, shape = fd.Sampler(plan, model), (1, 3, 4, 4)
    zeros = torch.zeros(plan.draws, *shape)
    white = sampler.sample(shape)
    silent = sampler.sample(shape, noise=zeros)
    assert not torch.equal(white, silent)
    assert torch.equal(white, sampler.sample(shape))
    assert torch.equal(silent, sampler.sample(shape, noise=zeros))


def test_bare_levels_are_shown_to_networks_that_expect_sigma_only() -> None:
    def euler(net, x, sigmas):  # type: ignore[no-untyped-def]
        for s, t in itertools.pairwise(sigmas):
            x = x + (x - net(x, s)) / s * (t - s)
        return x

    with pytest.raises(ValueError, match="give trace.* schedule=model.schedule"):
        fd.Sampler(fd.trace(euler, [1.0, 0.5, 0.0]), fd.Denoiser(bumpy, "linear", "eps"))
    seen = []
    linear = fd.Denoiser(lambda x, t: seen.append(float(t[0])) or x, "linear", "eps")
    fd.Sampler(fd.trace(euler, [10.0, 3.0, 0.0], "linear"), linear).sample((1, 1, 2, 2))
    assert seen == pytest.approx([float(linear.schedule.time_from_rho(rho)) for rho in (10.0, 3.0)])


def test_an_image_goes_up_by_ddim_inverse_and_comes_back() -> None:
    model = fd.Denoiser(lambda x, t: 0.9 * x, fd.schedules.edm(0.01, 20.0), "x0")
    image = torch.linspace(-1.0, 1.0, 12).view(1, 3, 2, 2)
    latent = fd.sample(model, image.shape, "ddim_inverse", 200, init=image)
    back = fd.Sampler(fd.plan("ddim", model.schedule, 200), model).sample(image.shape, init=latent)
    assert latent.abs().max() > 1.2
    assert (back - image).abs().max() < 0.05
