"""k_diffusion.patch and unpatch on the installed k-diffusion and on changed copies of it; signatures; the page."""

from __future__ import annotations

import functools
import inspect
import math
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import k_diffusion_modules
import pytest
import torch
from k_diffusion_cases import ALL, CHURN, TABLES, TOLERANCE, apart, levels_of, model, run, sigmas_of, start
from torch import Tensor

from fastdiff.integrations import k_diffusion as K

pytest_plugins = ["k_diffusion_cases"]  # the fixture `theirs`


class Test_patch:
    def test_everything_of_k_diffusion_and_back(self, theirs: Any) -> None:
        before = dict(vars(theirs))
        report = K.patch()
        assert report.replaced == tuple(TABLES)
        assert report.left == {
            "sample_dpm_adaptive": "not a table here: it chooses its steps for the whole batch as it goes"
        }
        assert report.module == "k_diffusion.sampling"
        assert K.patch() == report, "twice is once"
        for name in TABLES:
            assert inspect.signature(getattr(theirs, name)) == inspect.signature(before[name])
            ours, state = run(getattr(theirs, name), model, start(), *levels_of(name, 5))
            expected, their_state = run(before[name], model, start(), *levels_of(name, 5))
            assert not torch.equal(ours, expected) or name == "sample_euler", "it is not their code that ran"
            assert apart(ours, expected) < TOLERANCE and torch.equal(state, their_state)
        assert K.unpatch().replaced == tuple(TABLES)
        assert dict(vars(theirs)) == before
        assert K.unpatch().replaced == ()

    def test_generator_is_left_alone(self, theirs: Any) -> None:
        state = torch.get_rng_state()
        K.patch(theirs)
        assert torch.equal(torch.get_rng_state(), state)
        K.unpatch(theirs)

    def test_generators_of_gpus_are_not_seeded(self, theirs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        seeded: list[int] = []
        monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
        K.patch(theirs)
        K.unpatch(theirs)
        assert seeded == []

    def test_programs_noise_is_used(self, theirs: Any) -> None:
        """As A1111 does: another object in torch's place in the module, with a randn_like of its own."""

        class Hijack:
            def __getattr__(self, name: str) -> Any:
                return getattr(torch, name)

            def randn_like(self, x: Tensor) -> Tensor:
                return torch.full_like(x, 0.25)

        ends = []
        for patched in (False, True):
            theirs.torch = torch
            if patched:
                K.patch(theirs)
            theirs.torch = Hijack()
            for name, options in (
                ("sample_euler_ancestral", {}),
                ("sample_euler", CHURN),
                ("sample_dpm_fast", {"eta": 1.0}),
            ):
                ends.append(run(getattr(theirs, name), model, start(), *levels_of(name, 6), **options)[0])
        K.unpatch(theirs)
        for expected, ours in zip(ends[:3], ends[3:], strict=True):
            assert apart(ours, expected) < TOLERANCE

    def test_programs_progress_bar_is_used(self, theirs: Any) -> None:
        seen = []

        def trange(count: int, disable: Any = None) -> Iterator[int]:
            for i in range(count):
                seen.append(i)
                yield i

        K.patch(theirs)
        theirs.trange = trange
        run(theirs.sample_dpmpp_2m, model, start(), sigmas_of(4))
        assert seen == [0, 1, 2, 3]
        K.unpatch(theirs)

    def test_changed_copies(self, theirs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """A program's copy: seeded noise and sparing draws are followed; other maths and other signatures are left."""
        copy = k_diffusion_modules.copy_of("sampling", monkeypatch, as_name="program.sampling")

        def seeded(x: Tensor, seed: int | None = None) -> Any:
            generator = torch.Generator().manual_seed(0 if seed is None else seed + 1)
            return lambda sigma, sigma_next: torch.randn(x.shape, generator=generator)

        @functools.wraps(theirs.sample_euler_ancestral)
        def ancestral(model: Any, x: Tensor, sigmas: Tensor, extra_args: Any = None, **options: Any) -> Tensor:
            if options.get("noise_sampler") is None:
                options["noise_sampler"] = copy.default_noise_sampler(x, seed=(extra_args or {}).get("seed"))
            return theirs.sample_euler_ancestral(model, x, sigmas, extra_args, **options)

        @functools.wraps(theirs.sample_euler)
        def sparing(
            model: Any, x: Tensor, sigmas: Tensor, extra_args: Any = None, disable: Any = None, s_churn: float = 0.0,
            s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0,
        ) -> Tensor:  # fmt: skip
            for i in range(len(sigmas) - 1):
                on = s_churn > 0 and s_tmin <= sigmas[i] <= s_tmax
                hat = sigmas[i] * (1 + min(s_churn / (len(sigmas) - 1), 2**0.5 - 1)) if on else sigmas[i]
                if on:
                    x = x + torch.randn_like(x) * s_noise * (hat**2 - sigmas[i] ** 2) ** 0.5
                d = (x - model(x, hat * x.new_ones(len(x)), **(extra_args or {}))) / hat
                x = x + d * (sigmas[i + 1] - hat)
            return x

        def other(model, x, sigmas, extra_args=None, callback=None, disable=None):
            return 1.001 * theirs.sample_dpmpp_2m(model, x, sigmas, extra_args, callback, disable)

        def needs_more(model, x, sigmas, extra_args=None, callback=None, disable=None, order=4):
            return x * model.inner_model.scale

        def with_option(model, x, sigmas, extra_args=None, callback=None, disable=None, flow=False, **options):
            return x

        changed = {
            "sample_euler_ancestral": ancestral, "sample_euler": sparing, "sample_dpmpp_2m": other,
            "sample_lms": needs_more, "sample_heun": with_option, "sample_new": with_option,
        }  # fmt: skip
        copy.default_noise_sampler = seeded
        for name, function in changed.items():
            monkeypatch.setattr(copy, name, function, raising=False)
        report = K.patch(copy)
        left = dict(report.left)
        assert "1.0e-03 apart" in left.pop("sample_dpmpp_2m")
        assert "does not run on a plain model: AttributeError" in left.pop("sample_lms")
        assert "signature differs: it has flow=False" in left.pop("sample_heun")
        assert left.pop("sample_new") == "no table of this function here"
        # the copy's dpm_2_ancestral and 2s_ancestral do not pass the seed on, as its default_noise_sampler now expects
        assert left.keys() <= {"sample_dpm_adaptive"}, left
        for name, options in (("sample_euler_ancestral", {}), ("sample_euler", CHURN), ("sample_euler", {})):
            for seed in (4, 5):
                extra = {"extra_args": {"seed": seed}}
                ours, state = run(getattr(copy, name), model, start(), sigmas_of(6), **options, **extra)
                expected, their_state = run(changed[name], model, start(), sigmas_of(6), **options, **extra)
                assert apart(ours, expected) < TOLERANCE and torch.equal(state, their_state)
        assert K.unpatch(copy).replaced == report.replaced
        assert copy.sample_euler is sparing

    def test_functions_that_look_inside_the_model(self, theirs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """As ComfyUI's: another sampler where the model's schedule is a flow's. Such models keep the program's own."""
        copy = k_diffusion_modules.copy_of("sampling", monkeypatch, as_name="comfy.k_diffusion.sampling")

        class CONST:
            """ComfyUI's name for x = (1 - sigma) x0 + sigma n."""

        class Flow(CONST):
            pass

        def ancestral(
            model: Any, x: Tensor, sigmas: Tensor, extra_args: Any = None, callback: Any = None, disable: Any = None,
            eta: float = 1.0, s_noise: float = 1.0, noise_sampler: Any = None,
        ) -> Tensor:  # fmt: skip
            if isinstance(model.inner_model.inner_model.model_sampling, CONST):
                return x.clone().fill_(eta)
            g = torch.Generator().manual_seed((extra_args or {}).get("seed", 0) + 1)
            noise_sampler = noise_sampler or (lambda *_: torch.randn(x.shape, generator=g))
            options = (extra_args, callback, disable, eta, s_noise, noise_sampler)
            return theirs.sample_euler_ancestral(model, x, sigmas, *options)

        def sde(
            model: Any, x: Tensor, sigmas: Tensor, extra_args: Any = None, callback: Any = None, disable: Any = None,
            eta: float = 1.0, s_noise: float = 1.0, noise_sampler: Any = None, solver_type: str = "midpoint",
        ) -> Tensor:  # fmt: skip
            flow = isinstance(model.inner_model.model_patcher.get_model_object("model_sampling"), CONST)
            options = (extra_args, callback, disable, eta, s_noise, noise_sampler, solver_type)
            return x.clone().fill_(eta) if flow else theirs.sample_dpmpp_2m_sde(model, x, sigmas, *options)

        def curious(model: Any, x: Tensor, sigmas: Tensor, extra_args: Any = None, callback: Any = None,
                    disable: Any = None) -> Tensor:  # fmt: skip
            return x * model.inner_model.inner_model.model_sampling.percent_to_sigma(0.1)

        def seeded(x: Tensor, seed: int | None = None) -> Any:
            generator = torch.Generator().manual_seed((seed or 0) + 1)
            return lambda sigma, sigma_next: torch.randn(x.shape, generator=generator)

        own = {"sample_euler_ancestral": ancestral, "sample_dpmpp_2m_sde": sde, "sample_dpmpp_2m": curious}
        for name, function in own.items():
            monkeypatch.setattr(copy, name, function)
        copy.default_noise_sampler = seeded
        report = K.patch(copy)
        assert {"sample_euler_ancestral", "sample_dpmpp_2m_sde"} <= set(report.replaced)
        assert "has no attribute 'percent_to_sigma'" in report.left["sample_dpmpp_2m"]

        class Guider:
            """KSamplerX0Inpaint around CFGGuider around BaseModel, as far as a sampler sees them."""

            def __init__(self, sampling: Any) -> None:
                self.inner_model = self.model_patcher = self
                self.model_sampling = sampling
                self.sigmas: list[float] = []

            def get_model_object(self, name: str) -> Any:
                return getattr(self, name)

            def __call__(
                self, x: Tensor, sigma: Tensor, denoise_mask: Any = None, model_options: Any = None, seed: Any = None
            ) -> Tensor:
                assert model_options == {"transformer_options": {}} and seed == 7
                self.sigmas.append(float(sigma[0]))
                return model(x, sigma)

        extra = {"denoise_mask": None, "model_options": {"transformer_options": {}}, "seed": 7}
        for name in ("sample_euler_ancestral", "sample_dpmpp_2m_sde"):
            plain, flow = Guider(object()), Guider(Flow())
            ours, state = run(getattr(copy, name), plain, start(), sigmas_of(6), extra_args=extra)
            expected, their_state = run(own[name], Guider(object()), start(), sigmas_of(6), extra_args=extra)
            assert apart(ours, expected) < TOLERANCE and torch.equal(state, their_state)
            assert not torch.equal(ours, expected), "it is not their code that ran"
            assert plain.sigmas == sigmas_of(6)[:-1].tolist()
            assert (run(getattr(copy, name), flow, start(), sigmas_of(6), eta=0.25)[0] == 0.25).all()
            with pytest.raises(AttributeError, match="inner_model"):  # theirs' own error
                getattr(copy, name)(model, start(), sigmas_of(6), disable=True)
        assert set(K.unpatch(copy).replaced) == set(report.replaced)

    def test_what_no_table_covers_runs_as_before(self, theirs: Any) -> None:
        original = theirs.sample_euler
        x = start().double()
        K.patch(theirs)
        with pytest.warns(UserWarning, match="got torch.float64. The module's own sample_euler runs instead"):
            end = theirs.sample_euler(model, x, sigmas_of(4), disable=True)
        assert torch.equal(end, run(original, model, x, sigmas_of(4))[0])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run(theirs.sample_euler, model, start(), sigmas_of(4))
        with pytest.raises(ValueError, match="float64"):
            theirs.sample_euler(model, x, sigmas_of(4), seed=1)
        K.unpatch(theirs)

    @pytest.mark.parametrize(
        ("name", "options", "text"),
        [
            ("sample_lms", {"order": [4]}, r"order must be an integer of 1..4, got \[4\]"),
            ("sample_lms", {"order": 4.0}, "order must be an integer of 1..4, got 4.0"),
            ("sample_euler", {"s_churn": 1.0, "s_tmin": None}, "s_tmin is a bound .* a number, got None"),
            ("sample_euler", {"s_tmax": "9"}, "s_tmax is a bound .* a number, got '9'"),
            ("sample_heun", {"s_churn": torch.ones(2)}, "s_churn is an amount of noise"),
            ("sample_euler_ancestral", {"eta": torch.tensor([0.5])}, r"eta is an amount of noise.* got tensor"),
            ("sample_dpmpp_2s_ancestral", {"s_noise": 1e300}, "a coefficient outside float32"),
            ("sample_dpmpp_sde", {"r": None}, r"r, where in the step .* a number in \(0, 1\], got None"),
            ("sample_dpmpp_2m_sde", {"solver_type": ["heun"]}, r"'heun' or 'midpoint', got \['heun'\]"),
            ("sample_dpm_fast", {"n": [5]}, r"n is a number of model calls, at least 1, got \[5\]"),
            ("sample_dpm_fast", {"sigma_min": None}, "two finite numbers, got None and"),
        ],
        ids=str,
    )
    def test_odd_arguments(self, theirs: Any, name: str, options: dict[str, Any], text: str) -> None:
        """They are the module's own to take or to refuse: the same result, or its own error."""
        levels = dict(zip(("sigma_min", "sigma_max", "n"), levels_of(name, 5), strict=False))
        given = levels if name == "sample_dpm_fast" else {"sigmas": sigmas_of(5)}
        run(getattr(K, name), model, start(), **given)  # an equal number in the table's key must not let it through

        def outcome(function: Any) -> Any:
            try:
                return run(function, model, start(), **given | options)
            except Exception as error:
                return type(error), str(error)

        expected = outcome(getattr(theirs, name))
        with pytest.raises(K.Refused, match=text):
            run(getattr(K, name), model, start(), **given | options)
        K.patch(theirs)
        with pytest.warns(UserWarning, match=f"{text}.*own {name} runs instead"):
            got = outcome(getattr(theirs, name))
        K.unpatch(theirs)
        if isinstance(expected[0], Tensor):
            assert torch.equal(got[0].nan_to_num(), expected[0].nan_to_num()) and torch.equal(got[1], expected[1])
        else:
            assert got == expected

    def test_errors_of_the_model_are_not_caught(self, theirs: Any) -> None:
        K.patch(theirs)
        with pytest.raises(ValueError, match=r"returned \(1, 4, 8, 8\)"):
            theirs.sample_euler(lambda x, s: x[:1], start(), sigmas_of(4), disable=True)
        K.unpatch(theirs)

    def test_refusals_inside_the_model_are_not_its_own(self, theirs: Any) -> None:
        """A model that samples with arguments no table covers: its error, and no second run."""
        calls = []

        def sampling(x: Tensor, sigma: Tensor) -> Tensor:
            calls.append(sigma)
            return K.sample_euler(model, x, torch.tensor([1.0, 1.0, 0.0]))

        K.patch(theirs)
        with pytest.raises(K.Refused, match="no two equal"):
            theirs.sample_euler(sampling, start(), sigmas_of(4), disable=True)
        assert len(calls) == 1
        K.unpatch(theirs)

    def test_no_module(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(__import__("sys").modules, "k_diffusion.sampling", None)
        with pytest.raises(ImportError, match=r"comfy.k_diffusion.sampling"):
            K.patch()
        with pytest.raises(TypeError, match="module must be a module"):
            K.patch("k_diffusion.sampling")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"torch has no sample_\* functions"):
            K.patch(torch)


def test_page(theirs: Any, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """docs/k_diffusion.md: its Python runs as it stands, its table has every function, its tests exist."""
    text = (root / "docs" / "k_diffusion.md").read_text()
    torch.manual_seed(0)
    exec("\n".join(re.findall(r"```python\n(.*?)```", text, re.S)), {})
    printed = capsys.readouterr().out
    assert "5 0.10" in printed and "('sample_dpm_2', " in printed
    lines = re.findall(r"^\| `(sample_\w+)` \| (\S+) \| the same \|", text, re.M)
    assert [name for name, _ in lines] == TABLES
    assert all(float(difference) <= TOLERANCE for _, difference in lines)
    tests = "".join(path.read_text() for path in (root / "tests").glob("test_k_diffusion_*.py"))
    for words in re.findall(r"`pytest -k (\w+)`", text):
        assert f"def test_{words}" in tests, words


@pytest.mark.parametrize("name", ALL)
def test_signatures_are_theirs(theirs: Any, name: str) -> None:
    ours = inspect.signature(getattr(K, name)).parameters.values()
    plain = [(p.name, p.default) for p in ours if p.name not in ("seed", "host")]
    assert plain == [(p.name, p.default) for p in inspect.signature(getattr(theirs, name)).parameters.values()]
