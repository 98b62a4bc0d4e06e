"""Traced functions: their table gives what the function itself gives, and what is no table is refused with its row.

k-diffusion's own functions are run twice on the same random model outputs and normals: once as they are, in float64,
and once from their table. Needs k_diffusion's sampling.py only, not what the rest of that package imports.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import itertools
import sys
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pace
import pytest
import torch

import fastdiff as fd
from fastdiff.compiler import layout
from fastdiff.compiler.verify import execute
from fastdiff.process.schedules import Level

Array = np.ndarray[Any, np.dtype[np.float64]]

SIZE = (2, 3)
TOLERANCE = 1e-12
LEVELS = np.append(np.geomspace(14.6, 0.03, 12), 0.0)


def k_diffusion() -> Any:
    """k_diffusion.sampling without its package's __init__, which imports what training and metrics need."""
    if "k_diffusion.sampling" in sys.modules:
        return sys.modules["k_diffusion.sampling"]
    spec = importlib.util.find_spec("k_diffusion")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("k-diffusion is not installed: pip install --no-deps k-diffusion")
    package = types.ModuleType("k_diffusion")
    package.__path__ = list(spec.submodule_search_locations)
    added = {"k_diffusion": package}
    for name in ("torchvision", "torchvision.transforms"):
        if importlib.util.find_spec("torchvision") is None:
            added[name] = types.ModuleType(name)
            added[name].functional = None  # type: ignore[attr-defined]
    sys.modules.update(added)
    try:
        return importlib.import_module("k_diffusion.sampling")
    finally:
        for name in added:
            del sys.modules[name]


CASES = [
    ("euler", {}),
    ("euler", {"s_churn": 6.0, "s_tmin": 0.1, "s_tmax": 8.0, "s_noise": 1.003}),
    ("euler_ancestral", {}),
    ("euler_ancestral", {"eta": 0.4, "s_noise": 1.01}),
    ("heun", {}),
    ("heun", {"s_churn": 6.0, "s_tmin": 0.1, "s_tmax": 8.0, "s_noise": 1.003}),
    ("dpm_2", {}),
    ("dpm_2", {"s_churn": 6.0, "s_noise": 1.003}),
    ("dpm_2_ancestral", {}),
    ("lms", {}),
    ("lms", {"order": 2}),
    ("dpm_fast", {}),
    ("dpm_fast", {"n": 7, "eta": 0.5}),
    ("dpmpp_2s_ancestral", {}),
    ("dpmpp_sde", {}),
    ("dpmpp_sde", {"eta": 0.5, "r": 0.4}),
    ("dpmpp_2m", {}),
    ("dpmpp_2m_sde", {}),
    ("dpmpp_2m_sde", {"solver_type": "heun", "eta": 0.6}),
    ("dpmpp_3m_sde", {}),
    ("dpmpp_3m_sde", {"eta": 0.0}),
]


class Peer:
    """The function itself on random outputs and normals; `normals[k]` is its k-th draw."""

    def __init__(self, function: Callable[..., Any], levels: Array, options: dict[str, Any]) -> None:
        rng = np.random.default_rng(0)
        self.outputs: Array = rng.standard_normal((200, *SIZE))
        self.normals: Array = rng.standard_normal((200, *SIZE))
        self.start: Array = levels[0] * rng.standard_normal(SIZE)
        self.seen: list[tuple[Array, float]] = []
        self.drawn = 0
        known = inspect.signature(function).parameters
        arguments: dict[str, Any] = {"disable": True, **options}
        if "noise_sampler" in known:
            arguments["noise_sampler"] = self._draw
        if "sigmas" in known:
            arguments["sigmas"] = torch.tensor(levels)
        else:
            arguments |= {"sigma_min": float(levels[levels > 0][-1]), "sigma_max": float(levels[0])}
            arguments.setdefault("n", len(levels) - 1)
        original, torch.randn_like = torch.randn_like, self._draw
        try:
            self.result: Array = function(self._model, torch.from_numpy(self.start), **arguments).numpy()
        finally:
            torch.randn_like = original

    def _model(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        self.seen.append((x.numpy().copy(), float(sigma.reshape(-1)[0])))
        return torch.from_numpy(self.outputs[len(self.seen) - 1])

    def _draw(self, *_: Any, **__: Any) -> torch.Tensor:
        self.drawn += 1
        return torch.from_numpy(self.normals[self.drawn - 1])

    def compare(self, plan: fd.Plan) -> float:
        """The worst relative difference of any state the model sees, and of the result."""
        count, worst = 0, 0.0

        def denoise(x: Array, level: Level) -> Array:
            nonlocal count, worst
            state, sigma = self.seen[count]
            worst = max(worst, float(np.abs(x - state).max() / np.abs(state).max()))
            assert level.alpha == 1.0 and level.sigma == pytest.approx(sigma, rel=1e-12)
            count += 1
            return self.outputs[count - 1]

        ours = execute(plan, denoise, self.start, lambda k, _: self.normals[k])
        assert count == len(self.seen) == plan.nfe
        return max(worst, float(np.abs(ours - self.result).max() / np.abs(self.result).max()))


# One step leaves dpm_fast nothing to do, and these two read a step size that they never set.
NOT_IN_ONE_STEP = ("dpm_fast", "dpmpp_2m_sde", "dpmpp_3m_sde")
STEPS = (1, 2, 3, 12)
RUNS = [(*case, steps) for case in CASES for steps in STEPS if steps > 1 or case[0] not in NOT_IN_ONE_STEP]


@pytest.mark.parametrize(
    ("name", "options", "steps"), RUNS, ids=["-".join(map(str, (n, *o.values(), k))) for n, o, k in RUNS]
)
def test_k_diffusion(name: str, options: dict[str, Any], steps: int) -> None:
    function = getattr(k_diffusion(), f"sample_{name}")
    levels = LEVELS[-steps - 1 :]
    plan = fd.trace(function, levels, **options)
    peer = Peer(function, levels, options)
    assert peer.compare(plan) < TOLERANCE
    assert plan.draws in (0, peer.drawn)
    assert plan.options["mismatch"] < TOLERANCE
    restored = fd.Plan.from_json(plan.to_json())
    assert restored == plan


def test_every_k_diffusion_sampler_is_tried() -> None:
    names = {name for name in vars(k_diffusion()) if name.startswith("sample_")}
    assert names == {f"sample_{name}" for name, _ in CASES} | {"sample_dpm_adaptive"}


def test_the_adaptive_one_is_refused_with_the_row() -> None:
    with pytest.raises(TypeError, match=r"sample_dpm_adaptive.* row 2,.*abs"):
        fd.trace(k_diffusion().sample_dpm_adaptive, LEVELS)


def test_brownian_trees_are_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    module = k_diffusion()
    monkeypatch.setattr(module, "BrownianTreeNoiseSampler", None)
    assert fd.trace(module.sample_dpmpp_2m_sde, LEVELS).draws == len(LEVELS) - 2


@pytest.mark.parametrize("own", [False, True])
def test_draws_by_a_shape_alone_are_named(own: bool) -> None:
    """From torch's generator or from the function's own."""

    def fn(model: Any, x: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
        for sigma, following in itertools.pairwise(sigmas):
            generator = torch.Generator().manual_seed(3) if own else None
            normal = torch.randn(x.shape, generator=generator, dtype=x.dtype)
            x = 0.5 * x + 0.5 * model(x, sigma) + following * normal
        return x

    plan = fd.trace(fn, [3.0, 2.0, 1.0])
    assert [row.noise for row in plan.rows] == [(), ((0, 1),), ((1, 1),)]
    assert [row.outputs[0].noise for row in plan.rows[1:]] == [(2.0,), (1.0,)]
    assert plan.options["mismatch"] < 1e-14


@pytest.mark.parametrize("bound", [False, True])
def test_a_given_generator_is_left_as_it_was(bound: bool) -> None:
    """Given as an argument, or bound to the function."""

    def fn(model: Any, x: torch.Tensor, sigmas: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        x = 0.5 * x + 0.5 * model(x, sigmas[0])
        return x + torch.randn(x.shape, generator=generator, dtype=x.dtype)

    given = torch.Generator().manual_seed(1)
    states = given.get_state(), torch.get_rng_state()
    options = {"generator": given}
    plan = fd.trace(functools.partial(fn, **options), [3.0, 1.0]) if bound else fd.trace(fn, [3.0, 1.0], **options)
    assert plan.draws == 1
    assert all(map(torch.equal, (given.get_state(), torch.get_rng_state()), states))


def test_a_draw_in_a_thread_is_refused() -> None:
    def fn(model: Any, x: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
        with ThreadPoolExecutor(1) as pool:
            return model(x, sigmas[0]) + pool.submit(torch.randn_like, x).result()

    with pytest.raises(TypeError, match="draws fewer normals than on registers"):
        fd.trace(fn, [3.0, 1.0])


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m_sde"])
@pytest.mark.alone
def test_fifty_steps_take_less_than_50_ms(name: str) -> None:
    function = getattr(k_diffusion(), f"sample_{name}")
    levels = np.append(np.geomspace(14.6, 0.03, 50), 0.0)
    took = min(pace.timed(fd.trace, function, levels, limit=0.05)[0] for _ in range(5))
    print(f"{name}, 50 steps: {1e3 * took:.0f} ms")
    assert took < 0.05


def every_way(model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: Any = None) -> torch.Tensor:
    """A sampler that does what such code does, in as many spellings as it has."""
    ones = x.new_ones([x.shape[0]])
    sigmas = sigmas.to(x)
    total = torch.zeros_like(x)
    previous = None
    for i in range(len(sigmas) - 1):
        s, t = sigmas[i], sigmas[i + 1]
        denoised = model(x, s * ones)
        d = (x - denoised) / s[(...,) + (None,) * x.ndim]
        noise = torch.randn(x.shape, dtype=x.dtype, device=x.device)
        if i % 2:
            x = torch.lerp(denoised, x, t / s)
        else:
            x = x.clone()
            x += d * (t - s).item()
        x = torch.add(x, noise, alpha=0.1 * t.item())
        x.add_(d, alpha=0.01).mul_(0.99).sub_(torch.zeros(x.shape, dtype=x.dtype))
        if previous is not None:
            x = x.addcmul(previous, t, value=0.02) - 0.03 * previous.neg() + torch.as_tensor(0.5).sqrt() * d
        view = total.detach()
        total.add_(d)
        x = x + 0.001 * view + 0.001 * torch.full_like(x, 0.5) * d - 0.001 * t.expand_as(x) * d
        previous = d
    return (x + 0.001 * total).to(x.dtype).contiguous()


@pytest.mark.parametrize("steps", [2, 7])
def test_every_spelling(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    levels = LEVELS[-steps - 1 :]
    plan = fd.trace(every_way, levels)
    assert plan.nfe == plan.draws == steps
    rng = np.random.default_rng(1)
    outputs, normals = rng.standard_normal((2, steps, *SIZE))
    start = rng.standard_normal(SIZE)
    calls = iter(torch.from_numpy(outputs))
    draws = iter(torch.from_numpy(normals))
    monkeypatch.setattr(torch, "randn", lambda *_, **__: next(draws))
    theirs = every_way(lambda x, sigma: next(calls), torch.from_numpy(start), torch.tensor(levels)).numpy()
    again = iter(outputs)
    ours = execute(plan, lambda x, level: next(again), start, lambda k, _: normals[k])
    np.testing.assert_allclose(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)


def test_expressions_do_not_grow_with_the_history() -> None:
    def averaged(model: Any, x: Any, sigmas: Any) -> Any:
        mean = x
        for i in range(len(sigmas) - 1):
            d = (mean - model(mean, sigmas[i])) / sigmas[i]
            x = x + (sigmas[i + 1] - sigmas[i]) * d
            mean = 0.7 * mean + 0.3 * x
        return x

    plan = fd.trace(averaged, np.append(np.geomspace(80.0, 0.01, 40), 0.0))
    assert plan.registers <= 3
    assert max(len(row.slots) for row in plan.rows) <= 2


def test_values_that_are_multiples_share_a_register() -> None:
    def spread(model: Any, x: Any, sigmas: Any) -> Any:
        for i in range(len(sigmas) - 1):
            d = x - model(x, sigmas[i])
            forms = [d, d * 2.0, d / 3.0, -d, d * sigmas[i]]
            x = x - 0.5 * d
            d2 = x - model(x, 0.9 * sigmas[i])
            x = x - 0.1 * sum(forms) - 0.1 * d2
        return x

    assert max(len(row.outputs) for row in fd.trace(spread, LEVELS).rows) <= 2


def bad(action: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def sampler(model: Any, x: Any, sigmas: Any) -> Any:
        for i in range(len(sigmas) - 1):
            denoised = model(x, sigmas[i])
            x = x + action(x, denoised) if i == 2 else denoised
        return x

    return sampler


@pytest.mark.parametrize(
    ("action", "words"),
    [
        (lambda x, d: x * d, "multiplies two registers"),
        (lambda x, d: x / d, "divides by a register"),
        (lambda x, d: d**2, "pow"),
        (lambda x, d: d.clamp(-1, 1), "clamp"),
        (lambda x, d: x if d.mean() > 0 else d, "mean"),
        (lambda x, d: x if d > 0 else d, "gt"),
        (lambda x, d: x + 1.0, "adds the constant"),
        (lambda x, d: d[:, :1], "getitem"),
        (lambda x, d: x * torch.linspace(0, 1, x.shape[-1]), "elements differ"),
        (lambda x, d: torch.stack([x, d]).sum(0), "stack"),
        (lambda x, d: float(d), "float|item"),
        (lambda x, d: torch.rand(x.shape), "rand"),
        (lambda x, d: d.numpy(), "numpy"),
    ],
)
def test_what_is_no_weighted_sum_is_refused(action: Callable[[Any, Any], Any], words: str) -> None:
    with pytest.raises(TypeError, match=words) as error:
        fd.trace(bad(action), LEVELS)
    assert "sampler" in str(error.value) and "row 2" in str(error.value)


def test_a_function_that_remembers_is_refused() -> None:
    calls = []

    def remembers(model: Any, x: Any, sigmas: Any) -> Any:
        calls.append(1)
        for i in range(len(sigmas) - 1):
            x = x - (0.1 * len(calls) if i == 2 else 0.1) * model(x, sigmas[i])
        return x

    with pytest.raises(TypeError, match=r"remembers.*row 2.*differs .*by \d.*keeps state"):
        fd.trace(remembers, LEVELS)


def test_two_views_of_one_storage_are_refused_or_right() -> None:
    def views(model: Any, x: Any, sigmas: Any) -> Any:
        for i in range(len(sigmas) - 1):
            old = x.view(x.shape) if i == 3 else x.detach()
            x -= 0.1 * model(x, sigmas[i])
            x = x + 0.5 * old
        return x

    with pytest.raises(TypeError, match=r"views.*row 2.*torch.view"):
        fd.trace(views, LEVELS)
    assert fd.trace(views, LEVELS[-3:]).options["mismatch"] < TOLERANCE


def test_scalars_that_depend_on_the_shape_are_refused() -> None:
    def shaped(model: Any, x: Any, sigmas: Any) -> Any:
        for i in range(len(sigmas) - 1):
            x = x - model(x, sigmas[i]) / x.numel() ** 0.5
        return x

    with pytest.raises(TypeError, match=r"shaped.*row 0.*depends on the shape"):
        fd.trace(shaped, LEVELS)


def test_too_many_values_are_refused() -> None:
    def wide(model: Any, x: Any, sigmas: Any) -> Any:
        seen = []
        for i in range(len(sigmas) - 1):
            seen.append(model(x, sigmas[i]))
            x = sum(value / len(seen) for value in seen)
        return x

    with pytest.raises(ValueError, match=rf"reads .*at most {layout.MAX_SLOTS}"):
        fd.trace(wide, LEVELS)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: fd.trace(3, LEVELS), "must be a function"),
        (lambda: fd.trace(lambda model, x: x, LEVELS), "sigmas"),
        (lambda: fd.trace(every_way, LEVELS, eta=1.0), "no argument eta"),
        (lambda: fd.trace(lambda model, x, sigmas: 0, LEVELS), "returned int"),
        (lambda: fd.trace(lambda model, x, sigmas: model(3.0, 1.0), LEVELS), "instead of a state"),
        (lambda: fd.trace(every_way, [1.0]), "at least two"),
        (lambda: fd.trace(every_way, [1.0, 2.0]), "descending"),
        (lambda: fd.trace(every_way, [float("inf"), 2.0]), "finite"),
    ],
)
def test_bad_arguments(call: Callable[[], Any], words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        call()


def test_a_trace_is_the_built_in_solver() -> None:
    """The same table through the schedule, the network's prediction and the engine."""
    schedule = fd.schedules.linear()
    rho = [fd.plan("euler", schedule, steps=6).levels[i].rho for i in range(6)]

    def euler(model: Any, x: Any, sigmas: Any) -> Any:
        for i in range(len(sigmas) - 1):
            x = x + (x - model(x, sigmas[i])) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
        return x

    model = fd.Denoiser(lambda x, t: torch.tanh(x) * (1 + t.view(-1, 1, 1, 1) / 1000), schedule, "eps")
    ours = fd.Sampler(fd.trace(euler, [*rho, 0.0], schedule), model).sample((2, 3, 8, 8), seed=3)
    theirs = fd.Sampler(fd.plan("euler", schedule, steps=6), model).sample((2, 3, 8, 8), seed=3)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
